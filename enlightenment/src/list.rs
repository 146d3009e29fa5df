//! The lists in guest memory, as dom0 maps them.
//!
//! One *root* page, whose PFN stands in xenstore, describes up to two generations. A generation is a chain of *index*
//! pages, each naming up to 509 *leaf* pages, each holding up to 170 [`Run`]s. All of them are ordinary guest pages
//! anywhere in guest memory, so no grant is used up and no copy is made.
//!
//! ```text
//! xenstore: root-pfn ──► root ──slot──► index ──next──► index ──► …
//!                                         │ pfns[..509]   │
//!                                         ▼               ▼
//!                                        leaf … leaf     leaf … leaf   (170 runs of 24 bytes each)
//! ```
//!
//! # Consistency
//! The writer fills the slot that is *not* active (`generation & 1` names the slot) with all its pages, then publishes it
//! with one aligned 64-bit store to `active`. It reuses a slot and its pages only for the generation after the next. A reader
//! that started on generation *g* therefore sees it whole for as long as `active` is *g* or *g + 1*; it re-reads
//! `active` when it is done, and starts again if it is beyond. Every index and leaf page carries its generation too, so a
//! page that was reused is noticed. And even a list that is torn after all is only a wrong hint.
//!
//! # Size
//! A run has 24 bytes; with a leaf's head and its place in an index that is 4,096 / 170 + 8 / 170 = 24.14. A frame of four neighbouring
//! PFNs on one extent is one run. Measured on running systems, 4 to 12 % of frames are not four neighbours; where each of the
//! three joints inside a frame breaks by itself, 12 % broken frames mean 4.2 % broken joints, 1.13 runs a frame: 27.2 bytes.
//! With another 2 % of joints broken on disk it is 1.18 runs: 28.6 bytes. 32 bytes are reached at 1.33 runs a frame.
//!
//! A 1 TiB pool has 64 Mi frames: in this last case 79.4 million runs, 466,870 leaves, 918 index pages, one root: 1.78 GiB, 0.17 % of the
//! pool (`kernel-module/tests/tebibyte.rs` lists all of them). The generation before is kept for late readers, so twice that is held.

use crate::bytes::{u32_at, u64_at};
use crate::{ABI_VERSION, Generation, PAGE_SIZE, Pfn, Run};

/// First eight bytes of the root page: `PoolSkip`.
pub const ROOT_MAGIC: u64 = u64::from_le_bytes(*b"PoolSkip");
/// First four bytes of an index page: `PsIx`.
pub const INDEX_MAGIC: u32 = u32::from_le_bytes(*b"PsIx");
/// First four bytes of a leaf page: `PsLf`.
pub const LEAF_MAGIC: u32 = u32::from_le_bytes(*b"PsLf");
/// Leaf pages that one index page names.
pub const LEAVES_PER_INDEX: usize = 509;
/// Runs that one leaf page holds.
pub const RUNS_PER_LEAF: usize = 170;
/// `next_pfn` of the last index page.
pub const NO_PFN: u64 = u64::MAX;

/// One generation, as the root page describes it; 72 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Slot {
    /// Its number; 0 when the slot is empty.
    pub generation: u64,
    /// PFN of the first index page, [`NO_PFN`] when there is none.
    pub first_index_pfn: u64,
    /// Index pages in the chain.
    pub index_pages: u32,
    /// Zero.
    pub reserved: u32,
    /// Leaf pages in all.
    pub leaf_pages: u64,
    /// Runs in all.
    pub runs: u64,
    /// Guest pages in the read list.
    pub pages_read: u64,
    /// Guest pages in the written list.
    pub pages_written: u64,
    /// Frames in the read list, as the probe counted them.
    pub frames_read: u64,
    /// Frames in the written list, as the probe counted them.
    pub frames_written: u64,
}

/// The root page.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Root {
    /// [`ROOT_MAGIC`].
    pub magic: u64,
    /// [`ABI_VERSION`].
    pub version: u32,
    /// [`PAGE_SIZE`].
    pub page_size: u32,
    /// The published generation; its slot is `slots[active & 1]`. 0: nothing is published.
    pub active: u64,
    /// A random number drawn when the module was loaded: tells a new module from an old one.
    pub instance: u64,
    /// Clean frames of the pool when it was published, whether listed or not, as the probe counted them.
    pub pool_frames_clean: u64,
    /// Frames of the pool in all.
    pub pool_frames: u64,
    /// Zero.
    pub reserved: [u64; 2],
    /// Even and odd generations.
    pub slots: [Slot; 2],
    /// Zero, up to the end of the page.
    pub tail: [u64; 486],
}

