//! References that wait to be read, and which of them one read takes.
//!
//! The one that has waited longest goes first, since its page is needed first and its slot in the source's window is taken for longest.
//! With it go its neighbours on the disk, before and behind, as many as one read of bounded length covers: a pool's pages come in no
//! order, so the more is waiting, the longer the reads become.

use std::collections::{BTreeMap, VecDeque};

use super::super::xen_stream::{MAX_BATCH, PAGE};
use super::{Key, Wanted};

/// One read.
#[derive(Clone, Debug, Default)]
pub(super) struct Job {
    /// What it is for, in the order of the disk.
    pub(super) wanted: Vec<(Key, Wanted)>,
}

/// Bounds of a read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Most bytes from the first reference's begin to the last one's end.
    pub(super) read_bytes: u64,
    /// Most bytes between two references that nobody wants.
    pub(super) gap_bytes: u64,
}

/// Of those that are no longer waiting, as many as this may stand in the order besides.
const SKIPPED_MAX: usize = 1024;

/// All that wait, by place and by number.
#[derive(Debug, Default)]
pub(super) struct Queue {
    by_place: BTreeMap<Key, Wanted>,
    /// In the order of their numbers; those that are no longer waiting are skipped when their turn comes.
    by_number: VecDeque<Key>,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.by_place.is_empty()
    }

    /// Adds one; numbers ascend from call to call. What is no longer waiting is forgotten when it is more than half, so that a source
    /// which replaces its references over and over, faster than disks are read, takes no memory by it.
    pub(super) fn push(&mut self, key: Key, wanted: Wanted) {
        if self.by_number.len() >= 2 * self.by_place.len() + SKIPPED_MAX {
            let Self { by_place, by_number } = self;
            by_number.retain(|key| by_place.contains_key(key));
        }
        self.by_number.push_back(key);
        self.by_place.insert(key, wanted);
    }

    pub(super) fn remove(&mut self, key: &Key) -> Option<Wanted> {
        self.by_place.remove(key)
    }

    pub(super) fn clear(&mut self) {
        self.by_place.clear();
        self.by_number.clear();
    }

    /// Takes what the next read covers.
    pub(super) fn next_job(&mut self, bounds: Bounds) -> Option<Job> {
        let oldest = loop {
            let key = self.by_number.pop_front()?;
            if self.by_place.contains_key(&key) {
                break key;
            }
        };
        let Key { disk, offset, .. } = oldest;
        let page = PAGE as u64;
        let (mut start, mut end) = (offset, offset + page);
        let mut taken = vec![oldest];
        // Half of the read at most before it, so that what follows the oldest finds room as well.
        for (key, _) in self.by_place.range(..oldest).rev() {
            let near = key.disk == disk && key.offset + page + bounds.gap_bytes >= start;
            if !near || end - key.offset > bounds.read_bytes / 2 || taken.len() >= MAX_BATCH / 2 {
                break;
            }
            start = start.min(key.offset);
            taken.push(*key);
        }
        taken.reverse();
        for (key, _) in self.by_place.range(oldest..).skip(1) {
            let near = key.disk == disk && key.offset <= end + bounds.gap_bytes;
            if !near || key.offset + page - start > bounds.read_bytes || taken.len() >= MAX_BATCH {
                break;
            }
            end = end.max(key.offset + page);
            taken.push(*key);
        }
        let wanted = taken.into_iter().filter_map(|key| Some((key, self.remove(&key)?))).collect();
        Some(Job { wanted })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: Bounds = Bounds { read_bytes: 64 << 10, gap_bytes: 8 << 10 };

    fn queue(places: &[(u8, u64)]) -> Queue {
        let mut queue = Queue::default();
        for (number, &(disk, offset)) in places.iter().enumerate() {
            let key = Key { disk, offset, number: number as u64 };
            queue.push(key, Wanted { pfn: number as u64, hash: [0; 16] });
        }
        queue
    }

    fn numbers(job: &Job) -> Vec<u64> {
        job.wanted.iter().map(|(key, _)| key.number).collect()
    }

    #[test]
    fn the_oldest_goes_first_and_takes_its_neighbours() {
        let page = PAGE as u64;
        let mut queue =
            queue(&[(0, 100 * page), (0, 5 * page), (1, 101 * page), (0, 99 * page), (0, 103 * page)]);
        assert_eq!(numbers(&queue.next_job(BOUNDS).unwrap()), [3, 0, 4]);
        assert_eq!(numbers(&queue.next_job(BOUNDS).unwrap()), [1]);
        assert_eq!(numbers(&queue.next_job(BOUNDS).unwrap()), [2]);
        assert!(queue.next_job(BOUNDS).is_none() && queue.is_empty());
    }

    #[test]
    fn what_is_replaced_over_and_over_takes_no_memory() {
        let mut queue = Queue::default();
        let wanted = Wanted { pfn: 7, hash: [0; 16] };
        for number in 0..100_000 {
            queue.push(Key { disk: 0, offset: 0, number }, wanted);
            if number < 99_990 {
                queue.remove(&Key { disk: 0, offset: 0, number });
            }
        }
        assert!(queue.by_number.len() <= SKIPPED_MAX + 20, "{}", queue.by_number.len());
        let job = queue.next_job(BOUNDS).unwrap();
        assert_eq!(numbers(&job), (99_990..100_000).collect::<Vec<_>>());
        assert!(queue.is_empty());
    }

    proptest! {
        #[test]
        fn every_reference_is_taken_once_and_reads_keep_their_bounds(
            places in proptest::collection::vec((0_u8..2, (0_u64..4000).prop_map(|sector| sector * 512)), 0..200),
            cancelled in proptest::collection::vec(any::<proptest::sample::Index>(), 0..10),
        ) {
            let mut queue = queue(&places);
            let mut left: std::collections::BTreeSet<u64> = (0..places.len() as u64).collect();
            for index in cancelled.iter().filter(|_| !places.is_empty()) {
                let number = index.index(places.len());
                let (disk, offset) = places[number];
                let was_there = queue.remove(&Key { disk, offset, number: number as u64 }).is_some();
                prop_assert_eq!(was_there, left.remove(&(number as u64)));
            }
            while let Some(job) = queue.next_job(BOUNDS) {
                let oldest = *left.first().unwrap();
                prop_assert!(numbers(&job).contains(&oldest));
                prop_assert!(job.wanted.is_sorted_by(|a, b| a.0 < b.0));
                let (first, last) = (job.wanted[0].0, job.wanted[job.wanted.len() - 1].0);
                prop_assert!(first.disk == last.disk && last.offset + PAGE as u64 - first.offset <= BOUNDS.read_bytes);
                for number in numbers(&job) {
                    prop_assert!(left.remove(&number));
                }
            }
            prop_assert!(left.is_empty() && queue.is_empty());
        }
    }
}
