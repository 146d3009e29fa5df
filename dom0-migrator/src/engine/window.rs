//! The source's copies of pages that went by reference, kept until the references are settled.

use std::collections::VecDeque;

use super::memory::Memory;
use super::pfn_hash::PfnMap;
use super::pool::Kept;
use super::xen_stream::{MAX_BATCH, PAGE};

/// Pages in one chunk of the arena: 2 MiB.
const CHUNK_PAGES: u32 = 512;
/// In `numbers`: this one was settled.
const SETTLED: Slot = Slot(u32::MAX);
/// Numbers that are looked up by their place, for each page that fits; with those of a few records that are settled in no order.
const NUMBERS: usize = 4;
const FEW_NUMBERS: usize = 4 * MAX_BATCH;
/// Fewer pages are copied rather than kept with the record in which they came: a record in the window costs a little by itself.
const FEW: usize = 16;

/// Where a retained page lies: in the arena, or, with the highest bit set, in a record that is kept whole, as the record's place in the
/// window and the page's number in the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Slot(u32);

/// A slot's parts.
enum Lies {
    InArena { chunk: usize, page: usize },
    InRecord { record: usize, page: usize },
}

impl Slot {
    const RECORD: u32 = 1 << 31;
    const PAGE_BITS: u32 = MAX_BATCH.ilog2();
    /// Records that are kept at once.
    const RECORDS: usize = 1 << (31 - Self::PAGE_BITS - 1);

    fn in_record(record: usize, page: usize) -> Self {
        Self(Self::RECORD | (record as u32) << Self::PAGE_BITS | page as u32)
    }

    fn lies(self) -> Lies {
        if self.0 & Self::RECORD == 0 {
            let (chunk, page) = (self.0 / CHUNK_PAGES, self.0 % CHUNK_PAGES);
            return Lies::InArena { chunk: chunk as usize, page: page as usize };
        }
        let place = self.0 & !Self::RECORD;
        let page = place & ((1 << Self::PAGE_BITS) - 1);
        Lies::InRecord { record: (place >> Self::PAGE_BITS) as usize, page: page as usize }
    }
}

/// A reference that is outstanding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retained {
    /// The page.
    pub pfn: u64,
    /// Where its copy lies; valid until [`Window::release`].
    slot: Slot,
}

/// A verdict on a number that was never given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeverSent(pub u64);

/// A record of which pages are retained where they lie.
#[derive(Debug)]
struct Whole {
    body: Kept,
    /// Where in it the pages begin.
    pages_at: usize,
    /// Pages of it that were not released yet.
    left: u32,
    /// Number of the first of them; the others follow it.
    first: u64,
}

impl Whole {
    /// Memory that it takes, in pages.
    fn memory(&self) -> u32 {
        memory_pages(&self.body)
    }
}

fn memory_pages(body: &Kept) -> u32 {
    u32::try_from(body.memory_bytes().div_ceil(PAGE)).unwrap_or(u32::MAX)
}

/// Retained pages, found by PFN and by number.
///
/// At most one reference per PFN is outstanding: a newer entry of any type supersedes the older one, whose number counts as
/// settled from then on, whatever verdict on it is still on its way.
///
/// # Where they lie
/// What one would like is not to copy: the record in which pages came is kept as it is, as long as one of them is outstanding. But a record
/// that is kept for a few last pages takes the memory of all, and the window has a budget. So pages are copied into an arena
/// when their record does not fit as a whole, or is hardly worth it; and when there is no room left, what is outstanding of the
/// record with the fewest such pages is copied too, and the record let go of. So all of the budget can be used for outstanding pages, and a
/// page is copied once at most.
///
/// The arena's memory is taken in chunks of 2 MiB, as it is needed, and given back: the free slot that is used next is that of the
/// lowest chunk that has one, so that the last chunks become empty when less is outstanding.
#[derive(Debug)]
pub struct Window {
    chunks: Vec<Chunk>,
    /// No chunk before this one has a free slot.
    lowest_free: usize,
    /// Slots of the arena that are used.
    copied: u32,
    /// Slots of its chunks that were used at least once.
    taken: u32,
    wholes: Vec<Option<Whole>>,
    /// Places in `wholes` that are free.
    free_wholes: Vec<usize>,
    /// Pages of memory that `wholes` take.
    whole_pages: u32,
    /// The place in `wholes` of the record whose pages are being retained.
    current: Option<usize>,
    capacity: u32,
    /// Pages of memory that may be taken now: others may need the rest.
    limit: u32,
    outstanding: usize,
    /// Number by PFN. Within a pass PFNs ascend, so that nobody asks for any of those that are outstanding, and only who asks has them noted:
    /// from then on until nothing is outstanding.
    by_pfn: Option<PfnMap<u64>>,
    /// No outstanding page has a higher PFN.
    highest: u64,
    /// The references from number `first` on: slot and PFN.
    numbers: VecDeque<(Slot, u64)>,
    first: u64,
    /// Those before it that are outstanding, by number: a target that leaves one open for as long as it can takes no memory by that.
    old: PfnMap<(Slot, u64)>,
    next: u64,
}

