//! A run: neighbouring guest pages whose bytes lie in neighbouring places of one disk.

use crate::PAGE_SIZE;
use crate::bytes::{u16_at, u32_at, u64_at};

/// A guest's (pseudo-)physical frame number: the number that Xen's migration stream uses too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Pfn(pub u64);

/// The number of a published state of the lists; 0 means that nothing is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Generation(pub u64);

/// A Xen virtual block device, by the number that names it in xenstore (`device/vbd/51712` is `xvda`), the same in the
/// guest and in both hosts' domain configurations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Vdev(pub u32);

/// Which of the two lists a run belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum ListKind {
    /// Frames loaded by a read and untouched since (the R list).
    Read = 1,
    /// Frames written to since they were loaded, and flushed since (the W list).
    Written = 2,
}

impl ListKind {
    /// The list with this number, if there is one.
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::Read),
            2 => Some(Self::Written),
            _ => None,
        }
    }
}

/// A run of guest pages with their place on disk, 24 bytes.
///
/// ```text
///  0        8             16      20      22     23     24
///  | pfn    | disk_offset | vdev  | pages | list | zero |
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Run {
    /// The first page's PFN; the others follow it.
    pub pfn: u64,
    /// Where the first page's bytes lie, in bytes from the start of the whole disk; a multiple of 512.
    pub disk_offset: u64,
    /// The disk ([`Vdev`]).
    pub vdev: u32,
    /// Number of pages, at least 1.
    pub pages: u16,
    /// The list ([`ListKind`]).
    pub list: u8,
    /// Zero.
    pub reserved: u8,
}

const _: () = assert!(size_of::<Run>() == Run::SIZE && align_of::<Run>() == 8);

impl Run {
    /// Bytes that a run takes.
    pub const SIZE: usize = 24;

    /// Highest PFN that a run may reach: 52 bits of physical address, 12 of them inside the page.
    pub const MAX_PFN: u64 = (1 << 40) - 1;

    /// Parses one run.
    ///
    /// # Errors
    /// [`RunError`] names the field that cannot be right.
    pub fn parse(bytes: &[u8]) -> Result<Self, RunError> {
        let run = (|| {
            Some(Self {
                pfn: u64_at(bytes, 0)?,
                disk_offset: u64_at(bytes, 8)?,
                vdev: u32_at(bytes, 16)?,
                pages: u16_at(bytes, 20)?,
                list: *bytes.get(22)?,
                reserved: *bytes.get(23)?,
            })
        })()
        .ok_or(RunError::Short { have: bytes.len() })?;
        run.check()?;
        Ok(run)
    }

    /// Whether all fields lie in their bounds.
    ///
    /// # Errors
    /// [`RunError`] names the field that does not.
    pub fn check(&self) -> Result<(), RunError> {
        if self.pages == 0 {
            return Err(RunError::Empty);
        }
        if self.pfn.checked_add(u64::from(self.pages) - 1).is_none_or(|last| last > Self::MAX_PFN) {
            return Err(RunError::PfnOutOfRange { pfn: self.pfn, pages: self.pages });
        }
        let length = u64::from(self.pages) * PAGE_SIZE as u64;
        if !self.disk_offset.is_multiple_of(512) || self.disk_offset.checked_add(length).is_none() {
            return Err(RunError::BadOffset { disk_offset: self.disk_offset });
        }
        if ListKind::from_u8(self.list).is_none() {
            return Err(RunError::UnknownList { list: self.list });
        }
        if self.reserved != 0 {
            return Err(RunError::ReservedNotZero { value: self.reserved });
        }
        Ok(())
    }

    /// The run's bytes, as they lie in a leaf page.
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        out[0..8].copy_from_slice(&self.pfn.to_le_bytes());
        out[8..16].copy_from_slice(&self.disk_offset.to_le_bytes());
        out[16..20].copy_from_slice(&self.vdev.to_le_bytes());
        out[20..22].copy_from_slice(&self.pages.to_le_bytes());
        out[22] = self.list;
        out[23] = self.reserved;
        out
    }

    /// Appends `next` to this run if it continues it on both sides (PFNs and disk) in the same list.
    pub fn try_extend(&mut self, next: &Self) -> bool {
        let Some(pages) = self.pages.checked_add(next.pages) else { return false };
        let joins = self.vdev == next.vdev
            && self.list == next.list
            && self.pfn.checked_add(u64::from(self.pages)) == Some(next.pfn)
            && self.disk_offset.checked_add(u64::from(self.pages) * PAGE_SIZE as u64)
                == Some(next.disk_offset);
        if joins {
            self.pages = pages;
        }
        joins
    }
}

/// Why a run was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunError {
    /// Fewer bytes than a run takes.
    Short {
        /// Bytes that were there.
        have: usize,
    },
    /// A run of no page.
    Empty,
    /// Beyond [`Run::MAX_PFN`].
    PfnOutOfRange {
        /// First PFN.
        pfn: u64,
        /// Pages.
        pages: u16,
    },
    /// Not a multiple of 512, or the end overflows.
    BadOffset {
        /// The offset in bytes.
        disk_offset: u64,
    },
    /// Neither read nor written.
    UnknownList {
        /// The number found.
        list: u8,
    },
    /// A reserved byte is set.
    ReservedNotZero {
        /// The value found.
        value: u8,
    },
}

impl core::fmt::Display for RunError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Self::Short { have } => write!(f, "run cut short: {have} of {} bytes", Run::SIZE),
            Self::Empty => f.write_str("run of 0 pages"),
            Self::PfnOutOfRange { pfn, pages } => {
                write!(f, "run of {pages} pages from PFN {pfn:#x} exceeds PFN {:#x}", Run::MAX_PFN)
            }
            Self::BadOffset { disk_offset } => {
                write!(f, "disk offset {disk_offset} is not a multiple of 512, or overflows")
            }
            Self::UnknownList { list } => write!(f, "list {list} is neither read (1) nor written (2)"),
            Self::ReservedNotZero { value } => write!(f, "reserved byte is {value:#x}"),
        }
    }
}

impl core::error::Error for RunError {}
