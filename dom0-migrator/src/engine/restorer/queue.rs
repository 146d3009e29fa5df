//! References that wait to be read, and which of them one read takes.
//!
//! The one that has waited longest goes first, since its page is needed first and its slot in the source's window is taken for longest.
//! With it go its neighbours on the disk, before and behind, as many as one read of bounded length covers: a pool's pages come in no
//! order, so the more is waiting, the longer the reads become.
//!
//! References whose places and numbers follow each other, as those of a pool's frame mostly do, wait together: a [`Run`], so that there are few of which
//! the places are kept in order. One of which most were taken out again is parted into what is left of it: whatever a source resends, memory is that of what
//! waits.

use std::collections::BTreeMap;

use super::super::numbered::Numbered;
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

/// References that lie behind each other on the disk, and have numbers that follow each other.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: Key,
    pages: usize,
    /// Of them: those that were not taken out again.
    left: usize,
}

impl Run {
    fn of(first: Key) -> Self {
        Self { first, pages: 1, left: 1 }
    }

    fn end(&self) -> u64 {
        self.first.offset + (self.pages * PAGE) as u64
    }

    /// The places of its references, taken out or not.
    fn keys(self) -> impl Iterator<Item = Key> {
        let Key { disk, offset, number } = self.first;
        (0..self.pages as u64).map(move |index| Key {
            disk,
            offset: offset + index * PAGE as u64,
            number: number + index,
        })
    }

    /// Takes the reference in if it continues the run.
    fn try_extend(&mut self, key: Key, longest: usize) -> bool {
        let numbers_follow = key.number == self.first.number + self.pages as u64;
        let continues = key.disk == self.first.disk && key.offset == self.end() && numbers_follow;
        let joins = continues && self.pages < longest;
        self.pages += usize::from(joins);
        self.left += usize::from(joins);
        joins
    }

    /// Whether its length says much more than what is left of it.
    fn is_thin(&self) -> bool {
        self.left * THIN <= self.pages
    }
}

/// A run is parted once no more than one in so many of its references is left.
const THIN: usize = 4;