/// A piece of the arena.
#[derive(Debug)]
struct Chunk {
    memory: Memory,
    /// Those that were given back; the last one is used first.
    free: Vec<u16>,
    /// Slots that were used at least once.
    taken: u32,
}

impl Chunk {
    fn new() -> Self {
        Self { memory: Memory::zeroed(CHUNK_PAGES as usize * PAGE), free: Vec::new(), taken: 0 }
    }

    fn used(&self) -> u32 {
        self.taken - self.free.len() as u32
    }
}

impl Window {
    /// An empty window for this many pages.
    pub fn new(capacity: u32) -> Self {
        Self {
            chunks: Vec::new(),
            lowest_free: 0,
            copied: 0,
            taken: 0,
            wholes: Vec::new(),
            free_wholes: Vec::new(),
            whole_pages: 0,
            current: None,
            capacity: capacity.min(Slot::RECORD - 1),
            limit: u32::MAX,
            outstanding: 0,
            by_pfn: None,
            highest: 0,
            numbers: VecDeque::new(),
            first: 0,
            old: PfnMap::default(),
            next: 0,
        }
    }

    /// References outstanding.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Number that the next reference gets.
    pub fn next_number(&self) -> u64 {
        self.next
    }

    /// How many more pages fit, also into memory that it has beyond its limit.
    pub fn room(&self) -> usize {
        let there = self.taken - self.copied;
        let by_memory = self.most().saturating_sub(self.outstanding() as u32);
        let by_number = self.capacity.saturating_sub(self.outstanding() as u32);
        by_memory.max(there).min(by_number) as usize
    }

    /// Pages that fit at most.
    pub fn capacity(&self) -> usize {
        self.capacity as usize
    }

    /// Takes memory for no more than so many pages, until it is told otherwise; what it has it keeps.
    pub fn limit(&mut self, pages: u32) {
        self.limit = pages;
    }

    fn most(&self) -> u32 {
        self.capacity.min(self.limit)
    }

    /// Memory that it has taken.
    pub fn bytes(&self) -> u64 {
        self.arena_bytes() + self.kept_bytes()
    }

    /// Of it: the memory of copies.
    pub fn arena_bytes(&self) -> u64 {
        self.chunks.len() as u64 * u64::from(CHUNK_PAGES) * PAGE as u64
    }

    /// Of it: the memory of records that are kept.
    pub fn kept_bytes(&self) -> u64 {
        u64::from(self.whole_pages) * PAGE as u64
    }

    /// A record comes of which so many pages are to be retained, none of them before it: tells whether they will be kept where
    /// they lie, with [`retain_here`](Self::retain_here), or are to be copied. `pages_at`: where the record's pages begin.
    /// [`end_record`](Self::end_record) is called after its pages.
    pub fn begin_record(&mut self, body: Kept, pages_at: usize, pages: usize) -> bool {
        self.end_record();
        let memory = memory_pages(&body);
        let is_worth_it = pages >= FEW && pages * 4 >= memory as usize;
        let needed = self.bytes() + u64::from(memory) * PAGE as u64;
        if !is_worth_it || needed > u64::from(self.most()) * PAGE as u64 || pages > self.room() {
            return false;
        }
        let place = self.free_wholes.pop().unwrap_or(self.wholes.len());
        if place >= Slot::RECORDS {
            return false;
        }
        if place == self.wholes.len() {
            self.wholes.push(None);
        }
        if let Some(whole) = self.wholes.get_mut(place) {
            *whole = Some(Whole { body, pages_at, left: 0, first: self.next });
            self.whole_pages += memory;
            self.current = Some(place);
        }
        self.current.is_some()
    }

