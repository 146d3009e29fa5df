//! The worst lists that one can think of, as a guest's root may publish them: pages of the real ABI, for a real guest's memory
//! (`bin/hostile-guest.rs`) as for a made-up one.

use std::collections::HashMap;

use enlightenment::list::{
    INDEX_MAGIC, LEAF_MAGIC, LEAVES_PER_INDEX, NO_PFN, ROOT_ACTIVE_OFFSET, ROOT_MAGIC, ROOT_SLOTS_OFFSET,
    RUNS_PER_LEAF, Slot,
};
use enlightenment::{ABI_VERSION, ListKind, PAGE_SIZE, Run};
use fastrand::Rng;

/// Disks that are named, the guest's own among them: more than a map takes.
const DISKS: u64 = 300;
/// Leaves at the beginning that are full of runs as long as they may be, all of them across each other.
const LEAVES_OF_LONG_RUNS: usize = 3;

/// What the lists are like as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As many leaves as a domain's memory could hold, most of them the same ones over again: tens of millions of entries. Every page of the
    /// guest is listed, the kernel's and the lists' own among them; places are inside the disk, beyond it, at the end of numbers, and
    /// on other disks. What is written there changes while it is read; the whole never contradicts itself, so it is read to its end.
    Endless,
    /// As many index pages, in a circle.
    Circle,
    /// Short lists, of a new generation as often as the processor makes one.
    Restless,
}

impl Kind {
    /// All of them, by name.
    pub const ALL: [(&str, Self); 3] =
        [("endless", Self::Endless), ("circle", Self::Circle), ("restless", Self::Restless)];
}

/// The guest that publishes them.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// Pages of its memory.
    pub pages: u64,
    /// Its own disk, which is not to be the first that is named.
    pub vdev: u32,
    /// Bytes of that disk.
    pub disk_bytes: u64,
}

/// Pages of lists, and where they lie in the guest.
pub struct Lists<'m> {
    kind: Kind,
    guest: Guest,
    /// The pages: the root, index pages, leaves.
    memory: &'m mut [[u8; PAGE_SIZE]],
    /// Their PFNs, and the other way round.
    pfns: Vec<u64>,
    places: HashMap<u64, usize>,
    index_pages: usize,
    generation: u64,
    random: Rng,
}

impl<'m> Lists<'m> {
    /// Index pages and leaves that a root page may claim in a guest's memory.
    fn most(guest: Guest) -> (usize, usize) {
        let index_pages = guest.pages / (LEAVES_PER_INDEX as u64 + 1);
        (index_pages as usize, index_pages as usize * LEAVES_PER_INDEX)
    }

    /// Pages that it takes at least.
    pub fn least_pages(guest: Guest) -> usize {
        1 + Self::most(guest).0 + LEAVES_OF_LONG_RUNS + 64
    }

    /// Fills pages of a guest with lists.
    ///
    /// # Panics
    /// When there are fewer pages than [`Lists::least_pages`], or not as many numbers as pages.
    pub fn write(
        kind: Kind,
        guest: Guest,
        memory: &'m mut [[u8; PAGE_SIZE]],
        pfns: Vec<u64>,
        random: Rng,
    ) -> Self {
        assert!(memory.len() >= Self::least_pages(guest) && memory.len() == pfns.len());
        let index_pages = match kind {
            Kind::Endless => Self::most(guest).0,
            Kind::Circle => 16,
            Kind::Restless => 2,
        };
        let places = pfns.iter().enumerate().map(|(index, &pfn)| (pfn, index)).collect();
        let mut lists = Self { kind, guest, memory, pfns, places, index_pages, generation: 6, random };
        for leaf in 1 + lists.index_pages..lists.memory.len() {
            lists.write_leaf(leaf);
        }
        lists.write_indexes();
        lists.write_root();
        lists
    }

    /// The root page's PFN.
    pub fn root(&self) -> u64 {
        self.pfns[0]
    }

    /// The generation that is published.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// A page by its PFN.
    pub fn page(&self, pfn: u64) -> Option<&[u8; PAGE_SIZE]> {
        self.places.get(&pfn).map(|&index| &self.memory[index])
    }

    fn put<const N: usize>(&mut self, page: usize, at: usize, bytes: [u8; N]) {
        self.memory[page][at..at + N].copy_from_slice(&bytes);
    }

    fn head(&mut self, page: usize, magic: u32, count: usize) {
        self.put(page, 0, magic.to_le_bytes());
        self.put(page, 4, (count as u32).to_le_bytes());
        self.put(page, 8, self.generation.to_le_bytes());
    }

