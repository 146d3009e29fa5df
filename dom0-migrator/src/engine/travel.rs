//! How each page of the guest travelled the last time, for those who look at a migration afterwards.
//!
//! Half a byte for each page, in chunks that are taken as they are needed: 128 KiB a GiB of guest. Nothing here decides anything.

use serde::{Deserialize, Serialize};

use super::xen_stream::{PageData, has_data, is_page_table};

/// PFNs in a chunk: 32 KiB of half bytes, 256 MiB of guest.
const CHUNK: u64 = 1 << 16;
/// PFNs that are kept: 1 TiB of guest, 128 MiB of half bytes. What lies above is counted, and not on the map.
pub const PFNS_MAX: u64 = 1 << 28;

/// Most bytes of all [`Travel::pieces`].
pub const BYTES_MAX: u64 = PFNS_MAX / 2 + PFNS_MAX / CHUNK * 2;

/// The numbers of chunks, as they stand before each.
static NUMBERS: [[u8; 2]; (PFNS_MAX / CHUNK) as usize] = {
    let mut numbers = [[0; 2]; (PFNS_MAX / CHUNK) as usize];
    let mut index = 0;
    while index < numbers.len() {
        numbers[index] = (index as u16).to_le_bytes();
        index += 1;
    }
    numbers
};

/// How a page travelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Way {
    /// Not at all: the guest has no such page.
    Unseen = 0,
    /// Named, without content (unpopulated, broken).
    NoData = 1,
    /// As a marker: it is all zeros.
    Zero = 2,
    /// As it is, the first time.
    Raw = 3,
    /// As it is, in a later pass: it was written to meanwhile.
    Resent = 4,
    /// As it is, since it is a page table.
    PageTable = 5,
    /// By reference, and not settled.
    Referenced = 6,
    /// By reference, and loaded from storage by the target.
    Accepted = 7,
    /// By reference, refused by the target, and then as it is.
    Refused = 8,
    /// By reference, not settled in time, and then as it is.
    Replaced = 9,
}

impl Way {
    /// All of them, each at its number.
    pub const ALL: [Self; 10] = [
        Self::Unseen,
        Self::NoData,
        Self::Zero,
        Self::Raw,
        Self::Resent,
        Self::PageTable,
        Self::Referenced,
        Self::Accepted,
        Self::Refused,
        Self::Replaced,
    ];

    /// The way of this number, if there is one.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

/// Pages by the way that they went, each time that they went: running counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WayCounts {
    /// [`Way::NoData`].
    pub no_data: u64,
    /// [`Way::Zero`].
    pub zero: u64,
    /// [`Way::Raw`].
    pub raw: u64,
    /// [`Way::Resent`].
    pub resent: u64,
    /// [`Way::PageTable`].
    pub page_table: u64,
    /// References sent, settled or not.
    pub referenced: u64,
    /// [`Way::Accepted`].
    pub accepted: u64,
    /// [`Way::Refused`].
    pub refused: u64,
    /// [`Way::Replaced`].
    pub replaced: u64,
}

impl WayCounts {
    /// Counts pages.
    pub fn add(&mut self, way: Way, pages: u64) {
        let counter = match way {
            Way::Unseen => return,
            Way::NoData => &mut self.no_data,
            Way::Zero => &mut self.zero,
            Way::Raw => &mut self.raw,
            Way::Resent => &mut self.resent,
            Way::PageTable => &mut self.page_table,
            Way::Referenced => &mut self.referenced,
            Way::Accepted => &mut self.accepted,
            Way::Refused => &mut self.refused,
            Way::Replaced => &mut self.replaced,
        };
        *counter = counter.saturating_add(pages);
    }

    /// Takes pages back that were counted, and did not go.
    pub fn take_back(&mut self, way: Way, pages: u64) {
        let left = self.get(way).saturating_sub(pages);
        let counter = match way {
            Way::Raw => &mut self.raw,
            Way::Resent => &mut self.resent,
            Way::PageTable => &mut self.page_table,
            // The others are sent at once.
            _ => return,
        };
        *counter = left;
    }

    /// Goes down nowhere from what was there before.
    pub fn keep(&mut self, before: &Self) {
        self.raw = self.raw.max(before.raw);
        self.resent = self.resent.max(before.resent);
        self.page_table = self.page_table.max(before.page_table);
    }

    /// Pages of one way.
    pub fn get(&self, way: Way) -> u64 {
        match way {
            Way::Unseen => 0,
            Way::NoData => self.no_data,
            Way::Zero => self.zero,
            Way::Raw => self.raw,
            Way::Resent => self.resent,
            Way::PageTable => self.page_table,
            Way::Referenced => self.referenced,
            Way::Accepted => self.accepted,
            Way::Refused => self.refused,
            Way::Replaced => self.replaced,
        }
    }
}

/// The way of every page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Travel {
    chunks: Vec<Option<Box<[u8]>>>,
    counts: WayCounts,
}

impl Travel {
    /// A run of pages went this way.
    pub fn span(&mut self, first_pfn: u64, pages: u64, way: Way) {
        self.counts.add(way, pages);
        let end = first_pfn.saturating_add(pages).min(PFNS_MAX);
        let mut pfn = first_pfn;
        while pfn < end {
            let next = ((pfn / CHUNK + 1) * CHUNK).min(end);
            let (from, until) = ((pfn % CHUNK) as usize, (pfn % CHUNK + (next - pfn)) as usize);
            fill(self.chunk(pfn), from, until, way as u8);
            pfn = next;
        }
    }

    /// The pages of a PAGE_DATA record went as they are; `again`: in a pass after the first.
    pub fn record(&mut self, pages: &PageData<'_>, again: bool) {
        for entry in pages.entries() {
            let way = match entry.page_type {
                kind if !has_data(kind) => Way::NoData,
                kind if is_page_table(kind) => Way::PageTable,
                _ if again => Way::Resent,
                _ => Way::Raw,
            };
            self.span(entry.pfn, 1, way);
        }
    }