    /// Retains the record's page of this number where it lies, and gives it the next reference's number. The PFN must have been
    /// [superseded](Self::supersede) before. `None`: no record has begun that is kept, or there is no such page in it.
    pub fn retain_here(&mut self, pfn: u64, page: usize) -> Option<u64> {
        let place = self.current?;
        let whole = self.wholes.get_mut(place)?.as_mut()?;
        let at = whole.pages_at + page * PAGE;
        whole.body.get(at..at + PAGE).filter(|_| page < MAX_BATCH)?;
        whole.left += 1;
        Some(self.number(pfn, Slot::in_record(place, page)))
    }

    /// The record's pages have all come.
    pub fn end_record(&mut self) {
        if let Some(place) = self.current.take() {
            self.let_go_if_empty(place);
        }
    }

    /// Retains a copy of a page and gives it the next number. The PFN must have been [superseded](Self::supersede) before.
    /// `None`: no room.
    pub fn retain(&mut self, pfn: u64, page: &[u8]) -> Option<u64> {
        if self.room() == 0 {
            return None;
        }
        // With room for a page, either a chunk has a free slot, or memory for one may be taken, or records lie here that take more memory
        // than what is outstanding of them.
        while !self.has_free_slot() && self.memory_pages() >= self.most() {
            self.copy_fewest()?;
        }
        let slot = self.copy(page.get(..PAGE)?)?;
        Some(self.number(pfn, slot))
    }

    fn number(&mut self, pfn: u64, slot: Slot) -> u64 {
        let number = self.next;
        self.next += 1;
        self.numbers.push_back((slot, pfn));
        while self.numbers.len() > NUMBERS * self.capacity() + FEW_NUMBERS
            && let Some(entry) = self.numbers.pop_front()
        {
            self.old.insert(self.first, entry);
            self.first += 1;
            self.forget_settled();
        }
        self.highest = if self.outstanding == 0 { pfn } else { self.highest.max(pfn) };
        self.outstanding += 1;
        if let Some(by_pfn) = &mut self.by_pfn {
            by_pfn.insert(pfn, number);
        }
        number
    }

    /// Memory that is in use, in pages.
    fn memory_pages(&self) -> u32 {
        self.copied.saturating_add(self.whole_pages)
    }

    fn has_free_slot(&self) -> bool {
        self.taken > self.copied
    }

    /// Copies a page into the arena, which takes memory if it must.
    fn copy(&mut self, page: &[u8]) -> Option<Slot> {
        while self.chunks.get(self.lowest_free).is_some_and(|chunk| chunk.used() == CHUNK_PAGES) {
            self.lowest_free += 1;
        }
        if self.lowest_free == self.chunks.len() {
            self.chunks.push(Chunk::new());
        }
        let chunk = self.chunks.get_mut(self.lowest_free)?;
        let index = chunk.free.pop().map_or(chunk.taken, u32::from);
        let at = index as usize * PAGE;
        chunk.memory.get_mut(at..at + PAGE)?.copy_from_slice(page);
        self.taken += u32::from(index == chunk.taken);
        chunk.taken = chunk.taken.max(index + 1);
        self.copied += 1;
        Some(Slot(self.lowest_free as u32 * CHUNK_PAGES + index))
    }

    /// Copies what is outstanding of the record that has the fewest such pages, and lets go of the record, which takes more memory than they.
    /// `None`: there is none.
    fn copy_fewest(&mut self) -> Option<()> {
        let there =
            self.wholes.iter().enumerate().filter_map(|(place, whole)| Some((place, whole.as_ref()?)));
        let (place, whole) = there
            .filter(|&(place, whole)| Some(place) != self.current && whole.left < whole.memory())
            .min_by_key(|(_, whole)| whole.left)?;
        let first = whole.first;
        let body = whole.body.clone();
        let pages_at = whole.pages_at;
        // The numbers of a record's pages follow each other, and those that are settled are passed over.
        for number in first..first + MAX_BATCH as u64 {
            if self.wholes.get(place)?.as_ref()?.left == 0 {
                break;
            }
            let Some(slot) = self.slot(number) else { continue };
            let Lies::InRecord { record, page } = slot.lies() else { continue };
            if record == place {
                let from = pages_at + page * PAGE;
                let copied = self.copy(body.get(from..from + PAGE)?)?;
                *self.slot(number)? = copied;
                self.wholes.get_mut(place)?.as_mut()?.left -= 1;
            }
        }
        self.let_go_if_empty(place);
        self.wholes.get(place)?.is_none().then_some(())
    }

