//! Following the lists through guest memory: root, chain of index pages, leaves.
//!
//! The guest may write to all of them at any time, and may mean harm. So every page is copied before it is looked at; the chain
//! is followed no further than the root's own count, and than the domain's memory is large, so that a circle ends; a run is
//! taken only if it lies in the domain's memory. What was read belongs to one generation, or is read again.

use std::io;

use enlightenment::list::{ListError, RootView, Slot, parse_index, parse_leaf, parse_root};
use enlightenment::{Generation, Pfn};

use super::memory::GuestMemory;
use crate::engine::ReferenceMap;

/// Times that the reading begins anew when the guest publishes meanwhile.
const RETRIES: u32 = 3;

/// Why the lists were given up.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// The hypervisor mapped nothing.
    #[error("cannot map the guest's list pages: {0}")]
    Map(#[from] io::Error),
    /// A page is not there.
    #[error("the guest has no page at PFN {pfn:#x}, where the {what} should be")]
    Absent {
        /// What should be there.
        what: &'static str,
        /// Its PFN.
        pfn: u64,
    },
    /// A page is not what it should be.
    #[error("the {what} at PFN {pfn:#x}: {source}")]
    Page {
        /// What it should be.
        what: &'static str,
        /// Its PFN.
        pfn: u64,
        /// What is wrong.
        source: ListError,
    },
    /// Nothing is published.
    #[error("the guest has published nothing")]
    Nothing,
    /// The guest claims more than fits into its memory.
    #[error("the guest claims {leaves} list pages in a memory of {pages} pages")]
    TooLarge {
        /// Leaves claimed.
        leaves: u64,
        /// Pages that it has.
        pages: u64,
    },
    /// The chain ends too early or too late.
    #[error("the chain of index pages does not have the {expected} pages that the root page names")]
    Chain {
        /// Pages that it should have.
        expected: u32,
    },
    /// The guest published again and again.
    #[error("the guest's lists changed while they were read, {RETRIES} times in a row")]
    Restless,
}

/// What a walk found.
#[derive(Debug)]
pub struct Walked {
    /// Where pages lie.
    pub map: ReferenceMap,
    /// The generation, as the root page describes it.
    pub slot: Slot,
    /// Frames of the pool.
    pub pool_frames: u64,
    /// Clean ones.
    pub pool_frames_clean: u64,
    /// Runs that were read.
    pub runs: u64,
    /// Of these: refused.
    pub runs_refused: u64,
    /// Leaves that could not be mapped.
    pub unreadable: u64,
    /// Times that the reading began anew.
    pub retries: u32,
}

/// Reads the lists whose root page is at `root`.
///
/// # Errors
/// [`WalkError`].
pub fn walk(memory: &mut impl GuestMemory, root: Pfn) -> Result<Walked, WalkError> {
    for retries in 0..=RETRIES {
        let before = read_root(memory, root)?;
        let slot = before.active.ok_or(WalkError::Nothing)?;
        let read = read_generation(memory, &slot);
        let after = read_root(memory, root)?;
        // The pages of a generation are kept until the next but one is begun.
        let kept = after.instance == before.instance
            && after.active.is_some_and(|now| now.generation.wrapping_sub(slot.generation) <= 1);
        match read {
            Ok(mut walked) if kept => {
                walked.map.seal();
                return Ok(Walked {
                    pool_frames: before.pool_frames,
                    pool_frames_clean: before.pool_frames_clean,
                    retries,
                    ..walked
                });
            }
            Err(error) if kept => return Err(error),
            _ => {}
        }
    }
    Err(WalkError::Restless)
}

fn read_root(memory: &mut impl GuestMemory, root: Pfn) -> Result<RootView, WalkError> {
    let page = one_page(memory, "root page", root)?;
    parse_root(&page).map_err(|source| WalkError::Page { what: "root page", pfn: root.0, source })
}

fn one_page(memory: &mut impl GuestMemory, what: &'static str, pfn: Pfn) -> Result<Box<[u8]>, WalkError> {
    let absent = || WalkError::Absent { what, pfn: pfn.0 };
    memory.pages(&[pfn])?.into_iter().next().flatten().ok_or_else(absent)
}

