//! How far a pass over all memory is, in pages that there are: the first one, and the one that compares all memory.
//!
//! libxenguest counts guest frame numbers, and those of a PVH guest have large holes: a guest of 640 MiB has numbers for almost 4 GiB.
//! A hole travels as one marker for many numbers, in next to no time; who counted it as pages would foretell a migration of many times
//! its length.

use std::sync::OnceLock;

use crate::engine::{SourceStats, Watch};

/// Counts the passes over all memory.
#[derive(Debug, Default)]
pub struct FirstPass(OnceLock<Counted>);

#[derive(Debug)]
struct Counted {
    /// Pages that the domain has.
    populated: u64,
    filter: Watch<SourceStats>,
}

impl FirstPass {
    /// Begins, with a domain that has so many pages (0 where that is not known), whose pages go through this filter.
    pub fn begin(&self, populated: u64, filter: Watch<SourceStats>) {
        // There is one migration in a helper's life.
        let _ = self.0.set(Counted { populated, filter });
    }

    /// Pages done and pages in all, where libxenguest says that so many numbers of so many are done in this pass (1 is the first).
    pub fn count(&self, round: u32, done: u64, total: u64) -> (u64, u64) {
        match self.0.get() {
            Some(counted) if round <= 1 => {
                counted_pages((done, total), counted.filter.look().pages_in, counted.populated)
            }
            // A later pass has no more numbers than there are pages, but for the one that compares all memory, whose numbers have the same holes.
            Some(counted) => {
                counted_pages((done, total), counted.filter.look().pages_verified, counted.populated)
            }
            None => (done, total),
        }
    }
}

/// Of `numbers` done and in all, the pages: those that came so far, of those that there are.
fn counted_pages((done, total): (u64, u64), came: u64, populated: u64) -> (u64, u64) {
    match populated {
        // Not known, or nothing is missing among the numbers.
        0 => (done, total),
        _ if populated >= total => (done, total),
        _ if done >= total => (populated, populated),
        _ => (came.min(populated), populated),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn holes_are_no_pages() {
        // A PVH guest of 640 MiB: its memory first, and a hole up to 4 GiB.
        let (populated, numbers) = (163_840, 1_044_480);
        assert_eq!(counted_pages((81_920, numbers), 81_920, populated), (81_920, populated));
        assert_eq!(counted_pages((500_000, numbers), populated, populated), (populated, populated));
        // More than was thought, and the last numbers of all, are the end.
        assert_eq!(counted_pages((500_000, numbers), populated + 9, populated), (populated, populated));
        assert_eq!(counted_pages((numbers, numbers), populated - 20, populated), (populated, populated));
        // A PV guest has as many numbers as pages.
        assert_eq!(counted_pages((5, 163_840), 4, 163_840), (5, 163_840));
        assert_eq!(counted_pages((5, 163_840), 4, 0), (5, 163_840));
    }

    #[test]
    fn later_passes_are_what_libxenguest_says() {
        let pass = FirstPass::default();
        assert_eq!(pass.count(1, 5, 1_044_480), (5, 1_044_480));
        pass.begin(163_840, Watch::default());
        assert_eq!(pass.count(1, 5, 1_044_480), (0, 163_840));
        assert_eq!(pass.count(2, 5, 70), (5, 70));
    }

    #[test]
    fn holes_are_no_pages_when_all_memory_is_compared() {
        let (pass, filter) = (FirstPass::default(), Arc::new(Mutex::new(SourceStats::default())));
        pass.begin(163_840, Watch(Arc::clone(&filter)));
        // The guest's pages have all been sent, and half of them a second time.
        *filter.lock().unwrap() =
            SourceStats { pages_in: 170_000, pages_verified: 81_920, ..SourceStats::default() };
        assert_eq!(pass.count(7, 500_000, 1_044_480), (81_920, 163_840));
        assert_eq!(pass.count(7, 1_044_480, 1_044_480), (163_840, 163_840));
    }
}