    fn let_go_if_empty(&mut self, place: usize) {
        let is_empty = |whole: &mut Whole| whole.left == 0;
        if self.current != Some(place)
            && let Some(whole) = self.wholes.get_mut(place).and_then(|whole| whole.take_if(is_empty))
        {
            self.whole_pages -= whole.memory();
            self.free_wholes.push(place);
        }
    }

    /// The copy of a page.
    pub fn page(&self, retained: Retained) -> &[u8] {
        let page = match retained.slot.lies() {
            Lies::InArena { chunk, page } => {
                self.chunks.get(chunk).and_then(|chunk| chunk.memory.get(page * PAGE..(page + 1) * PAGE))
            }
            Lies::InRecord { record, page } => {
                self.wholes.get(record).and_then(Option::as_ref).and_then(|whole| {
                    let at = whole.pages_at + page * PAGE;
                    whole.body.get(at..at + PAGE)
                })
            }
        };
        page.unwrap_or(&[])
    }

    /// A newer entry for the PFN has come: drops the outstanding reference, if there is one.
    pub fn supersede(&mut self, pfn: u64) -> bool {
        if self.outstanding == 0 || pfn > self.highest {
            return false;
        }
        let (numbers, first, old) = (&self.numbers, self.first, &self.old);
        let by_pfn = self.by_pfn.get_or_insert_with(|| {
            let recent = (first..).zip(numbers).filter(|(_, entry)| entry.0 != SETTLED);
            let old = old.iter().map(|(&number, entry)| (number, entry));
            recent.chain(old).map(|(number, entry)| (entry.1, number)).collect()
        });
        let Some(&number) = by_pfn.get(&pfn) else { return false };
        match self.take(number) {
            Ok(Some(retained)) => {
                self.release(retained);
                true
            }
            _ => false,
        }
    }

    /// Settles a reference: its page is the caller's until [`release`](Self::release), and nothing may be retained before that.
    /// `None`: it was settled before.
    ///
    /// # Errors
    /// [`NeverSent`]: the number was not given out yet.
    pub fn take(&mut self, number: u64) -> Result<Option<Retained>, NeverSent> {
        if number >= self.next {
            return Err(NeverSent(number));
        }
        let taken = match number.checked_sub(self.first) {
            None => self.old.remove(&number),
            Some(index) => {
                let entry = self.numbers.get_mut(index as usize).filter(|entry| entry.0 != SETTLED);
                entry.map(|entry| (std::mem::replace(&mut entry.0, SETTLED), entry.1))
            }
        };
        let Some((slot, pfn)) = taken else { return Ok(None) };
        self.outstanding -= 1;
        if self.outstanding == 0 {
            self.by_pfn = None;
        } else if let Some(by_pfn) = &mut self.by_pfn {
            by_pfn.remove(&pfn);
        }
        self.forget_settled();
        Ok(Some(Retained { pfn, slot }))
    }

    /// Numbers that are settled, and that nothing before them keeps.
    fn forget_settled(&mut self) {
        while self.numbers.front().is_some_and(|entry| entry.0 == SETTLED) {
            self.numbers.pop_front();
            self.first += 1;
        }
    }

    /// A number's slot, if it is outstanding.
    fn slot(&mut self, number: u64) -> Option<&mut Slot> {
        let entry = match number.checked_sub(self.first) {
            None => self.old.get_mut(&number),
            Some(index) => self.numbers.get_mut(index as usize),
        };
        entry.map(|entry| &mut entry.0)
    }

    /// Gives a page's memory back.
    pub fn release(&mut self, retained: Retained) {
        match retained.slot.lies() {
            Lies::InRecord { record, .. } => {
                if let Some(whole) = self.wholes.get_mut(record).and_then(Option::as_mut) {
                    whole.left = whole.left.saturating_sub(1);
                }
                self.let_go_if_empty(record);
            }
            Lies::InArena { chunk: number, page } => {
                let Some(chunk) = self.chunks.get_mut(number) else { return };
                chunk.free.push(page as u16);
                self.copied -= 1;
                self.lowest_free = self.lowest_free.min(number);
                // One empty chunk is kept, so that memory does not come and go with each page.
                while let [.., before, last] = &self.chunks[..]
                    && before.used() == 0
                    && last.used() == 0
                {
                    self.taken -= last.taken;
                    self.chunks.pop();
                }
                self.lowest_free = self.lowest_free.min(self.chunks.len());
            }
        }
    }

