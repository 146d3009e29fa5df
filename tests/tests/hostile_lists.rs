//! The worst lists that a guest may publish, read as dom0 reads them: by the reader itself, from a made-up guest's memory that changes while
//! it is read. In a real guest's memory, during a migration, they are in the lab (`xtask/src/test/hostile_case.rs`).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::io;

use dom0_migrator::lists::{GuestMemory, WalkError, Walked, walk};
use enlightenment::{PAGE_SIZE, Pfn, Vdev};
use fastrand::Rng;
use fuzz::{Counting, Spent};
use proptest::prelude::*;
use tests::hostile::{Guest, Kind, Lists};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// `xvda`.
const VDEV: u32 = 51712;
/// What the reader may take beside what it takes for each page of the guest.
const BESIDE: u64 = 8 << 20;
/// Bytes for each page of the guest: 16 for its place, in a list that has grown by doubling (so up to 32, and the half of it before), then 4
/// for its order and 16 more for its place in order.
const EACH_PAGE: u64 = 16 + 32 + 4 + 32;

/// A guest of which dom0 reads pages, and which writes to them meanwhile.
struct Memory<'m> {
    lists: Lists<'m>,
    last: Pfn,
    reads: u64,
    /// Changes its lists at each so many-th reading; never for 0.
    busy: u64,
    calls: u64,
}

impl GuestMemory for Memory<'_> {
    fn last_pfn(&self) -> Pfn {
        self.last
    }

    fn pages(&mut self, pfns: &[Pfn]) -> io::Result<Vec<Option<Box<[u8]>>>> {
        self.reads += pfns.len() as u64;
        self.calls += 1;
        if self.busy > 0 && self.calls.is_multiple_of(self.busy) {
            self.lists.scribble();
        }
        let page = |pfn: &Pfn| {
            if *pfn > self.last {
                return None;
            }
            // Where no lists are, other bytes are.
            Some(self.lists.page(pfn.0).map_or_else(|| vec![7; PAGE_SIZE].into(), |page| Box::from(*page)))
        };
        Ok(pfns.iter().map(page).collect())
    }
}

struct Read {
    walked: Result<Walked, WalkError>,
    reads: u64,
    peak_bytes: u64,
}

fn read(kind: Kind, pages: u64, more: usize, busy: u64, seed: u64) -> Read {
    let guest = Guest { pages, vdev: VDEV, disk_bytes: 1 << 30 };
    let mut random = Rng::with_seed(seed);
    let room = Lists::least_pages(guest) + more;
    let mut memory = vec![[0; PAGE_SIZE]; room];
    // All over the guest's memory.
    let step = pages / room as u64;
    let pfns = (0..room as u64).map(|page| page * step + random.u64(0..step)).collect();
    let lists = Lists::write(kind, guest, &mut memory, pfns, random);
    let root = Pfn(lists.root());
    let mut memory = Memory { lists, last: Pfn(pages - 1), reads: 0, busy, calls: 0 };
    let mut walked = None;
    let Spent { peak_bytes } = Spent::on(|| walked = Some(walk(&mut memory, root)));
    Read { walked: walked.unwrap(), reads: memory.reads, peak_bytes }
}

impl Read {
    /// What holds for whatever a guest writes.
    fn check(&self, pages: u64) {
        assert!(self.reads <= 4 * (pages + 3), "{} pages were read of {pages}", self.reads);
        let most = BESIDE + EACH_PAGE * pages;
        assert!(self.peak_bytes <= most, "{} bytes were held, {most} are enough", self.peak_bytes);
        let Ok(walked) = &self.walked else { return };
        let map = &walked.map;
        assert!(map.len() <= pages && map.lookup(Pfn(pages)).is_none() && map.vdevs().len() <= 255);
        let places: Vec<_> = (0..pages).filter_map(|pfn| map.lookup(Pfn(pfn))).collect();
        assert_eq!(places.len() as u64, map.len());
        for place in places {
            assert!(place.offset.is_multiple_of(512) && place.offset.checked_add(PAGE_SIZE as u64).is_some());
            assert!(usize::from(place.disk) < map.vdevs().len());
        }
    }
}

/// A guest of 704 MiB, as the lab's: 30 million entries, of which the reader keeps one for each page.
#[test]
fn endless_lists_are_read_to_their_end_and_keep_no_more_than_the_guest_has_pages() {
    let pages = 704 << 8;
    let read = read(Kind::Endless, pages, 4000, 100, 1);
    read.check(pages);
    let walked = read.walked.unwrap();
    println!(
        "{} runs read, {} refused, {} pages listed, {} bytes held",
        walked.runs,
        walked.runs_refused,
        walked.map.len(),
        read.peak_bytes
    );
    assert!(walked.runs > 25_000_000, "{} runs", walked.runs);
    // The long runs alone name nearly every page.
    assert!(walked.map.len() > pages / 2, "{} pages", walked.map.len());
    assert!(walked.map.vdevs().contains(&Vdev(VDEV)) && walked.map.vdevs().len() == 255);
}

#[test]
fn a_circle_of_index_pages_is_given_up() {
    let pages = 20_000;
    let read = read(Kind::Circle, pages, 500, 0, 2);
    read.check(pages);
    assert!(matches!(read.walked, Err(WalkError::Chain { .. })), "{:?}", read.walked);
}

#[test]
fn lists_that_never_rest_are_given_up() {
    let pages = 20_000;
    let read = read(Kind::Restless, pages, 500, 1, 3);
    read.check(pages);
    assert!(read.walked.is_err(), "lists were taken that changed while they were read");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_lists_take_more_than_the_guest_s_size_warrants(
        kind in prop::sample::select(Kind::ALL.map(|(_, kind)| kind).to_vec()),
        pages in 2_000_u64..12_000,
        more in 0_usize..500,
        busy in 0_u64..4,
        seed: u64,
    ) {
        read(kind, pages, more, busy, seed).check(pages);
    }
}
