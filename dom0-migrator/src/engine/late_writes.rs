//! Pages that may have been written after the domain was suspended, which a debug migration has to tell from pages that went wrong.
//!
//! A suspended domain writes nothing, but the backends of its devices go on. Such a page has been sent before, and VERIFY then sends
//! what is in it now. Nothing is lost by it, since a frontend begins anew at the target, with empty rings, and asks again for what it
//! had asked for; libxenguest's comparison counts it all the same, with the stock helper too. There are two ways to write, and the
//! source names in a record of its own what either may have changed:
//!
//! * by grant copy, as netback does with a packet that arrives: Xen logs the page like any other write, and nobody has read that
//!   log since the last pass, so what is in it when VERIFY is through are exactly these;
//! * through a mapping of a granted frame, as with the rings themselves (blkback writes an answer into one when an I/O ends): Xen
//!   does not see the single write, but its grant table says which frames are mapped for writing.

use super::error::StreamProblem;
use super::memory_record::{MAGIC, VERSION};
use super::xen_stream::{MAX_PFN, u32_at, u64_at};

/// Kind of the record.
pub const KIND: u16 = 3;
/// Bytes before the runs.
const HEAD: usize = 16;
/// Bytes of a run.
const RUN: usize = 16;
/// Runs in one record at most.
const MAX_RUNS: usize = 4096;
/// Runs in all records of a stream at most: what all rings of a domain can hold is far less.
const MAX_ALL: usize = 1 << 18;
/// Longest body.
pub const MAX_BODY: usize = HEAD + MAX_RUNS * RUN;

/// PFNs of such pages, as runs that ascend and do not touch each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LateWrites {
    runs: Vec<(u64, u64)>,
}

impl LateWrites {
    /// The PFNs whose bits are set: PFN `n` is bit `n % 8` of byte `n / 8`.
    pub fn from_bitmap(bitmap: &[u8]) -> Self {
        let mut writes = Self::default();
        for (at, &byte) in bitmap.iter().enumerate().filter(|&(_, &byte)| byte != 0) {
            for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                writes.push_run(at as u64 * 8 + bit, 1);
            }
        }
        writes
    }

    /// How many PFNs there are.
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|(_, count)| count).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether the PFN is among them.
    pub fn contains(&self, pfn: u64) -> bool {
        let after = self.runs.partition_point(|&(first, _)| first <= pfn);
        after
            .checked_sub(1)
            .and_then(|at| self.runs.get(at))
            .is_some_and(|(first, count)| pfn - first < *count)
    }

    fn push_run(&mut self, first: u64, count: u64) {
        match self.runs.last_mut() {
            Some((last, length)) if *last + *length == first => *length += count,
            _ => self.runs.push((first, count)),
        }
    }

    /// The bodies of the records that say all this; none when there is nothing to say. What is beyond the limit of runs is left
    /// out: the comparison then counts it.
    ///
    /// ```text
    ///      0     1     2     3     4     5     6     7 octet
    ///     +-----------------------+-----------+-----------+
    ///   0 | magic "PsMe"          | kind (3)  | version   |
    ///     +-----------------------+-----------+-----------+
    ///   8 | runs                  | 0                     |
    ///     +-----------------------+-----------------------+
    ///  16 | first PFN             | count                 |  each run 16 octets, ascending
    ///     +-----------------------------------------------+
    /// ```
    pub fn bodies(&self) -> impl Iterator<Item = Vec<u8>> {
        self.runs.get(..self.runs.len().min(MAX_ALL)).unwrap_or_default().chunks(MAX_RUNS).map(|runs| {
            let mut body = Vec::with_capacity(HEAD + RUN * runs.len());
            body.extend_from_slice(&MAGIC.to_le_bytes());
            body.extend_from_slice(&KIND.to_le_bytes());
            body.extend_from_slice(&VERSION.to_le_bytes());
            body.extend_from_slice(&(runs.len() as u32).to_le_bytes());
            body.extend_from_slice(&[0; 4]);
            for (first, count) in runs {
                body.extend_from_slice(&first.to_le_bytes());
                body.extend_from_slice(&count.to_le_bytes());
            }
            body
        })
    }

    /// Adds what a record's body says.
    ///
    /// # Errors
    /// [`StreamProblem`] when it is malformed, does not ascend, or there are more runs than can be.
    pub fn add(&mut self, body: &[u8]) -> Result<(), StreamProblem> {
        let count = u32_at(body, 8).unwrap_or(0);
        if count as usize > MAX_RUNS || self.runs.len() + count as usize > MAX_ALL {
            return Err(StreamProblem::Count(count));
        }
        let expected = HEAD + count as usize * RUN;
        if body.len() != expected {
            return Err(StreamProblem::Length { length: body.len() as u64, expected: expected as u64 });
        }
        for run in body.get(HEAD..).unwrap_or_default().chunks_exact(RUN) {
            let (first, count) = (u64_at(run, 0).unwrap_or(0), u64_at(run, 8).unwrap_or(0));
            let ascends = self.runs.last().is_none_or(|(last, length)| last + length <= first);
            let ends = first.checked_add(count).is_some_and(|end| end <= MAX_PFN + 1);
            if !ascends || !ends || count == 0 {
                return Err(StreamProblem::Forbidden("pages written late must ascend and be within bounds"));
            }
            self.push_run(first, count);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn back(writes: &LateWrites) -> LateWrites {
        let mut back = LateWrites::default();
        for body in writes.bodies() {
            assert!(body.len() <= MAX_BODY);
            back.add(&body).unwrap();
        }
        back
    }

    #[test]
    fn bits_become_runs() {
        let writes = LateWrites::from_bitmap(&[0, 0b1000_0110, 0b0000_0001, 0, 0x80]);
        assert_eq!(writes.runs, [(9, 2), (15, 2), (39, 1)]);
        assert_eq!(writes.len(), 5);
        assert!(back(&LateWrites::default()).is_empty());
    }

    #[test]
    fn more_than_one_record_holds_takes_several() {
        let bitmap = vec![0b0101_0101; 3000];
        let writes = LateWrites::from_bitmap(&bitmap);
        assert_eq!((writes.len(), writes.bodies().count()), (12_000, 3));
        assert_eq!(back(&writes), writes);
    }

    #[test]
    fn runs_that_lie_are_refused() {
        let body = |runs: &[(u64, u64)]| LateWrites { runs: runs.to_vec() }.bodies().next().unwrap();
        for runs in [&[(5, 1), (5, 1)][..], &[(5, 0)], &[(u64::MAX, 2)], &[(MAX_PFN, 2)], &[(9, 1), (1, 1)]] {
            assert!(LateWrites::default().add(&body(runs)).is_err(), "{runs:?}");
        }
        let whole = body(&[(5, 1), (9, 2)]);
        for cut in 0..whole.len() {
            assert!(LateWrites::default().add(&whole[..cut]).is_err(), "{cut}");
        }
    }

    proptest! {
        #[test]
        fn what_is_in_the_bitmap_is_in_the_runs(bitmap in proptest::collection::vec(any::<u8>(), 0..200)) {
            let writes = back(&LateWrites::from_bitmap(&bitmap));
            for pfn in 0..bitmap.len() as u64 * 8 + 8 {
                let set = bitmap.get(pfn as usize / 8).is_some_and(|byte| byte & (1 << (pfn % 8)) != 0);
                prop_assert_eq!(writes.contains(pfn), set);
            }
        }

        #[test]
        fn garbage_never_panics(body in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = LateWrites::default().add(&body);
        }
    }
}