    /// The numbers that are outstanding, the oldest first.
    pub fn numbers(&self) -> Vec<u64> {
        let mut numbers: Vec<u64> = self.old.keys().copied().collect();
        numbers.sort_unstable();
        let recent = (self.first..).zip(&self.numbers).filter(|(_, entry)| entry.0 != SETTLED);
        numbers.extend(recent.map(|(number, _)| number));
        numbers
    }

    /// Lets go of the arena; nothing may be outstanding, and nothing is retained from now on.
    pub fn close(&mut self) {
        if self.outstanding == 0 {
            self.chunks = Vec::new();
            (self.lowest_free, self.copied, self.taken, self.capacity) = (0, 0, 0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::pool::{Buffer, Pool};
    use super::*;

    #[test]
    fn a_limit_is_kept_and_can_be_lifted() {
        let mut window = Window::new(8);
        window.limit(2);
        let kept = [0, 1, 2].map(|pfn| window.retain(pfn, &[1; PAGE]));
        assert_eq!(kept, [Some(0), Some(1), None]);
        window.limit(1);
        assert_eq!(window.room(), 0);
        assert!(window.supersede(1) && window.room() == 1);
        window.limit(u32::MAX);
        assert_eq!((window.room(), window.bytes()), (7, u64::from(CHUNK_PAGES) * PAGE as u64));
    }

    #[test]
    fn memory_is_given_back_and_no_slot_given_out_twice() {
        let pages = u64::from(CHUNK_PAGES) * 4;
        let mut window = Window::new(pages as u32);
        let page = |pfn: u64| [pfn as u8 | 1; PAGE];
        for _ in 0..2 {
            for pfn in 0..pages {
                window.retain(pfn, &page(pfn)).unwrap();
            }
            assert_eq!((window.room(), window.bytes()), (0, pages * PAGE as u64));
            // All but the first, in no order.
            for pfn in (1..pages).map(|pfn| pfn * 769 % pages).filter(|&pfn| pfn != 0) {
                assert!(window.supersede(pfn));
            }
            assert_eq!(window.room() as u64, pages - 1);
            assert!(window.bytes() <= 2 * u64::from(CHUNK_PAGES) * PAGE as u64);
            assert!(window.supersede(0));
        }
        let kept: Vec<u64> = (0..pages).map(|pfn| window.retain(pfn, &page(pfn)).unwrap()).collect();
        let slots: std::collections::HashSet<Slot> =
            kept.iter().map(|&number| window.take(number).unwrap().unwrap().slot).collect();
        assert_eq!(slots.len() as u64, pages);
    }

    #[test]
    fn a_reference_that_stays_open_takes_no_memory_by_it() {
        let pool = Pool::new(1);
        let mut window = Window::new(100);
        let body = record(&pool, 9, 32);
        assert!(window.begin_record(body.keep().unwrap(), 8, 32));
        let open = [0, 1].map(|pfn| window.retain_here(pfn, pfn as usize).unwrap());
        window.end_record();
        for pfn in 2..100_000 {
            let number = window.retain(pfn, &[2; PAGE]).unwrap();
            let retained = window.take(number).unwrap().unwrap();
            window.release(retained);
            assert_eq!(window.take(number), Ok(None));
        }
        assert_eq!(window.numbers(), open);
        assert!(
            window.numbers.capacity() <= 4 * (NUMBERS * 100 + FEW_NUMBERS) && window.old.capacity() < 100
        );
        // What is as old as that is found all the same: to be copied, superseded, and settled.
        (0..98).for_each(|pfn| assert!(window.retain(200_000 + pfn, &[3; PAGE]).is_some()));
        assert_eq!(window.bytes(), u64::from(CHUNK_PAGES) * PAGE as u64, "the record was let go of");
        assert!(window.supersede(1) && !window.supersede(1));
        let kept = window.take(open[0]).unwrap().unwrap();
        assert_eq!(window.page(kept), [9; PAGE]);
        window.release(kept);
        assert_eq!((window.take(open[0]), window.take(open[1])), (Ok(None), Ok(None)));
    }

    #[test]
    fn a_superseded_reference_is_settled_once() {
        let mut window = Window::new(2);
        let a = window.retain(5, &[1; PAGE]).unwrap();
        let b = window.retain(6, &[2; PAGE]).unwrap();
        assert!(window.room() == 0 && window.retain(7, &[3; PAGE]).is_none());
        assert!(window.supersede(5));
        assert!(!window.supersede(5));
        let c = window.retain(5, &[4; PAGE]).unwrap();
        // The verdict on the older reference arrives late: it says nothing about the newer one.
        assert_eq!(window.take(a), Ok(None));
        let kept = window.take(c).unwrap().unwrap();
        assert_eq!((kept.pfn, window.page(kept)[0]), (5, 4));
        window.release(kept);
        assert_eq!(window.take(c + 1), Err(NeverSent(c + 1)));
        assert_eq!(window.numbers(), [b]);
        assert!(window.take(b).unwrap().is_some());
        assert_eq!((window.numbers(), window.outstanding()), (Vec::new(), 0));
    }

    /// A record of so many pages, page i full of `first + i`.
    fn record(pool: &Pool, first: u8, pages: usize) -> Buffer {
        let mut buffer = pool.take(8 + pages * PAGE);
        for (page, bytes) in buffer.bytes_mut()[8..].chunks_exact_mut(PAGE).enumerate() {
            bytes.fill(first.wrapping_add(page as u8));
        }
        buffer
    }

    #[test]
    fn a_record_is_kept_until_its_last_page_is_settled_and_no_longer() {
        let pool = Pool::new(1);
        let mut window = Window::new(100);
        let body = record(&pool, 1, 32);
        assert!(window.begin_record(body.keep().unwrap(), 8, 32));
        let numbers: Vec<u64> =
            (0..32).map(|page| window.retain_here(100 + page, page as usize).unwrap()).collect();
        assert_eq!(window.retain_here(200, 32), None, "it has no such page");
        window.end_record();
        drop(body);
        assert_eq!((window.room(), window.bytes()), (68, 33 * PAGE as u64));
        for (page, &number) in numbers.iter().enumerate() {
            assert_eq!(pool.free_bytes(), 0);
            let kept = window.take(number).unwrap().unwrap();
            assert_eq!(window.page(kept), [1 + page as u8; PAGE]);
            window.release(kept);
        }
        assert_eq!((window.bytes(), pool.free_bytes()), (0, 8 + 32 * PAGE));
    }

    #[test]
    fn a_record_that_is_hardly_worth_it_is_not_kept() {
        let pool = Pool::new(2);
        let mut window = Window::new(200);
        let body = record(&pool, 1, 80);
        assert!(!window.begin_record(body.keep().unwrap(), 8, 20));
        assert!(!Window::new(80).begin_record(body.keep().unwrap(), 8, 80), "81 pages of memory");
        assert!(window.begin_record(body.keep().unwrap(), 8, 21));
        window.end_record();
        assert_eq!(window.bytes(), 0, "nothing of it was retained");
    }

    /// Of each record a page stays outstanding: the window can be filled to its last page all the same.
    #[test]
    fn records_that_are_kept_for_few_pages_make_room() {
        let pool = Pool::new(1);
        let mut window = Window::new(660);
        let mut outstanding = std::collections::BTreeMap::new();
        for round in 0..20_u64 {
            let body = record(&pool, round as u8, 32);
            assert!(window.begin_record(body.keep().unwrap(), 8, 32));
            for page in 0..32 {
                window.retain_here(round * 32 + page, page as usize).unwrap();
            }
            window.end_record();
            (1..32).for_each(|page| assert!(window.supersede(round * 32 + page)));
            outstanding.insert(round * 32, round as u8);
        }
        assert_eq!((window.room(), window.bytes()), (640, 660 * PAGE as u64));
        for pfn in 1000..1640_u64 {
            window.retain(pfn, &[pfn as u8; PAGE]).unwrap();
            outstanding.insert(pfn, pfn as u8);
        }
        assert_eq!((window.room(), window.retain(5, &[0; PAGE])), (0, None));
        assert_eq!(window.bytes(), u64::from(2 * CHUNK_PAGES) * PAGE as u64);
        for number in window.numbers() {
            let kept = window.take(number).unwrap().unwrap();
            assert_eq!(window.page(kept), [outstanding.remove(&kept.pfn).unwrap(); PAGE]);
            window.release(kept);
        }
        assert!(outstanding.is_empty());
    }

    /// What happens to a window.
    #[derive(Clone, Debug)]
    enum Step {
        /// A record of so many pages, of which every so manieth is retained, from this PFN on.
        Record {
            pfn: u64,
            pages: usize,
            every: usize,
        },
        Supersede(u64),
        /// The oldest, or one behind it.
        Settle(u64),
        Limit(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0_u64..600, 1_usize..120, 1_usize..6).prop_map(|(pfn, pages, every)| Step::Record { pfn, pages, every }),
            2 => (0_u64..600).prop_map(Step::Supersede),
            6 => (0_u64..200).prop_map(Step::Settle),
            1 => prop_oneof![0_u32..400, Just(u32::MAX)].prop_map(Step::Limit),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever lies where: each page is as it was, the budget holds, and as many pages fit as the window says.
        #[test]
        fn pages_stay_as_they_were(capacity in 1_u32..500, steps in proptest::collection::vec(step(), 0..120)) {
            let pool = Pool::new(2);
            let mut window = Window::new(capacity);
            // PFN -> what it holds, and its number.
            let mut model = std::collections::BTreeMap::<u64, (u8, u64)>::new();
            let (mut mark, mut limit, mut lowered) = (0_u8, u32::MAX, 0);
            for step in steps {
                match step {
                    Step::Record { pfn, pages, every } => {
                        mark = mark.wrapping_add(7);
                        let body = record(&pool, mark, pages);
                        let wanted: Vec<usize> = (0..pages).step_by(every).collect();
                        for &page in &wanted {
                            prop_assert_eq!(window.supersede(pfn + page as u64), model.remove(&(pfn + page as u64)).is_some());
                        }
                        let in_place = window.begin_record(body.keep().unwrap(), 8, wanted.len());
                        for page in wanted {
                            let (pfn, room) = (pfn + page as u64, window.room());
                            let content = mark.wrapping_add(page as u8);
                            let number = if in_place { window.retain_here(pfn, page) } else { window.retain(pfn, &[content; PAGE]) };
                            prop_assert_eq!(number.is_some(), room > 0);
                            if let Some(number) = number {
                                model.insert(pfn, (content, number));
                            }
                        }
                        window.end_record();
                    }
                    Step::Supersede(pfn) => prop_assert_eq!(window.supersede(pfn), model.remove(&pfn).is_some()),
                    Step::Settle(behind) => {
                        let oldest = window.numbers().first().copied().filter(|oldest| oldest + behind < window.next_number());
                        let Some(oldest) = oldest else { continue };
                        let taken = window.take(oldest + behind).unwrap();
                        let expected = model.iter().find(|(_, (_, number))| *number == oldest + behind).map(|(pfn, it)| (*pfn, it.0));
                        prop_assert_eq!(taken.map(|it| (it.pfn, window.page(it)[0], window.page(it)[PAGE - 1])), expected.map(|(pfn, it)| (pfn, it, it)));
                        if let Some(taken) = taken {
                            window.release(taken);
                            model.remove(&taken.pfn);
                        }
                    }
                    Step::Limit(pages) => {
                        // What it has it keeps: so much more than the limit.
                        lowered = window.bytes();
                        limit = pages;
                        window.limit(pages);
                    }
                }
                prop_assert_eq!(window.outstanding(), model.len());
                let budget = u64::from(capacity.min(limit)) * PAGE as u64;
                let chunk = u64::from(CHUNK_PAGES) * PAGE as u64;
                prop_assert!(window.bytes() <= budget.max(lowered) + chunk, "{} of {}", window.bytes(), budget);
            }
            for number in window.numbers() {
                let taken = window.take(number).unwrap().unwrap();
                prop_assert_eq!(window.page(taken), [model.remove(&taken.pfn).unwrap().0; PAGE]);
                window.release(taken);
            }
            prop_assert!(model.is_empty());
            window.close();
            prop_assert_eq!((window.bytes(), window.room()), (0, 0));
        }
    }
}