/// All that wait, by number and by place.
#[derive(Debug, Default)]
pub(super) struct Queue {
    wanted: Numbered<Wanted>,
    /// Their runs, by the number of the first reference.
    by_number: BTreeMap<u64, Run>,
    /// By its first reference; with its length in pages.
    by_place: BTreeMap<Key, usize>,
    /// The runs that a read takes.
    taken: Vec<Run>,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.by_number.is_empty()
    }

    /// Adds references, whose numbers ascend, in runs that are no longer than a read.
    pub(super) fn extend(&mut self, references: impl Iterator<Item = (Key, Wanted)>, bounds: Bounds) {
        let longest = (bounds.read_bytes as usize / PAGE).clamp(1, MAX_BATCH);
        let mut run: Option<Run> = None;
        for (key, wanted) in references {
            self.wanted.push(key.number, wanted);
            if !run.as_mut().is_some_and(|run| run.try_extend(key, longest)) {
                run.replace(Run::of(key)).into_iter().for_each(|run| self.push(run));
            }
        }
        run.into_iter().for_each(|run| self.push(run));
    }

    fn push(&mut self, run: Run) {
        self.by_place.insert(run.first, run.pages);
        self.by_number.insert(run.first.number, run);
    }

    pub(super) fn remove(&mut self, key: &Key) -> Option<Wanted> {
        let wanted = self.wanted.take(key.number)?;
        if let Some((_, run)) = self.by_number.range_mut(..=key.number).next_back() {
            run.left -= 1;
            if run.is_thin() {
                let run = *run;
                self.part(run);
            }
        }
        Some(wanted)
    }

    /// Makes shorter runs of what is left of one.
    fn part(&mut self, run: Run) {
        self.by_place.remove(&run.first);
        self.by_number.remove(&run.first.number);
        let mut part: Option<Run> = None;
        for key in run.keys() {
            let is_left = self.wanted.get(key.number).is_some();
            if is_left && !part.as_mut().is_some_and(|part| part.try_extend(key, run.pages)) {
                part.replace(Run::of(key)).into_iter().for_each(|part| self.push(part));
            }
        }
        part.into_iter().for_each(|part| self.push(part));
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Takes what the next read covers.
    pub(super) fn next_job(&mut self, bounds: Bounds) -> Option<Job> {
        let (_, oldest) = self.by_number.pop_first()?;
        let Key { disk, offset, .. } = oldest.first;
        let (mut start, mut end) = (offset, oldest.end());
        let mut pages = oldest.pages;
        let mut taken = std::mem::take(&mut self.taken);
        // Half of the read at most before it, so that what follows the oldest finds room as well.
        for (key, &length) in self.by_place.range(..oldest.first).rev() {
            let near = key.disk == disk && key.offset + (length * PAGE) as u64 + bounds.gap_bytes >= start;
            if !near || end - key.offset > bounds.read_bytes / 2 || pages + length > MAX_BATCH / 2 {
                break;
            }
            (start, end) = (start.min(key.offset), end.max(key.offset + (length * PAGE) as u64));
            pages += length;
            taken.push(Run { first: *key, pages: length, left: 0 });
        }
        // In the order of the disk.
        taken.reverse();
        taken.push(oldest);
        for (key, &length) in self.by_place.range(oldest.first..).skip(1) {
            let its_end = key.offset + (length * PAGE) as u64;
            let near = key.disk == disk && key.offset <= end + bounds.gap_bytes;
            if !near || its_end.max(end) - start > bounds.read_bytes || pages + length > MAX_BATCH {
                break;
            }
            end = end.max(its_end);
            pages += length;
            taken.push(Run { first: *key, pages: length, left: 0 });
        }
        let mut wanted = Vec::with_capacity(pages);
        for run in taken.drain(..) {
            self.by_place.remove(&run.first);
            self.by_number.remove(&run.first.number);
            for key in run.keys() {
                wanted.extend(self.wanted.take(key.number).map(|wanted| (key, wanted)));
            }
        }
        self.taken = taken;
        // Runs may overlap.
        if !wanted.is_sorted_by(|(a, _), (b, _)| a <= b) {
            wanted.sort_unstable_by_key(|(key, _)| *key);
        }
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
        let references = places.iter().zip(0_u64..).map(|(&(disk, offset), number)| {
            (Key { disk, offset, number }, Wanted { pfn: number, hash: [0; 16] })
        });
        queue.extend(references, BOUNDS);
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
    fn what_lies_behind_each_other_waits_together() {
        let places: Vec<_> = (0..40).map(|page| (0, page * PAGE as u64)).collect();
        let mut queue = queue(&places);
        // A read has 16 pages at most.
        assert_eq!(queue.by_number.keys().copied().collect::<Vec<_>>(), [0, 16, 32]);
        for number in 0..16 {
            let key = Key { disk: 0, offset: number * PAGE as u64, number };
            assert!(queue.remove(&key).is_some() && queue.remove(&key).is_none());
        }
        let taken: Vec<_> = std::iter::from_fn(|| queue.next_job(BOUNDS)).map(|job| numbers(&job)).collect();
        assert_eq!(taken, [(16..32).collect::<Vec<_>>(), (32..40).collect()]);
    }

    /// References between which one was refused, or that are of two disks, keep their own numbers and disks though their places follow each other.
    #[test]
    fn what_has_a_gap_in_its_numbers_waits_apart() {
        let page = |page: u64| page * PAGE as u64;
        let keys = [(0, 0, 10), (0, 1, 12), (0, 2, 13), (1, 3, 14)].map(|(disk, place, number)| Key {
            disk,
            offset: page(place),
            number,
        });
        let waiting = || {
            let mut queue = Queue::default();
            let references = keys.into_iter().map(|key| (key, Wanted { pfn: key.number, hash: [0; 16] }));
            queue.extend(references, BOUNDS);
            queue
        };
        let mut queue = waiting();
        let taken: Vec<_> = std::iter::from_fn(|| queue.next_job(BOUNDS)).collect();
        let found: Vec<_> =
            taken.iter().flat_map(|job| &job.wanted).map(|(key, it)| (*key, it.pfn)).collect();
        assert_eq!(found, keys.map(|key| (key, key.number)));
        assert_eq!(taken.len(), 2);
        let mut queue = waiting();
        for key in keys {
            assert!(queue.remove(&Key { number: 11, ..key }).is_none());
            assert_eq!(queue.remove(&key).map(|wanted| wanted.pfn), Some(key.number));
        }
        assert!(queue.is_empty() && queue.by_place.is_empty());
    }

    /// A source that replaces its references faster than disks are read takes no memory by it.
    #[test]
    fn what_is_replaced_over_and_over_takes_no_memory() {
        let mut queue = Queue::default();
        let wanted = Wanted { pfn: 7, hash: [0; 16] };
        for number in 0..100_000 {
            let key = Key { disk: 0, offset: 0, number };
            queue.extend(std::iter::once((key, wanted)), BOUNDS);
            assert!(number >= 99_990 || queue.remove(&key).is_some());
        }
        assert_eq!((queue.by_number.len(), queue.by_place.len(), queue.wanted.len()), (10, 10, 10));
    }

    impl Queue {
        /// References of all runs, taken out or not.
        fn pages(&self) -> usize {
            self.by_number.values().map(|run| run.pages).sum()
        }

        fn left(&self) -> usize {
            self.by_number.values().map(|run| run.left).sum()
        }
    }

    /// A source that resends all but one reference of each run: memory is that of those that are left.
    #[test]
    fn what_is_left_of_long_runs_takes_little_memory() {
        let bounds = Bounds { read_bytes: 1 << 20, gap_bytes: 0 };
        let longest = bounds.read_bytes / PAGE as u64;
        for left in [0, 100, longest - 1] {
            let mut queue = Queue::default();
            for run in 0..200 {
                let key = |number: u64| Key { disk: 0, offset: number * PAGE as u64, number };
                let numbers = run * longest..(run + 1) * longest;
                let wanted =
                    numbers.clone().map(|number| (key(number), Wanted { pfn: number, hash: [0; 16] }));
                queue.extend(wanted, bounds);
                for number in numbers.filter(|number| number % longest != left) {
                    assert_eq!(queue.remove(&key(number)).unwrap().pfn, number);
                }
            }
            assert_eq!((queue.left(), queue.by_number.len(), queue.by_place.len()), (200, 200, 200));
            assert!(queue.pages() <= 200 * THIN, "{}", queue.pages());
            // 51,200 were put in.
            assert!(queue.wanted.places() < 10_000, "{}", queue.wanted.places());
            // Places of the long runs that they were are near each other no more.
            let jobs = std::iter::from_fn(|| queue.next_job(bounds));
            let numbers: Vec<u64> = jobs.flat_map(|job| numbers(&job)).collect();
            assert_eq!(numbers, (0..200).map(|run| run * longest + left).collect::<Vec<_>>());
        }
    }

    proptest! {
        #[test]
        fn every_reference_is_taken_once_and_reads_keep_their_bounds(
            runs in proptest::collection::vec((0_u8..2, (0_u64..4000).prop_map(|sector| sector * 512), 1_u64..20), 0..60),
            cancelled in proptest::collection::vec(any::<proptest::sample::Index>(), 0..300),
        ) {
            let places: Vec<_> = runs
                .iter()
                .flat_map(|&(disk, offset, pages)| (0..pages).map(move |page| (disk, offset + page * PAGE as u64)))
                .collect();
            let mut queue = queue(&places);
            let mut left: std::collections::BTreeSet<u64> = (0..places.len() as u64).collect();
            for index in cancelled.iter().filter(|_| !places.is_empty()) {
                let number = index.index(places.len());
                let (disk, offset) = places[number];
                let was_there = queue.remove(&Key { disk, offset, number: number as u64 }).is_some();
                prop_assert_eq!(was_there, left.remove(&(number as u64)));
                prop_assert!(queue.left() == left.len() && queue.pages() <= left.len() * THIN);
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
