//! The source's copies of pages that went by reference, kept until the references are settled.

use std::collections::VecDeque;

use super::pfn_hash::PfnMap;
use super::xen_stream::PAGE;

/// Pages in one chunk of the arena: 2 MiB.
const CHUNK_PAGES: u32 = 512;
/// In `slots`: this number was settled.
const SETTLED: u32 = u32::MAX;

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
/// settled from then on, whatever verdict on it is still on its way. Memory is taken in chunks of 2 MiB, as it is needed.
#[derive(Debug)]
pub struct Window {
    chunks: Vec<Box<[u8]>>,
    free: Vec<u32>,
    taken: u32,
    capacity: u32,
    by_pfn: PfnMap<u64>,
    /// The references from number `first` on: slot and PFN.
    numbers: VecDeque<(u32, u64)>,
    first: u64,
    next: u64,
}

impl Window {
    /// An empty window for this many pages.
    pub fn new(capacity: u32) -> Self {
        Self {
            chunks: Vec::new(),
            free: Vec::new(),
            taken: 0,
            capacity: capacity.min(SETTLED - 1),
            by_pfn: PfnMap::default(),
            numbers: VecDeque::new(),
            first: 0,
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
        self.free.len() + (self.capacity - self.taken) as usize
    }

    /// Retains a page and gives it the next number. The PFN must have been [superseded](Self::supersede) before. `None`:
    /// no room.
    pub fn retain(&mut self, pfn: u64, page: &[u8]) -> Option<u64> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.taken < self.capacity => {
                if self.taken / CHUNK_PAGES == self.chunks.len() as u32 {
                    self.chunks.push(vec![0; CHUNK_PAGES as usize * PAGE].into_boxed_slice());
                }
                self.taken += 1;
                self.taken - 1
            }
            None => return None,
        };
        self.page_mut(slot)?.copy_from_slice(page.get(..PAGE)?);
        let number = self.next;
        self.next += 1;
        self.numbers.push_back((slot, pfn));
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
        let Some(index) = number.checked_sub(self.first) else { return Ok(None) };
        let Some(entry) = self.numbers.get_mut(index as usize).filter(|entry| entry.0 != SETTLED) else {
            return Ok(None);
        };
        let (slot, pfn) = *entry;
        entry.0 = SETTLED;
        self.by_pfn.remove(&pfn);
        while self.numbers.front().is_some_and(|entry| entry.0 == SETTLED) {
            self.numbers.pop_front();
            self.first += 1;
        }
        Ok(Some(Retained { pfn, slot }))
    }

    /// Gives a slot back.
    pub fn release(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// The oldest outstanding number.
    pub fn oldest(&self) -> Option<u64> {
        (!self.numbers.is_empty()).then_some(self.first)
    }

    /// Lets go of the arena; nothing may be outstanding, and nothing is retained from now on.
    pub fn close(&mut self) {
        if self.by_pfn.is_empty() {
            (self.chunks, self.free) = (Vec::new(), Vec::new());
            (self.taken, self.capacity) = (0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(window.oldest(), Some(b));
        assert!(window.take(b).unwrap().is_some());
        assert_eq!((window.oldest(), window.outstanding()), (None, 0));
    }
}
