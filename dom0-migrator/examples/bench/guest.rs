//! The made-up guest: what its memory holds, all of it a function of the PFN.
//!
//! Out of 20 stretches of pages 12 are InnoDB frames that the lists name, 3 are zeros and 5 are InnoDB pages that no list names: about
//! what the lab's database guest holds. Each frame holds a page of a real data directory, at its place on the disk.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use dom0_migrator::engine::ReferenceMap;
use dom0_migrator::engine::xen_stream::{Entry, NOTAB, PAGE};
use enlightenment::{ListKind, Pfn, Run};

use crate::Failed;

/// Bytes of an InnoDB page.
const FRAME: usize = 16 << 10;
/// `FIL_PAGE_TYPE` of an index page, and where it and the two halves of the page's LSN that must agree stand (`fil0types.h`).
const INDEX_PAGE: [u8; 2] = 17855_u16.to_be_bytes();
/// The virtual device that the disk is.
pub const XVDA: u32 = 51712;

/// The InnoDB pages of a disk.
pub struct Pages {
    /// Byte offset of each.
    offsets: Vec<u64>,
    content: Vec<u8>,
}

impl Pages {
    /// Finds every index page on a raw disk, wherever its file system has put it.
    pub fn find(disk: &Path) -> Result<Self, Failed> {
        let mut file = File::open(disk)?;
        let mut found = Self { offsets: Vec::new(), content: Vec::new() };
        let mut seen = HashSet::new();
        // One page more than a piece, so that a page may begin anywhere in it.
        let (piece, mut buffer, mut at) = (8 << 20, Vec::new(), 0_u64);
        loop {
            let had = buffer.len();
            file.by_ref().take((piece + FRAME - had) as u64).read_to_end(&mut buffer)?;
            let mut place = 0;
            while let Some(page) = buffer.get(place..place + FRAME).filter(|_| place < piece) {
                // The low half of the LSN stands at the page's end again.
                if page[24..26] == INDEX_PAGE && page[20..24] == page[FRAME - 4..] && page[20..24] != [0; 4] {
                    if seen.insert(blake3::hash(page)) {
                        found.offsets.push(at + place as u64);
                        found.content.extend_from_slice(page);
                    }
                    place += FRAME;
                } else {
                    place += PAGE;
                }
            }
            if buffer.len() < piece {
                break;
            }
            let kept = place.min(buffer.len());
            buffer.drain(..kept);
            at += kept as u64;
        }
        if found.offsets.len() < 64 {
            return Err(format!("{} has only {} InnoDB pages", disk.display(), found.offsets.len()).into());
        }
        Ok(found)
    }

    /// Pages found.
    pub fn len(&self) -> usize {
        self.offsets.len()
    }
}

/// What a guest page holds.
enum Holds {
    Zeros,
    /// A quarter of an InnoDB page: its number, the quarter, and whether a list names it.
    Database {
        page: usize,
        quarter: usize,
        listed: bool,
    },
}

/// A guest of so many pages.
pub struct Guest {
    /// What its pages are taken from.
    pub disk: Pages,
    /// Its pages.
    pub pages: u64,
    /// Pages of a kind that lie together.
    pub stretch: u64,
}

impl Guest {
    fn holds(&self, pfn: u64) -> Holds {
        let listed = match mixed(pfn / self.stretch) % 20 {
            0..12 => true,
            12..15 => return Holds::Zeros,
            _ => false,
        };
        let page = (mixed(pfn / 4 + (1 << 40)) % self.disk.len() as u64) as usize;
        Holds::Database { page, quarter: (pfn % 4) as usize, listed }
    }

    /// Its bytes.
    pub fn page(&self, pfn: u64) -> &[u8] {
        static ZEROS: [u8; PAGE] = [0; PAGE];
        match self.holds(pfn) {
            Holds::Zeros => &ZEROS,
            Holds::Database { page, quarter, .. } => {
                let at = page * FRAME + quarter * PAGE;
                self.disk.content.get(at..at + PAGE).unwrap_or(&ZEROS)
            }
        }
    }

    /// The word that stands for it in PAGE_DATA.
    pub fn word(pfn: u64) -> [u8; 8] {
        Entry { pfn, page_type: NOTAB }.word().to_le_bytes()
    }

    /// The lists.
    pub fn map(&self) -> Result<ReferenceMap, Failed> {
        let mut map = ReferenceMap::new(Pfn(self.pages));
        for pfn in (0..self.pages).step_by(4) {
            if let Holds::Database { page, listed: true, .. } = self.holds(pfn) {
                let disk_offset = self.disk.offsets.get(page).copied().unwrap_or(0);
                let list = ListKind::Read as u8;
                map.insert_run(&Run { pfn, disk_offset, vdev: XVDA, pages: 4, list, reserved: 0 })?;
            }
        }
        Ok(map)
    }
}

/// One page's share in the sum by which two memories are compared.
pub fn digest(pfn: u64, page: &[u8]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&pfn.to_le_bytes()).update(page);
    hasher.finalize().as_bytes().iter().take(8).fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

/// A number that looks like chance (`splitmix64`).
pub fn mixed(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
