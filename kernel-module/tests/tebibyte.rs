//! The lists of a pool of 1 TiB, every one of its 64 Mi frames, in the memory of a test: a leaf page is read as dom0 would and given
//! up as soon as the next is begun, so that only index pages are kept.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a test says what it holds by its name, and ends where it cannot go on"
)]

use std::collections::HashMap;

use enlightenment::list::{LEAF_MAGIC, parse_index, parse_leaf, parse_root};
use enlightenment::{Generation, PAGE_SIZE, Pfn, Run};
use kernel_module::{Counts, Errno, Lists, Shim};

/// The first that a module publishes.
const GENERATION: Generation = Generation(1);
const FRAME_BYTES: u64 = 16_384;
const POOL_BYTES: u64 = 1 << 40;
const FRAMES: u64 = POOL_BYTES / FRAME_BYTES;
/// The guest has a quarter more than the pool.
const GUEST_PAGES: u64 = 5 * (1 << 26);
/// How often a page's PFN does not follow the one before: 12 % of all frames are then not four neighbours (0.9583³ = 0.88), the worst
/// that was measured on running guests (4 to 12 %).
const BREAKS_IN_MEMORY: u64 = 417;
/// How often a page's place on disk does not follow the one before, inside a frame: files that grew in pieces. Of 10,000, as above.
const BREAKS_ON_DISK: u64 = 200;

/// Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014), the mixing function of SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn one_of_10_000(&mut self, times: u64) -> bool {
        self.next() % 10_000 < times
    }
}

/// All frames of the pool, as runs: the pages of a frame that adjoin on both sides are one. Frames hold pages in no order of the
/// disk's, so no two of them adjoin there.
struct Pool {
    random: Random,
    frame: u64,
    pfn: u64,
    pending: Vec<Run>,
}

impl Pool {
    fn new() -> Self {
        Self { random: Random(1), frame: 0, pfn: 0, pending: Vec::new() }
    }

    fn fill_frame(&mut self) {
        let list = 1 + u8::from(self.random.next().is_multiple_of(4));
        // An odd multiple of the frame's size never ends where another begins.
        let mut disk_offset = (2 * (self.random.next() % FRAMES) + 1) * 2 * FRAME_BYTES;
        for page in 0..4 {
            self.pfn += 1;
            if self.random.one_of_10_000(BREAKS_IN_MEMORY) || self.pfn >= GUEST_PAGES {
                // Not the one that would have followed, or there would be no break.
                self.pfn = self.random.next() % (GUEST_PAGES / 2) * 2;
            }
            if page > 0 && self.random.one_of_10_000(BREAKS_ON_DISK) {
                disk_offset += 1 << 42;
            }
            let run = Run { pfn: self.pfn, disk_offset, vdev: 51712, pages: 1, list, reserved: 0 };
            if page == 0 || !self.pending.first_mut().is_some_and(|last| last.try_extend(&run)) {
                self.pending.insert(0, run);
            }
            disk_offset += PAGE_SIZE as u64;
        }
        self.frame += 1;
    }
}

impl Iterator for Pool {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.pending.is_empty() {
            if self.frame == FRAMES {
                return None;
            }
            self.fill_frame();
        }
        self.pending.pop()
    }
}

/// A kernel whose pages are there for as long as they are written to.
struct Streaming {
    pages: HashMap<u64, Box<[u8; PAGE_SIZE]>>,
    allocated: u64,
    freed: u64,
    /// Pages allocated since the last leaf was read: that which is being written, or an index page that was needed for it.
    recent: Vec<u64>,
    most_held: usize,
    /// What the next leaves must hold.
    expected: Pool,
    runs_read: u64,
    pages_read: u64,
}

impl Streaming {
    /// Reads the last leaf through dom0's parser, compares each run, and gives the page up.
    fn read_leaf(&mut self) {
        let Some(at) = self.recent.iter().position(|pfn| Self::is_leaf(&self.pages[pfn])) else { return };
        let page = self.pages.remove(&self.recent[at]).unwrap();
        self.recent.clear();
        for run in parse_leaf(page.as_slice(), GENERATION).unwrap() {
            let run = run.unwrap();
            assert_eq!(Some(run), self.expected.next(), "run {}", self.runs_read);
            self.runs_read += 1;
            self.pages_read += u64::from(run.pages);
        }
    }

    fn is_leaf(page: &[u8; PAGE_SIZE]) -> bool {
        page.starts_with(&LEAF_MAGIC.to_le_bytes())
    }
}

