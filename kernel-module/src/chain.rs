//! A chain of index pages with their leaves: one generation's runs, in pages that dom0 can map.
//!
//! The chain is its own book-keeping: every page of it can be found from its first index page, so the lists cost no memory
//! beside the pages that dom0 reads.

use enlightenment::list::{INDEX_MAGIC, LEAF_MAGIC, LEAVES_PER_INDEX, NO_PFN, RUNS_PER_LEAF};
use enlightenment::{Generation, ListKind, PAGE_SIZE, Pfn, Run};

use crate::wire::{get_u32, get_u64, put, put_u32, put_u64};
use crate::{Errno, Shim};

/// Offset of `count` in index and leaf pages.
const COUNT: usize = 4;
/// Offset of `generation` in index and leaf pages.
const GENERATION: usize = 8;
/// Offset of `next_pfn` in index pages.
const NEXT: usize = 16;
/// Offset of `leaves` in index pages.
const LEAVES: usize = 24;
/// Offset of `runs` in leaf pages.
const RUNS: usize = 16;

/// Where the end of a chain is, and what it holds. A copy of it is a mark to which [`Chain::truncate`] can return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The generation that every page carries.
    pub generation: u64,
    /// First index page.
    pub first: Option<Pfn>,
    /// Index pages.
    pub index_pages: u32,
    /// Leaf pages.
    pub leaf_pages: u64,
    /// Runs.
    pub runs: u64,
    /// Guest pages in the read list.
    pub pages_read: u64,
    /// Guest pages in the written list.
    pub pages_written: u64,
    /// Last index page.
    last_index: Option<Pfn>,
    /// Leaves named in it.
    index_used: usize,
    /// Last leaf page.
    last_leaf: Option<Pfn>,
    /// Runs in it.
    leaf_used: usize,
    /// The last of them.
    last_run: Option<Run>,
}

impl Chain {
    /// An empty chain of no generation.
    pub const EMPTY: Self = Self {
        generation: 0,
        first: None,
        index_pages: 0,
        leaf_pages: 0,
        runs: 0,
        pages_read: 0,
        pages_written: 0,
        last_index: None,
        index_used: 0,
        last_leaf: None,
        leaf_used: 0,
        last_run: None,
    };

    /// An empty chain.
    pub const fn new(generation: Generation) -> Self {
        Self { generation: generation.0, ..Self::EMPTY }
    }

    /// Pages that it takes, index pages included.
    pub fn list_pages(&self) -> u64 {
        u64::from(self.index_pages) + self.leaf_pages
    }

    /// Appends a run, or lengthens the last one where the new one continues it. New pages come from `spare` first.
    ///
    /// # Errors
    /// `ENOMEM`; the chain is then as it was.
    pub fn append<S: Shim>(&mut self, shim: &mut S, spare: &mut Self, run: Run) -> Result<(), Errno> {
        let pages = u64::from(run.pages);
        if let (Some(leaf), Some(last)) = (self.last_leaf, &mut self.last_run)
            && last.try_extend(&run)
        {
            let at = RUNS + self.leaf_used.saturating_sub(1) * Run::SIZE;
            put(shim.page(leaf), at, &last.to_bytes());
        } else {
            let leaf = match self.last_leaf {
                Some(leaf) if self.leaf_used < RUNS_PER_LEAF => leaf,
                _ => self.add_leaf(shim, spare)?,
            };
            let page = shim.page(leaf);
            put(page, RUNS + self.leaf_used * Run::SIZE, &run.to_bytes());
            self.leaf_used += 1;
            put_u32(page, COUNT, self.leaf_used as u32);
            self.runs += 1;
            self.last_run = Some(run);
        }
        match ListKind::from_u8(run.list) {
            Some(ListKind::Read) => self.pages_read += pages,
            _ => self.pages_written += pages,
        }
        Ok(())
    }