/// An index page.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Index {
    /// [`INDEX_MAGIC`].
    pub magic: u32,
    /// PFNs in use in `leaves`.
    pub count: u32,
    /// Its generation.
    pub generation: u64,
    /// PFN of the next index page, or [`NO_PFN`].
    pub next_pfn: u64,
    /// PFNs of leaf pages.
    pub leaves: [u64; LEAVES_PER_INDEX],
}

/// A leaf page.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Leaf {
    /// [`LEAF_MAGIC`].
    pub magic: u32,
    /// Runs in use in `runs`.
    pub count: u32,
    /// Its generation.
    pub generation: u64,
    /// The runs.
    pub runs: [Run; RUNS_PER_LEAF],
}

/// Byte offset of [`Root::active`] in the root page.
pub const ROOT_ACTIVE_OFFSET: usize = 16;
/// Byte offset of [`Root::slots`] in the root page.
pub const ROOT_SLOTS_OFFSET: usize = 64;

const _: () = {
    assert!(size_of::<Slot>() == 72);
    assert!(size_of::<Root>() == PAGE_SIZE);
    assert!(size_of::<Index>() == PAGE_SIZE);
    assert!(size_of::<Leaf>() == PAGE_SIZE);
    assert!(core::mem::offset_of!(Root, active) == ROOT_ACTIVE_OFFSET);
    assert!(core::mem::offset_of!(Root, slots) == ROOT_SLOTS_OFFSET);
    assert!(core::mem::offset_of!(Index, leaves) == 24);
    assert!(core::mem::offset_of!(Leaf, runs) == 16);
};

/// What the root page says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootView {
    /// The module's instance number.
    pub instance: u64,
    /// The active slot, or `None` when nothing is published.
    pub active: Option<Slot>,
    /// Clean frames of the pool, listed or not.
    pub pool_frames_clean: u64,
    /// Frames of the pool.
    pub pool_frames: u64,
}

/// Why a page of the lists was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListError {
    /// Fewer bytes than a page.
    Short {
        /// Bytes that were there.
        have: usize,
    },
    /// Not the page that it should be.
    BadMagic {
        /// What was found.
        found: u64,
    },
    /// Written by another version.
    Version {
        /// What was found.
        found: u32,
    },
    /// Another page size than ours.
    PageSize {
        /// What was found, in bytes.
        found: u32,
    },
    /// The page belongs to another generation: the writer went on meanwhile.
    Generation {
        /// What was found.
        found: u64,
        /// What was being read.
        expected: u64,
    },
    /// More entries than the page holds.
    Count {
        /// What was found.
        found: u32,
    },
    /// The slot's numbers contradict each other.
    Slot,
}

impl core::fmt::Display for ListError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Self::Short { have } => write!(f, "list page cut short: {have} of {PAGE_SIZE} bytes"),
            Self::BadMagic { found } => write!(f, "not a list page: it begins with {found:#x}"),
            Self::Version { found } => {
                write!(
                    f,
                    "lists of ABI version {found}, this program reads {ABI_VERSION}; use the same release on both"
                )
            }
            Self::PageSize { found } => write!(f, "lists with pages of {found} bytes, expected {PAGE_SIZE}"),
            Self::Generation { found, expected } => {
                write!(f, "list page of generation {found} while reading generation {expected}")
            }
            Self::Count { found } => write!(f, "list page claims {found} entries"),
            Self::Slot => f.write_str("root page describes a generation that cannot be"),
        }
    }
}

impl core::error::Error for ListError {}

