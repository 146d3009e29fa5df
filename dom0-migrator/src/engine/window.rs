//! The source's copies of pages that went by reference, kept until the references are settled.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::pfn_hash::PfnMap;
use super::xen_stream::PAGE;

/// Pages in one chunk of the arena: 2 MiB.
const CHUNK_PAGES: u32 = 512;

/// A reference that is outstanding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retained {
    /// The page.
    pub pfn: u64,
    /// Where its copy lies; valid until [`Window::release`].
    pub slot: u32,
}

/// A verdict on a number that was never given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeverSent(pub u64);

/// Retained pages, found by PFN and by number.
///
/// At most one reference per PFN is outstanding: a newer entry of any type supersedes the older one, whose number counts as
/// settled from then on, whatever verdict on it is still on its way. Memory is taken in chunks of 2 MiB, as it is needed, and given back:
/// the lowest free slot is used first, so that the last chunks become empty when less is outstanding.
#[derive(Debug)]
pub struct Window {
    chunks: Vec<Box<[u8]>>,
    /// Slots used in each chunk.
    used: Vec<u32>,
    free: BinaryHeap<Reverse<u32>>,
    /// Slots of the chunks that were used at least once.
    taken: u32,
    capacity: u32,
    /// Slots that may be taken now: others may need the memory of the rest.
    limit: u32,
    by_pfn: PfnMap<u64>,
    /// By number, those that are outstanding alone: a target that leaves one open for as long as it can takes no memory by that.
    by_number: PfnMap<Retained>,
    next: u64,
}

impl Window {
    /// An empty window for this many pages.
    pub fn new(capacity: u32) -> Self {
        Self {
            chunks: Vec::new(),
            used: Vec::new(),
            free: BinaryHeap::new(),
            taken: 0,
            capacity,
            limit: u32::MAX,
            by_pfn: PfnMap::default(),
            by_number: PfnMap::default(),
            next: 0,
        }
    }

    /// References outstanding.
    pub fn outstanding(&self) -> usize {
        self.by_pfn.len()
    }

    /// Number that the next reference gets.
    pub fn next_number(&self) -> u64 {
        self.next
    }

    /// How many more pages fit.
    pub fn room(&self) -> usize {
        self.free.len() + self.most().saturating_sub(self.taken) as usize
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
        self.chunks.len() as u64 * u64::from(CHUNK_PAGES) * PAGE as u64
    }

    /// Retains a page and gives it the next number. The PFN must have been [superseded](Self::supersede) before. `None`:
    /// no room.
    pub fn retain(&mut self, pfn: u64, page: &[u8]) -> Option<u64> {
        let slot = match self.free.pop() {
            Some(Reverse(slot)) => slot,
            None if self.taken < self.most() => {
                if self.taken / CHUNK_PAGES == self.chunks.len() as u32 {
                    self.chunks.push(vec![0; CHUNK_PAGES as usize * PAGE].into_boxed_slice());
                    self.used.push(0);
                }
                self.taken += 1;
                self.taken - 1
            }
            None => return None,
        };
        self.page_mut(slot)?.copy_from_slice(page.get(..PAGE)?);
        *self.used.get_mut((slot / CHUNK_PAGES) as usize)? += 1;
        let number = self.next;
        self.next += 1;
        self.by_number.insert(number, Retained { pfn, slot });
        self.by_pfn.insert(pfn, number);
        Some(number)
    }

    fn range(slot: u32) -> (usize, std::ops::Range<usize>) {
        let at = (slot % CHUNK_PAGES) as usize * PAGE;
        ((slot / CHUNK_PAGES) as usize, at..at + PAGE)
    }

    fn page_mut(&mut self, slot: u32) -> Option<&mut [u8]> {
        let (chunk, range) = Self::range(slot);
        self.chunks.get_mut(chunk)?.get_mut(range)
    }

    /// The copy in a slot.
    pub fn page(&self, slot: u32) -> &[u8] {
        let (chunk, range) = Self::range(slot);
        self.chunks.get(chunk).and_then(|chunk| chunk.get(range)).unwrap_or(&[])
    }

    /// A newer entry for the PFN has come: drops the outstanding reference, if there is one.
    pub fn supersede(&mut self, pfn: u64) -> bool {
        if self.by_pfn.is_empty() {
            return false;
        }
        let Some(&number) = self.by_pfn.get(&pfn) else { return false };
        match self.take(number) {
            Ok(Some(retained)) => {
                self.release(retained.slot);
                true
            }
            _ => false,
        }
    }

    /// Settles a reference: its page is the caller's until [`release`](Self::release). `None`: it was settled before.
    ///
    /// # Errors
    /// [`NeverSent`]: the number was not given out yet.
    pub fn take(&mut self, number: u64) -> Result<Option<Retained>, NeverSent> {
        if number >= self.next {
            return Err(NeverSent(number));
        }
        let Some(retained) = self.by_number.remove(&number) else { return Ok(None) };
        self.by_pfn.remove(&retained.pfn);
        Ok(Some(retained))
    }

    /// Gives a slot back.
    pub fn release(&mut self, slot: u32) {
        self.free.push(Reverse(slot));
        if let Some(used) = self.used.get_mut((slot / CHUNK_PAGES) as usize) {
            *used -= 1;
        }
        // One empty chunk is kept, so that memory does not come and go with each page.
        while let [.., 0, 0] = self.used[..] {
            self.used.pop();
            self.chunks.pop();
            self.taken = self.taken.min(self.chunks.len() as u32 * CHUNK_PAGES);
            let taken = self.taken;
            self.free.retain(|&Reverse(slot)| slot < taken);
        }
    }

    /// The numbers that are outstanding, the oldest first.
    pub fn numbers(&self) -> Vec<u64> {
        let mut numbers: Vec<u64> = self.by_number.keys().copied().collect();
        numbers.sort_unstable();
        numbers
    }

    /// Lets go of the arena; nothing may be outstanding, and nothing is retained from now on.
    pub fn close(&mut self) {
        if self.by_pfn.is_empty() {
            (self.chunks, self.used, self.free) = (Vec::new(), Vec::new(), BinaryHeap::new());
            (self.taken, self.capacity) = (0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
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
        let slots: std::collections::HashSet<u32> =
            kept.iter().map(|&number| window.take(number).unwrap().unwrap().slot).collect();
        assert_eq!(slots.len() as u64, pages);
    }

    #[test]
    fn a_reference_that_stays_open_takes_no_memory_by_it() {
        let mut window = Window::new(8);
        let open = window.retain(0, &[1; PAGE]).unwrap();
        for pfn in 1..100_000 {
            let number = window.retain(pfn, &[2; PAGE]).unwrap();
            let retained = window.take(number).unwrap().unwrap();
            window.release(retained.slot);
            assert_eq!(window.take(number), Ok(None));
        }
        assert_eq!(window.numbers(), [open]);
        assert!(window.by_number.capacity() < 1000 && window.by_pfn.capacity() < 1000);
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
        assert_eq!((kept.pfn, window.page(kept.slot)[0]), (5, 4));
        window.release(kept.slot);
        assert_eq!(window.take(c + 1), Err(NeverSent(c + 1)));
        assert_eq!(window.numbers(), [b]);
        assert!(window.take(b).unwrap().is_some());
        assert_eq!((window.numbers(), window.outstanding()), (Vec::new(), 0));
    }
}