    /// A page was noted to go this way, and does not.
    pub fn take_back(&mut self, way: Way) {
        self.counts.take_back(way, 1);
    }

    /// Pages by way, each time that they went.
    pub fn counts(&self) -> WayCounts {
        self.counts
    }

    /// The way of one page.
    pub fn way(&self, pfn: u64) -> Way {
        let chunk = usize::try_from(pfn / CHUNK).ok().and_then(|index| self.chunks.get(index));
        let Some(Some(chunk)) = chunk else { return Way::Unseen };
        let at = (pfn % CHUNK) as usize;
        let byte = chunk.get(at / 2).copied().unwrap_or(0);
        Way::from_number(if at.is_multiple_of(2) { byte & 0xf } else { byte >> 4 }).unwrap_or(Way::Unseen)
    }

    /// PFNs of all chunks in which anything was noted, ascending, each with the way of every page in it.
    pub fn noted(&self) -> impl Iterator<Item = (u64, impl Iterator<Item = Way> + '_)> + '_ {
        self.chunks.iter().enumerate().filter_map(|(index, chunk)| {
            let ways = chunk.as_ref()?.iter().flat_map(|byte| [byte & 0xf, byte >> 4]);
            Some((index as u64 * CHUNK, ways.map(|number| Way::from_number(number).unwrap_or(Way::Unseen))))
        })
    }

    /// Pieces for [`from_bytes`](Self::from_bytes): the number of each chunk that is there, and its half bytes. The counters are not
    /// among them.
    pub fn pieces(&self) -> Vec<&[u8]> {
        let there =
            self.chunks.iter().enumerate().filter_map(|(index, chunk)| Some((index, chunk.as_ref()?)));
        there
            .flat_map(|(index, chunk)| [NUMBERS.get(index).map_or(&[][..], |number| &number[..]), chunk])
            .collect()
    }

    /// Out of the joined [`pieces`](Self::pieces); `None` when they are none. Chunks of numbers that cannot be are left out.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let pieces = bytes.chunks_exact(2 + CHUNK as usize / 2);
        let mut travel = pieces.remainder().is_empty().then(Self::default)?;
        for piece in pieces {
            let (number, half_bytes) = piece.split_first_chunk()?;
            let first = u64::from(u16::from_le_bytes(*number)) * CHUNK;
            if first < PFNS_MAX {
                travel.chunk(first).copy_from_slice(half_bytes);
            }
        }
        Some(travel)
    }

    fn chunk(&mut self, pfn: u64) -> &mut [u8] {
        let index = (pfn / CHUNK) as usize;
        if self.chunks.len() <= index {
            self.chunks.resize(index + 1, None);
        }
        match self.chunks.get_mut(index) {
            Some(chunk) => chunk.get_or_insert_with(|| vec![0; CHUNK as usize / 2].into_boxed_slice()),
            None => &mut [],
        }
    }
}

/// Sets the half bytes `from..until`.
fn fill(chunk: &mut [u8], mut from: usize, until: usize, half: u8) {
    if from % 2 == 1 && from < until {
        if let Some(byte) = chunk.get_mut(from / 2) {
            *byte = *byte & 0x0f | half << 4;
        }
        from += 1;
    }
    if let Some(whole) = chunk.get_mut(from / 2..(until / 2).max(from / 2)) {
        whole.fill(half * 0x11);
    }
    if until % 2 == 1
        && from < until
        && let Some(byte) = chunk.get_mut(until / 2)
    {
        *byte = *byte & 0xf0 | half;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn every_way_is_at_its_number_and_has_its_counter() {
        let mut counts = WayCounts::default();
        for (number, way) in Way::ALL.into_iter().enumerate() {
            assert_eq!(way as usize, number);
            counts.add(way, number as u64);
            assert_eq!(counts.get(way), number as u64);
        }
    }

    #[test]
    fn what_is_out_of_reach_is_counted_and_takes_no_memory() {
        let mut travel = Travel::default();
        travel.span(PFNS_MAX - 1, 3, Way::Raw);
        travel.span(u64::MAX - 1, 9, Way::Zero);
        assert_eq!((travel.counts().raw, travel.counts().zero), (3, 9));
        assert_eq!((travel.way(PFNS_MAX - 1), travel.way(PFNS_MAX)), (Way::Raw, Way::Unseen));
        assert_eq!(travel.noted().count(), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn it_keeps_what_was_said_last(
            spans in proptest::collection::vec((0..CHUNK * 2 + 9, 0..70_u64, 1..10_u8), 0..40)
        ) {
            let (mut travel, mut model) = (Travel::default(), BTreeMap::new());
            for (first, pages, number) in spans {
                let way = Way::from_number(number).unwrap();
                travel.span(first, pages, way);
                model.extend((first..first + pages).map(|pfn| (pfn, way)));
            }
            let noted: BTreeMap<u64, Way> = travel
                .noted()
                .flat_map(|(first, ways)| ways.enumerate().map(move |(i, way)| (first + i as u64, way)))
                .filter(|(_, way)| *way != Way::Unseen)
                .collect();
            prop_assert_eq!(&noted, &model);
            let bytes = travel.pieces().concat();
            prop_assert_eq!(&Travel::from_bytes(&bytes).unwrap().chunks, &travel.chunks);
            prop_assert_eq!(Travel::from_bytes(&bytes[..bytes.len().saturating_sub(1)]).is_none(), !bytes.is_empty());
            for (&pfn, &way) in &model {
                prop_assert_eq!(travel.way(pfn), way);
            }
        }
    }
}
