//! Pages that were written after the domain was suspended, which a debug migration has to tell from pages that went wrong.
//!
//! A suspended domain writes nothing, but others write to its memory. netback copies a packet that arrives into a buffer that the
//! guest has left in its ring; blkback writes the answer to a request that was under way into the ring, and the data before; Xen
//! marks an event in the guest's event words and in `vcpu_info`. Such a page has been sent before, and VERIFY then sends what is in
//! it now. Nothing is lost by it: at the target a frontend begins anew with empty rings and event channels, and asks again for what it
//! had asked for. libxenguest's comparison counts such a page all the same, with the stock helper too.
//!
//! Not every such write is in a log (Xen's own and those through a mapped grant are not), but the source's filter sees every byte that
//! libxenguest sends: a page is one of these exactly if the bytes that VERIFY brings are not those that were sent last. The source says
//! which they are in a record of its own. Any other page that differs at the target is there other than libxenguest sent it:
//! that is what a filter must never do, whatever the hints were, and it ends the migration.

use std::collections::HashMap;

use super::error::StreamProblem;
use super::memory_record::{MAGIC, VERSION};
use super::xen_stream::{MAX_PFN, PAGE, PageData, has_data, u32_at, u64_at};

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
    /// These PFNs, in any order.
    pub fn new(mut pfns: Vec<u64>) -> Self {
        pfns.sort_unstable();
        pfns.dedup();
        let mut writes = Self::default();
        pfns.into_iter().for_each(|pfn| writes.push_run(pfn, 1));
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

/// PFNs in one piece of [`LastSent`].
const PIECE: u64 = 4096;

/// What was sent last for each PFN: 4 bytes of a hash each, so 1 GiB for a guest of 1 TiB. That is enough, for the error is on the safe
/// side: of the pages that were written late one in 4 thousand million is not noticed, and counts as different.
#[derive(Debug, Default)]
pub struct LastSent {
    /// By the number of the piece; 0 is a page that was never sent.
    pieces: HashMap<u64, Box<[u32]>>,
    late: Vec<u64>,
}

impl LastSent {
    /// Notes the pages of a record; after VERIFY, compares them with what was noted. A page that was never sent is not written late.
    pub fn see(&mut self, pages: &PageData<'_>, verify: bool) {
        let mut data = pages.data.chunks_exact(PAGE);
        for entry in pages.entries() {
            let now = if has_data(entry.page_type) { data.next().map_or(0, mark) } else { 0 };
            let piece = self
                .pieces
                .entry(entry.pfn / PIECE)
                .or_insert_with(|| vec![0; PIECE as usize].into_boxed_slice());
            let Some(last) = piece.get_mut((entry.pfn % PIECE) as usize) else { continue };
            if !verify {
                *last = now;
            } else if *last != now && *last != 0 && self.late.len() < MAX_ALL {
                self.late.push(entry.pfn);
            }
        }
    }

    /// The pages that VERIFY brought other than they were sent last.
    pub fn into_late_writes(self) -> LateWrites {
        LateWrites::new(self.late)
    }
}

/// Four bytes of a page's hash, never 0.
fn mark(page: &[u8]) -> u32 {
    u32_at(blake3::hash(page).as_bytes(), 0).unwrap_or(0).max(1)
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
    fn pfns_become_runs() {
        let writes = LateWrites::new(vec![39, 9, 16, 10, 15, 9]);
        assert_eq!(writes.runs, [(9, 2), (15, 2), (39, 1)]);
        assert_eq!(writes.len(), 5);
        assert!(back(&LateWrites::default()).is_empty());
    }

    #[test]
    fn more_than_one_record_holds_takes_several() {
        let writes = LateWrites::new((0..12_000).map(|i| 2 * i).collect());
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
        fn what_went_in_is_in_the_runs(pfns in proptest::collection::vec(0_u64..300, 0..200)) {
            let writes = back(&LateWrites::new(pfns.clone()));
            for pfn in 0..301 {
                prop_assert_eq!(writes.contains(pfn), pfns.contains(&pfn));
            }
        }

        #[test]
        fn garbage_never_panics(body in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = LateWrites::default().add(&body);
        }
    }
}