impl Shim for Streaming {
    type Process = ();

    fn allocate(&mut self) -> Option<Pfn> {
        // Whatever leaf there is is full now.
        self.read_leaf();
        self.allocated += 1;
        self.recent.push(self.allocated);
        self.pages.insert(self.allocated, Box::new([0; PAGE_SIZE]));
        self.most_held = self.most_held.max(self.pages.len());
        Some(Pfn(self.allocated))
    }

    fn free(&mut self, page: Pfn) {
        self.freed += 1;
        self.pages.remove(&page.0);
    }

    fn page(&mut self, page: Pfn) -> &mut [u8; PAGE_SIZE] {
        self.pages.get_mut(&page.0).expect("a page that was given up is used again")
    }

    fn store_release(&mut self, page: Pfn, offset: usize, value: u64) {
        self.page(page)[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn copy_from_user(&mut self, _: &mut [u8], _: u64) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }

    fn copy_to_user(&mut self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }

    fn hold(&mut self, _: i32) -> Result<(), Errno> {
        Err(Errno::ESRCH)
    }

    fn release(&mut self, (): ()) {}

    fn translate(&mut self, (): &(), _: u64, _: &mut [u64]) -> Result<usize, Errno> {
        Ok(0)
    }

    fn random(&mut self) -> u64 {
        4
    }

    fn xenstore_write(&mut self, _: &str, _: &str) -> bool {
        false
    }

    fn xenstore_read(&mut self, _: &str, _: &mut [u8]) -> Option<usize> {
        None
    }

    fn xenstore_remove(&mut self) {}

    fn event_channel_allocate(&mut self) -> Option<u32> {
        None
    }

    fn event_channel_signal(&mut self, _: u32) -> bool {
        false
    }

    fn event_channel_close(&mut self, _: u32) {}
}

#[test]
fn a_pool_of_a_tebibyte_takes_at_most_32_bytes_a_frame() {
    let mut kernel = Streaming {
        pages: HashMap::new(),
        allocated: 0,
        freed: 0,
        recent: Vec::new(),
        most_held: 0,
        expected: Pool::new(),
        runs_read: 0,
        pages_read: 0,
    };
    let mut lists = Lists::new();
    lists.start(&mut kernel).unwrap();
    let generation = lists.begin(&mut kernel);
    assert_eq!(generation, GENERATION.0);
    for run in Pool::new() {
        lists.append(&mut kernel, run).unwrap();
    }
    lists.publish(&mut kernel, generation, &Counts::default()).unwrap();
    kernel.read_leaf();
    assert_eq!(kernel.expected.next(), None, "runs are missing");
    assert_eq!(kernel.pages_read * PAGE_SIZE as u64, POOL_BYTES);

    // The index as dom0 walks it, from the root page on.
    let root = lists.root_pfn().unwrap();
    let slot = parse_root(kernel.page(root)).unwrap().active.unwrap();
    let (mut leaves, mut indexes) = (0, 0);
    let mut next = Some(Pfn(slot.first_index_pfn));
    while let Some(pfn) = next {
        let index = parse_index(kernel.page(pfn).as_slice(), GENERATION).unwrap();
        leaves += index.leaves().count() as u64;
        indexes += 1;
        next = index.next;
    }
    assert_eq!((leaves, indexes, kernel.runs_read), (slot.leaf_pages, slot.index_pages, slot.runs));
    assert_eq!(slot.pages_read + slot.pages_written, POOL_BYTES / PAGE_SIZE as u64);

    let bytes = lists.list_pages() * PAGE_SIZE as u64;
    let a_frame = bytes as f64 / FRAMES as f64;
    println!(
        "1 TiB: {FRAMES} frames, {} runs ({:.3} a frame), {} leaf and {} index pages: {:.2} GiB of lists, {a_frame:.2} bytes a frame",
        slot.runs,
        slot.runs as f64 / FRAMES as f64,
        slot.leaf_pages,
        slot.index_pages,
        bytes as f64 / f64::from(1 << 30)
    );
    assert!(slot.runs as f64 > 1.15 * FRAMES as f64, "the pool is not as broken up as it should be");
    assert!(a_frame <= 32.0, "{a_frame} bytes a frame");
    assert!(kernel.most_held < 2000, "{} pages were held at once", kernel.most_held);
    // All go back: leaves that the test gave up count as freed too.
    lists.stop(&mut kernel);
    assert_eq!((kernel.freed, kernel.pages.len()), (kernel.allocated, 0));
}