    /// Adds an empty leaf at the end, with an index page where the last is full.
    fn add_leaf<S: Shim>(&mut self, shim: &mut S, spare: &mut Self) -> Result<Pfn, Errno> {
        let leaf = spare.take(shim).or_else(|| shim.allocate()).ok_or(Errno::ENOMEM)?;
        let index = match self.last_index {
            Some(index) if self.index_used < LEAVES_PER_INDEX => index,
            last => {
                let Some(index) = spare.take(shim).or_else(|| shim.allocate()) else {
                    shim.free(leaf);
                    return Err(Errno::ENOMEM);
                };
                start_page(shim.page(index), INDEX_MAGIC, self.generation);
                put_u64(shim.page(index), NEXT, NO_PFN);
                match last {
                    Some(last) => put_u64(shim.page(last), NEXT, index.0),
                    None => self.first = Some(index),
                }
                self.last_index = Some(index);
                self.index_used = 0;
                self.index_pages += 1;
                index
            }
        };
        start_page(shim.page(leaf), LEAF_MAGIC, self.generation);
        let page = shim.page(index);
        put_u64(page, LEAVES + self.index_used * 8, leaf.0);
        self.index_used += 1;
        put_u32(page, COUNT, self.index_used as u32);
        self.leaf_pages += 1;
        self.last_leaf = Some(leaf);
        self.leaf_used = 0;
        Ok(leaf)
    }

    /// Takes any page off the chain, from its beginning, for another use. The index page that loses a leaf loses its
    /// generation too, so that a late reader of the chain notices.
    ///
    /// From then on the chain can only be taken apart further: its end is not kept.
    fn take<S: Shim>(&mut self, shim: &mut S) -> Option<Pfn> {
        let index = self.first?;
        let page = shim.page(index);
        put_u64(page, GENERATION, 0);
        let used = (get_u32(page, COUNT) as usize).min(LEAVES_PER_INDEX);
        if let Some(left) = used.checked_sub(1) {
            put_u32(page, COUNT, left as u32);
            self.leaf_pages = self.leaf_pages.saturating_sub(1);
            return Some(Pfn(get_u64(page, LEAVES + left * 8)));
        }
        self.first = next_index(page);
        self.index_pages = self.index_pages.saturating_sub(1);
        Some(index)
    }

    /// Frees all pages.
    pub fn free<S: Shim>(&mut self, shim: &mut S) {
        while let Some(page) = self.take(shim) {
            shim.free(page);
        }
        *self = Self::new(Generation(self.generation));
    }

    /// Goes back to `mark`, an earlier state of this chain, and frees the pages that came after it.
    pub fn truncate<S: Shim>(&mut self, shim: &mut S, mark: Self) {
        let mut after = Self::EMPTY;
        match mark.last_index {
            None => after.first = self.first,
            Some(index) => {
                let page = shim.page(index);
                after.first = next_index(page);
                let used = (get_u32(page, COUNT) as usize).min(LEAVES_PER_INDEX);
                put_u32(page, COUNT, mark.index_used as u32);
                put_u64(page, NEXT, NO_PFN);
                for slot in mark.index_used..used {
                    let leaf = Pfn(get_u64(shim.page(index), LEAVES + slot * 8));
                    shim.free(leaf);
                }
            }
        }
        after.free(shim);
        if let (Some(leaf), Some(run)) = (mark.last_leaf, mark.last_run) {
            let page = shim.page(leaf);
            put_u32(page, COUNT, mark.leaf_used as u32);
            put(page, RUNS + mark.leaf_used.saturating_sub(1) * Run::SIZE, &run.to_bytes());
        }
        *self = mark;
    }
}

fn start_page(page: &mut [u8; PAGE_SIZE], magic: u32, generation: u64) {
    put_u64(page, GENERATION, generation);
    put_u32(page, COUNT, 0);
    put_u32(page, 0, magic);
}

fn next_index(page: &[u8; PAGE_SIZE]) -> Option<Pfn> {
    let next = get_u64(page, NEXT);
    (next != NO_PFN).then_some(Pfn(next))
}