fn read_generation(memory: &mut impl GuestMemory, slot: &Slot) -> Result<Walked, WalkError> {
    let pages = memory.last_pfn().0.saturating_add(1);
    if slot.leaf_pages.saturating_add(u64::from(slot.index_pages)) > pages {
        return Err(WalkError::TooLarge { leaves: slot.leaf_pages, pages });
    }
    let generation = Generation(slot.generation);
    let chain = WalkError::Chain { expected: slot.index_pages };
    let mut walked = Walked {
        map: ReferenceMap::new(memory.last_pfn()),
        slot: *slot,
        pool_frames: 0,
        pool_frames_clean: 0,
        runs: 0,
        runs_refused: 0,
        unreadable: 0,
        retries: 0,
    };
    let mut next = (slot.index_pages > 0).then_some(Pfn(slot.first_index_pfn));
    let mut leaves_left = slot.leaf_pages;
    for _ in 0..slot.index_pages {
        let Some(pfn) = next else { return Err(chain) };
        let page = one_page(memory, "index page", pfn)?;
        let index = parse_index(&page, generation).map_err(|source| WalkError::Page {
            what: "index page",
            pfn: pfn.0,
            source,
        })?;
        next = index.next;
        let leaves: Vec<Pfn> = index.leaves().collect();
        leaves_left = leaves_left
            .checked_sub(leaves.len() as u64)
            .ok_or(WalkError::Chain { expected: slot.index_pages })?;
        read_leaves(memory, &leaves, generation, &mut walked)?;
    }
    if next.is_some() || leaves_left > 0 { Err(chain) } else { Ok(walked) }
}