    fn write_root(&mut self) {
        let (mut index_pages, mut leaves) = Self::most(self.guest);
        if self.kind == Kind::Restless {
            (index_pages, leaves) = (self.index_pages, self.index_pages * LEAVES_PER_INDEX);
        }
        self.put(0, 0, ROOT_MAGIC.to_le_bytes());
        self.put(0, 8, ABI_VERSION.to_le_bytes());
        self.put(0, 12, (PAGE_SIZE as u32).to_le_bytes());
        // Frames of a pool that no memory holds.
        self.put(0, 32, u64::MAX.to_le_bytes());
        self.put(0, 40, u64::MAX.to_le_bytes());
        let slot = ROOT_SLOTS_OFFSET + (self.generation & 1) as usize * size_of::<Slot>();
        self.put(0, slot, self.generation.to_le_bytes());
        self.put(0, slot + 8, self.pfns[1].to_le_bytes());
        self.put(0, slot + 16, (index_pages as u32).to_le_bytes());
        self.put(0, slot + 24, (leaves as u64).to_le_bytes());
        self.put(0, slot + 32, (leaves as u64 * RUNS_PER_LEAF as u64).to_le_bytes());
        for at in [40, 48, 56, 64] {
            self.put(0, slot + at, u64::MAX.to_le_bytes());
        }
        self.put(0, ROOT_ACTIVE_OFFSET, self.generation.to_le_bytes());
    }

    fn write_indexes(&mut self) {
        let (first_leaf, leaves) = (1 + self.index_pages, self.memory.len() - 1 - self.index_pages);
        for index in 0..self.index_pages {
            self.head(1 + index, INDEX_MAGIC, LEAVES_PER_INDEX);
            let is_last = index + 1 == self.index_pages;
            let next = match (is_last, self.kind) {
                (false, _) => self.pfns[2 + index],
                (true, Kind::Circle) => self.pfns[1],
                (true, _) => NO_PFN,
            };
            self.put(1 + index, 16, next.to_le_bytes());
            for at in 0..LEAVES_PER_INDEX {
                // The same ones over again.
                let leaf = self.pfns[first_leaf + (index * LEAVES_PER_INDEX + at) % leaves];
                self.put(1 + index, 24 + 8 * at, leaf.to_le_bytes());
            }
        }
    }

    fn write_leaf(&mut self, page: usize) {
        self.head(page, LEAF_MAGIC, RUNS_PER_LEAF);
        let leaf = page - 1 - self.index_pages;
        for at in 0..RUNS_PER_LEAF {
            let run = if leaf < LEAVES_OF_LONG_RUNS {
                self.long_run()
            } else {
                self.short_run(((leaf - LEAVES_OF_LONG_RUNS) * RUNS_PER_LEAF + at) as u64)
            };
            self.put(page, 16 + at * Run::SIZE, run.to_bytes());
        }
    }

    /// A place inside the guest's own disk, not always at a page's beginning.
    fn inside(&mut self, pages: u64) -> u64 {
        self.random.u64(0..self.guest.disk_bytes - pages.min(64) * PAGE_SIZE as u64) & !511
    }

    fn long_run(&mut self) -> Run {
        let pfn = self.random.u64(0..self.guest.pages - 1);
        let pages = (self.guest.pages - pfn).min(u64::from(u16::MAX)) as u16;
        let (vdev, disk_offset) = (self.guest.vdev, self.inside(u64::from(pages)));
        Run { pfn, disk_offset, vdev, pages, list: ListKind::Read as u8, reserved: 0 }
    }

    /// Every page of the guest in turn, far from the one before it so that no two of them join.
    fn short_run(&mut self, number: u64) -> Run {
        let (own, disk_bytes) = (self.guest.vdev, self.guest.disk_bytes);
        let pfn = number.wrapping_mul(7919) % self.guest.pages;
        let list = if number % 16 < 8 { ListKind::Read as u8 } else { ListKind::Written as u8 };
        let good = Run { pfn, disk_offset: self.inside(1), vdev: own, pages: 1, list, reserved: 0 };
        match number % 8 {
            // Beyond the disk; and where numbers end.
            0 => Run { disk_offset: disk_bytes + (number << 12), ..good },
            1 => Run { disk_offset: (u64::MAX - 2 * PAGE_SIZE as u64) & !511, ..good },
            // Other disks: those of other domains as Xen numbers them, and dom0's own as Linux does.
            2 => Run { vdev: own + 16 * (1 + self.random.u64(0..DISKS) as u32), ..good },
            3 => Run { vdev: 254 << 8 | self.random.u32(0..16), ..good },
            // What is no run at all.
            4 => match self.random.u32(0..5) {
                0 => Run { pages: 0, ..good },
                1 => Run { pfn: self.guest.pages + number, ..good },
                2 => Run { pfn: u64::MAX - 3, pages: u16::MAX, ..good },
                3 => Run { disk_offset: good.disk_offset + 1, ..good },
                _ => Run { list: 9, reserved: 7, ..good },
            },
            _ => good,
        }
    }

    /// Changes what may be being read at this moment; for [`Kind::Restless`], the generation.
    pub fn scribble(&mut self) {
        if self.kind == Kind::Restless {
            self.generation += 2;
            self.write_root();
            self.write_indexes();
        }
        let first = 1 + self.index_pages;
        for _ in 0..4 {
            let page = self.random.usize(first..self.memory.len().min(first + 64));
            let (at, number) = (self.random.usize(0..RUNS_PER_LEAF), self.random.u64(..));
            let run = self.short_run(number);
            self.put(page, 16 + at * Run::SIZE, run.to_bytes());
        }
    }
}