/// Parses the root page.
///
/// # Errors
/// [`ListError`] when it is not a root page of this version, or its active slot contradicts itself.
pub fn parse_root(page: &[u8]) -> Result<RootView, ListError> {
    if page.len() < PAGE_SIZE {
        return Err(ListError::Short { have: page.len() });
    }
    let short = ListError::Short { have: page.len() };
    let at = |offset| u64_at(page, offset).ok_or(short);
    let magic = at(0)?;
    if magic != ROOT_MAGIC {
        return Err(ListError::BadMagic { found: magic });
    }
    let version = u32_at(page, 8).ok_or(short)?;
    if version != ABI_VERSION {
        return Err(ListError::Version { found: version });
    }
    let page_size = u32_at(page, 12).ok_or(short)?;
    if page_size as usize != PAGE_SIZE {
        return Err(ListError::PageSize { found: page_size });
    }
    let active = at(ROOT_ACTIVE_OFFSET)?;
    let view = |active| -> Result<RootView, ListError> {
        Ok(RootView { instance: at(24)?, active, pool_frames_clean: at(32)?, pool_frames: at(40)? })
    };
    if active == 0 {
        return view(None);
    }
    let base = ROOT_SLOTS_OFFSET + (active & 1) as usize * size_of::<Slot>();
    let slot = Slot {
        generation: at(base)?,
        first_index_pfn: at(base + 8)?,
        index_pages: u32_at(page, base + 16).ok_or(short)?,
        reserved: u32_at(page, base + 20).ok_or(short)?,
        leaf_pages: at(base + 24)?,
        runs: at(base + 32)?,
        pages_read: at(base + 40)?,
        pages_written: at(base + 48)?,
        frames_read: at(base + 56)?,
        frames_written: at(base + 64)?,
    };
    if slot.generation != active {
        return Err(ListError::Generation { found: slot.generation, expected: active });
    }
    let leaves_fit = slot.leaf_pages <= u64::from(slot.index_pages) * LEAVES_PER_INDEX as u64;
    let runs_fit = slot.leaf_pages.checked_mul(RUNS_PER_LEAF as u64).is_some_and(|most| slot.runs <= most);
    let start_fits = (slot.index_pages == 0) == (slot.first_index_pfn == NO_PFN);
    if !(leaves_fit && runs_fit && start_fits) {
        return Err(ListError::Slot);
    }
    view(Some(slot))
}

/// What an index page says, checked.
#[derive(Clone, Copy, Debug)]
pub struct IndexView<'a> {
    page: &'a [u8],
    count: usize,
    /// PFN of the next index page.
    pub next: Option<Pfn>,
}

impl IndexView<'_> {
    /// PFNs of the leaf pages, in order.
    pub fn leaves(&self) -> impl Iterator<Item = Pfn> + '_ {
        (0..self.count).filter_map(|i| u64_at(self.page, 24 + 8 * i)).map(Pfn)
    }
}

/// Parses an index page of the generation that is being read.
///
/// # Errors
/// [`ListError`] when it is something else.
pub fn parse_index(page: &[u8], generation: Generation) -> Result<IndexView<'_>, ListError> {
    let count = parse_head(page, INDEX_MAGIC, generation, LEAVES_PER_INDEX)?;
    let next = u64_at(page, 16).ok_or(ListError::Short { have: page.len() })?;
    Ok(IndexView { page, count, next: (next != NO_PFN).then_some(Pfn(next)) })
}

/// Parses a leaf page of the generation that is being read: an iterator over its runs, each still to be believed or not
/// ([`crate::run::RunError`]).
///
/// # Errors
/// [`ListError`] when it is something else.
pub fn parse_leaf(
    page: &[u8],
    generation: Generation,
) -> Result<impl Iterator<Item = Result<Run, crate::run::RunError>> + '_, ListError> {
    let count = parse_head(page, LEAF_MAGIC, generation, RUNS_PER_LEAF)?;
    Ok((0..count).map(|i| Run::parse(page.get(16 + Run::SIZE * i..).unwrap_or(&[]))))
}

fn parse_head(page: &[u8], magic: u32, generation: Generation, most: usize) -> Result<usize, ListError> {
    let short = ListError::Short { have: page.len() };
    if page.len() < PAGE_SIZE {
        return Err(short);
    }
    let found = u32_at(page, 0).ok_or(short)?;
    if found != magic {
        return Err(ListError::BadMagic { found: u64::from(found) });
    }
    let number = u64_at(page, 8).ok_or(short)?;
    if number != generation.0 {
        return Err(ListError::Generation { found: number, expected: generation.0 });
    }
    let count = u32_at(page, 4).ok_or(short)?;
    if count as usize > most {
        return Err(ListError::Count { found: count });
    }
    Ok(count as usize)
}