fn read_leaves(
    memory: &mut impl GuestMemory,
    leaves: &[Pfn],
    generation: Generation,
    walked: &mut Walked,
) -> Result<(), WalkError> {
    for (pfn, page) in leaves.iter().zip(memory.pages(leaves)?) {
        let Some(page) = page else {
            walked.unreadable += 1;
            continue;
        };
        let runs = parse_leaf(&page, generation).map_err(|source| WalkError::Page {
            what: "leaf page",
            pfn: pfn.0,
            source,
        })?;
        for run in runs {
            walked.runs += 1;
            if !run.is_ok_and(|run| walked.map.insert_run(&run).is_ok()) {
                walked.runs_refused += 1;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use enlightenment::list::{INDEX_MAGIC, LEAF_MAGIC, NO_PFN, ROOT_MAGIC};
    use enlightenment::{ABI_VERSION, ListKind, PAGE_SIZE, Run, Vdev};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const LAST: Pfn = Pfn(9_999);

    type Pages = BTreeMap<u64, Box<[u8]>>;
    type Change = fn(&mut Pages);

    /// A guest of 10,000 pages, those that are written to among them.
    #[derive(Clone, Default)]
    struct Fake {
        pages: Pages,
        reads: u64,
        /// Done after this many reads of pages.
        later: Option<(u64, Change)>,
    }

    impl GuestMemory for Fake {
        fn last_pfn(&self) -> Pfn {
            LAST
        }
        fn pages(&mut self, pfns: &[Pfn]) -> io::Result<Vec<Option<Box<[u8]>>>> {
            self.reads += pfns.len() as u64;
            let found = pfns.iter().map(|pfn| self.pages.get(&pfn.0).cloned()).collect();
            if let Some((after, change)) = self.later
                && self.reads >= after
            {
                self.later = None;
                change(&mut self.pages);
            }
            Ok(found)
        }
    }

    fn put(page: &mut [u8], at: usize, value: u64) {
        page[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn put32(page: &mut [u8], at: usize, value: u32) {
        page[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn blank() -> Box<[u8]> {
        vec![0; PAGE_SIZE].into()
    }

    fn leaf(generation: u64, runs: &[Run]) -> Box<[u8]> {
        let mut page = blank();
        put32(&mut page, 0, LEAF_MAGIC);
        put32(&mut page, 4, runs.len() as u32);
        put(&mut page, 8, generation);
        for (i, run) in runs.iter().enumerate() {
            page[16 + 24 * i..][..24].copy_from_slice(&run.to_bytes());
        }
        page
    }

    fn index(generation: u64, next: u64, leaves: &[u64]) -> Box<[u8]> {
        let mut page = blank();
        put32(&mut page, 0, INDEX_MAGIC);
        put32(&mut page, 4, leaves.len() as u32);
        put(&mut page, 8, generation);
        put(&mut page, 16, next);
        for (i, leaf) in leaves.iter().enumerate() {
            put(&mut page, 24 + 8 * i, *leaf);
        }
        page
    }

    fn root(generation: u64, index_pages: u32, leaf_pages: u64, runs: u64) -> Box<[u8]> {
        let mut page = blank();
        put(&mut page, 0, ROOT_MAGIC);
        put32(&mut page, 8, ABI_VERSION);
        put32(&mut page, 12, PAGE_SIZE as u32);
        put(&mut page, 16, generation);
        put(&mut page, 24, 0x5eed);
        put(&mut page, 32, 7);
        put(&mut page, 40, 8);
        let slot = 64 + (generation & 1) as usize * 72;
        put(&mut page, slot, generation);
        put(&mut page, slot + 8, if index_pages == 0 { NO_PFN } else { 200 });
        put32(&mut page, slot + 16, index_pages);
        put(&mut page, slot + 24, leaf_pages);
        put(&mut page, slot + 32, runs);
        put(&mut page, slot + 56, 5);
        put(&mut page, slot + 64, 2);
        page
    }

    fn run(pfn: u64, pages: u16) -> Run {
        Run { pfn, disk_offset: pfn << 14, vdev: 51712, pages, list: ListKind::Read as u8, reserved: 0 }
    }

    /// Two index pages, three leaves.
    fn lists() -> Fake {
        let mut fake = Fake::default();
        let mut page = |pfn, page| fake.pages.insert(pfn, page);
        page(100, root(3, 2, 3, 4));
        page(200, index(3, 201, &[300, 301]));
        page(201, index(3, NO_PFN, &[302]));
        page(300, leaf(3, &[run(1000, 4), run(2000, 4)]));
        page(301, leaf(3, &[run(3000, 1)]));
        page(302, leaf(3, &[run(4000, 4)]));
        fake
    }

    #[test]
    fn well_made_lists_are_read() {
        let walked = walk(&mut lists(), Pfn(100)).unwrap();
        assert_eq!((walked.runs, walked.runs_refused, walked.map.len()), (4, 0, 13));
        let place = walked.map.lookup(Pfn(4001)).unwrap();
        assert_eq!(
            (walked.map.vdevs()[usize::from(place.disk)], place.offset),
            (Vdev(51712), (4000 << 14) + 4096)
        );
        assert_eq!((walked.slot.generation, walked.slot.frames_read, walked.slot.frames_written), (3, 5, 2));
        assert_eq!((walked.pool_frames_clean, walked.pool_frames), (7, 8));
    }

    #[test]
    fn a_circle_ends() {
        let mut fake = lists();
        fake.pages.insert(201, index(3, 200, &[302]));
        assert!(matches!(walk(&mut fake, Pfn(100)), Err(WalkError::Chain { expected: 2 })));
        assert!(fake.reads < 20);
        // Of pages that name no leaf, so that these never become too many.
        let mut fake = lists();
        fake.pages.insert(100, root(3, 2, 2, 3));
        fake.pages.insert(201, index(3, 201, &[]));
        assert!(matches!(walk(&mut fake, Pfn(100)), Err(WalkError::Chain { expected: 2 })));
        assert!(fake.reads < 20);
    }

    #[test]
    fn a_chain_that_claims_too_much_ends() {
        let mut fake = lists();
        fake.pages.insert(100, root(3, u32::MAX, 9_000, 4));
        assert!(matches!(walk(&mut fake, Pfn(100)), Err(WalkError::TooLarge { .. })));
        fake.pages.insert(100, root(3, 2, 2, 4));
        assert!(matches!(walk(&mut fake, Pfn(100)), Err(WalkError::Chain { .. })));
    }

    #[test]
    fn a_generation_that_follows_is_read_instead() {
        fn publish_two_more(pages: &mut Pages) {
            pages.insert(100, root(5, 1, 1, 1));
            pages.insert(200, index(5, NO_PFN, &[300]));
            pages.insert(300, leaf(5, &[run(7000, 2)]));
        }
        let mut fake = lists();
        fake.later = Some((3, publish_two_more));
        let walked = walk(&mut fake, Pfn(100)).unwrap();
        assert_eq!((walked.slot.generation, walked.map.len(), walked.retries), (5, 2, 1));
    }

    /// A guest that publishes whenever it is looked at.
    #[test]
    fn a_guest_that_never_rests_is_given_up() {
        struct Restless {
            generation: u64,
            roots: u32,
        }
        impl GuestMemory for Restless {
            fn last_pfn(&self) -> Pfn {
                LAST
            }
            fn pages(&mut self, pfns: &[Pfn]) -> io::Result<Vec<Option<Box<[u8]>>>> {
                assert!(self.roots < 100, "the reading never ends");
                if pfns.contains(&Pfn(100)) {
                    self.roots += 1;
                    self.generation += 2;
                }
                Ok(pfns.iter().map(|_| Some(root(self.generation, 0, 0, 0))).collect())
            }
        }
        let mut restless = Restless { generation: 1, roots: 0 };
        assert!(matches!(walk(&mut restless, Pfn(100)), Err(WalkError::Restless)));
        assert_eq!(restless.roots, 2 * (RETRIES + 1));
    }

    #[test]
    fn lists_of_another_abi_or_page_size_are_none() {
        for (at, value) in [(8, ABI_VERSION + 1), (8, 0), (12, 2 * PAGE_SIZE as u32)] {
            let mut fake = lists();
            put32(fake.pages.get_mut(&100).unwrap(), at, value);
            let walked = walk(&mut fake, Pfn(100));
            assert!(matches!(walked, Err(WalkError::Page { what: "root page", pfn: 100, .. })), "{walked:?}");
            assert_eq!(fake.reads, 1);
        }
    }

    #[test]
    fn a_page_of_another_generation_is_no_list() {
        let mut fake = lists();
        fake.pages.insert(301, leaf(1, &[run(3000, 1)]));
        assert!(matches!(
            walk(&mut fake, Pfn(100)),
            Err(WalkError::Page { what: "leaf page", pfn: 301, .. })
        ));
    }

    #[test]
    fn an_absent_leaf_costs_only_itself() {
        let mut fake = lists();
        fake.pages.remove(&301);
        let walked = walk(&mut fake, Pfn(100)).unwrap();
        assert_eq!((walked.unreadable, walked.map.len()), (1, 12));
    }

    #[test]
    fn runs_beyond_memory_are_refused() {
        let mut fake = lists();
        fake.pages.insert(301, leaf(3, &[run(LAST.0, 2), Run { list: 9, ..run(1, 1) }]));
        let walked = walk(&mut fake, Pfn(100)).unwrap();
        assert_eq!((walked.runs_refused, walked.map.len()), (2, 12));
    }

    proptest! {
        /// Whatever a guest writes into its list pages, reading ends, soon, and names no page beyond its memory.
        #[test]
        fn no_guest_can_do_harm(
            writes in proptest::collection::vec(
                (prop::sample::select(vec![100_u64, 200, 201, 300, 301, 302]), 0_usize..512, prop_oneof![
                    any::<u64>(), 0_u64..10_000, Just(NO_PFN), Just(3), Just(200), Just(201)
                ]),
                0..40,
            ),
            rooted in prop::sample::select(vec![100_u64, 200, 300, 5, u64::MAX]),
        ) {
            let mut fake = lists();
            for (pfn, word, value) in writes {
                put(fake.pages.get_mut(&pfn).unwrap(), word * 8, value);
            }
            if let Ok(walked) = walk(&mut fake, Pfn(rooted)) {
                prop_assert!(walked.map.lookup(Pfn(LAST.0 + 1)).is_none());
                prop_assert!(walked.map.len() <= LAST.0 + 1);
            }
            prop_assert!(fake.reads <= (RETRIES as u64 + 1) * (LAST.0 + 3));
        }
    }
}
