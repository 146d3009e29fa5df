//! Looking at some pages of a running domain: which are zero, which lie on a disk, and which are written to.

use std::io;
use std::time::Instant;

use enlightenment::Pfn;

use crate::engine::{Place, ReferenceMap};
use crate::inquiry::Digest;
use crate::lists::GuestMemory;

/// Pages that are mapped at once.
const TOGETHER: usize = 256;

/// A page that was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The page.
    pub pfn: Pfn,
    /// Its bytes.
    pub digest: Digest,
    /// Where the lists say that they lie.
    pub place: Option<Place>,
}

/// Pages that were looked at, as far as the domain has them.
#[derive(Clone, Debug)]
pub struct Look {
    /// When.
    pub at: Instant,
    /// What was seen.
    pub pages: Vec<Seen>,
}

/// So many page numbers, spread over all memory: one in each of as many equal parts, not always at the same place in it, since what
/// lies there comes in rows.
pub fn spread(last: Pfn, count: u64) -> Vec<Pfn> {
    let all = last.0.saturating_add(1);
    let count = count.clamp(1, all);
    let part = all / count;
    (0..count)
        .map(|index| {
            // Knuth's multiplicative hash: even, and the same each time.
            let within = (index.wrapping_mul(2_654_435_761) >> 7) % part;
            Pfn(index * part + within)
        })
        .collect()
}

/// Looks at pages.
///
/// # Errors
/// When none of some could be mapped.
pub fn look(memory: &mut impl GuestMemory, map: Option<&ReferenceMap>, pfns: &[Pfn]) -> io::Result<Look> {
    let mut pages = Vec::with_capacity(pfns.len());
    for some in pfns.chunks(TOGETHER) {
        let found = memory.pages(some)?;
        pages.extend(some.iter().zip(found).filter_map(|(&pfn, bytes)| {
            let digest = Digest::of(&bytes?);
            Some(Seen { pfn, digest, place: map.and_then(|map| map.lookup(pfn)) })
        }));
    }
    Ok(Look { at: Instant::now(), pages })
}

impl Look {
    /// Share of pages of which something is true.
    fn share(&self, is: impl Fn(&Seen) -> bool) -> f64 {
        let found = self.pages.iter().filter(|seen| is(seen)).count();
        if self.pages.is_empty() { 0.0 } else { found as f64 / self.pages.len() as f64 }
    }

    /// Share of zero pages that are in no list.
    pub fn zero(&self) -> f64 {
        let zeros = Digest::of_zeros();
        self.share(|seen| seen.digest == zeros && seen.place.is_none())
    }

    /// Share of all pages that changes in a second, as a later look shows it. A page that is written to all the time counts once.
    pub fn changes_per_second(&self, later: &Self) -> f64 {
        let seconds = later.at.saturating_duration_since(self.at).as_secs_f64();
        let now: std::collections::BTreeMap<Pfn, Digest> =
            later.pages.iter().map(|seen| (seen.pfn, seen.digest)).collect();
        let changed = self.share(|seen| now.get(&seen.pfn).is_some_and(|digest| *digest != seen.digest));
        if seconds > 0.0 { changed / seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use enlightenment::{ListKind, Run};
    use std::time::Duration;

    struct Memory(Vec<Option<Box<[u8]>>>);

    impl GuestMemory for Memory {
        fn last_pfn(&self) -> Pfn {
            Pfn(self.0.len() as u64 - 1)
        }
        fn pages(&mut self, pfns: &[Pfn]) -> io::Result<Vec<Option<Box<[u8]>>>> {
            Ok(pfns.iter().map(|pfn| self.0[pfn.0 as usize].clone()).collect())
        }
    }

    #[test]
    fn samples_are_spread_and_differ() {
        for (last, count) in [(0, 5), (9_999, 100), (1_000_003, 4096), (10, 11)] {
            let pfns = spread(Pfn(last), count);
            assert_eq!(pfns.len() as u64, count.min(last + 1));
            assert!(pfns.is_sorted_by(|a, b| a < b) && pfns.last().unwrap().0 <= last);
        }
    }

    #[test]
    fn zeros_lists_and_changes_are_seen() {
        let page = |byte: u8| Some(vec![byte; 4096].into());
        // A fourth is not there, a fourth zero, half of it is data.
        let mut memory = Memory((0..400).map(|i| [None, page(0), page(1), page(2)][i % 4].clone()).collect());
        let mut map = ReferenceMap::new(Pfn(399));
        let list = ListKind::Read as u8;
        map.insert_run(&Run { pfn: 2, disk_offset: 8192, vdev: 51712, pages: 1, list, reserved: 0 }).unwrap();
        map.seal();
        let all: Vec<Pfn> = (0..400).map(Pfn).collect();
        let first = look(&mut memory, Some(&map), &all).unwrap();
        assert_eq!(first.pages.len(), 300);
        assert!((first.zero() - 1.0 / 3.0).abs() < 1e-9);
        let listed: Vec<_> =
            first.pages.iter().filter_map(|seen| Some((seen.pfn.0, seen.place?.offset))).collect();
        assert_eq!(listed, [(2, 8192)]);
        for pfn in [2, 3, 6] {
            memory.0[pfn] = page(9);
        }
        let mut later = look(&mut memory, Some(&map), &all).unwrap();
        later.at = first.at + Duration::from_secs(2);
        assert!((first.changes_per_second(&later) - 0.005).abs() < 1e-9);
    }
}
