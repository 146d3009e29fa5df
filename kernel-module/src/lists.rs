//! The published lists and the generation that is being made.

use core::mem::offset_of;

use enlightenment::list::{NO_PFN, ROOT_ACTIVE_OFFSET, ROOT_MAGIC, ROOT_SLOTS_OFFSET, Root, Slot};
use enlightenment::{ABI_VERSION, Generation, PAGE_SIZE, Pfn, Run};

use crate::wire::{put_u32, put_u64};
use crate::{Chain, Errno, Shim};

/// What the probe counted; the module only hands it on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames in the read list.
    pub frames_read: u64,
    /// Frames in the written list.
    pub frames_written: u64,
    /// Clean frames of the pool.
    pub pool_frames_clean: u64,
    /// Frames of the pool.
    pub pool_frames: u64,
}

/// The lists in guest memory: a root page, two slots, and at most one open generation.
///
/// # What a reader in dom0 may rely on
/// The slot that `active` names, and its pages, are written only before the store to `active` that publishes them; that
/// store comes after all others. The pages of the generation before are left alone too, until the *next* one is begun: then
/// they are its first supply of pages, and each index page that is taken apart loses its generation number before anything else,
/// each leaf gets the new number before new runs. What is left of them goes back to the kernel only when the new generation
/// is published. So a reader that checks the generation of each page, and `active` when it is done, has read one generation
/// whole or knows that it has not.
///
/// The numbers of generations rise, but may leave gaps: one that was dropped is not used again.
#[derive(Debug)]
pub struct Lists {
    root: Option<Pfn>,
    active: u64,
    last: u64,
    slots: [Chain; 2],
    open: Option<Open>,
}

/// A generation that is being made.
#[derive(Debug)]
struct Open {
    chain: Chain,
    /// Pages of the generation that its slot held before.
    spare: Chain,
}

impl Lists {
    /// No lists, and no page.
    pub const fn new() -> Self {
        const EMPTY: Chain = Chain::EMPTY;
        Self { root: None, active: 0, last: 0, slots: [EMPTY; 2], open: None }
    }

    /// Allocates the root page, with nothing published.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn start<S: Shim>(&mut self, shim: &mut S) -> Result<(), Errno> {
        let instance = shim.random();
        let root = shim.allocate().ok_or(Errno::ENOMEM)?;
        let page = shim.page(root);
        put_u32(page, offset_of!(Root, version), ABI_VERSION);
        put_u32(page, offset_of!(Root, page_size), PAGE_SIZE as u32);
        put_u64(page, offset_of!(Root, instance), instance);
        for parity in 0..2 {
            put_slot(page, parity, &Chain::EMPTY, &Counts::default());
        }
        put_u64(page, offset_of!(Root, magic), ROOT_MAGIC);
        self.root = Some(root);
        Ok(())
    }

    /// Frees everything, the root page too.
    pub fn stop<S: Shim>(&mut self, shim: &mut S) {
        self.withdraw(shim);
        if let Some(root) = self.root.take() {
            put_u64(shim.page(root), offset_of!(Root, magic), 0);
            shim.free(root);
        }
    }

    /// PFN of the root page.
    pub fn root_pfn(&self) -> Option<Pfn> {
        self.root
    }

    /// The published generation, 0 for none.
    pub fn active(&self) -> u64 {
        self.active
    }

    /// Guest pages that are held now.
    pub fn list_pages(&self) -> u64 {
        let open = self.open.as_ref().map_or(0, |open| open.chain.list_pages() + open.spare.list_pages());
        u64::from(self.root.is_some()) + self.slots.iter().map(Chain::list_pages).sum::<u64>() + open
    }

    /// Begins a generation and returns its number; one that is open is dropped.
    pub fn begin<S: Shim>(&mut self, shim: &mut S) -> u64 {
        self.drop_open(shim);
        self.last += 1;
        if self.active != 0 && self.last & 1 == self.active & 1 {
            self.last += 1;
        }
        let parity = (self.last & 1) as usize;
        if let Some(root) = self.root {
            put_slot(shim.page(root), parity, &Chain::EMPTY, &Counts::default());
        }
        let spare = core::mem::replace(&mut self.slots[parity], Chain::EMPTY);
        self.open = Some(Open { chain: Chain::new(Generation(self.last)), spare });
        self.last
    }

    /// Drops the open generation, if there is one.
    pub fn drop_open<S: Shim>(&mut self, shim: &mut S) {
        if let Some(mut open) = self.open.take() {
            open.chain.free(shim);
            open.spare.free(shim);
        }
    }

    /// Whether this generation is open.
    ///
    /// # Errors
    /// `ESTALE` when it is not.
    pub fn check_open(&self, generation: u64) -> Result<(), Errno> {
        match &self.open {
            Some(open) if open.chain.generation == generation => Ok(()),
            _ => Err(Errno::ESTALE),
        }
    }

    /// A mark for [`Self::rewind`].
    pub fn mark(&self) -> Option<Chain> {
        self.open.as_ref().map(|open| open.chain)
    }

    /// Takes back all that was appended since the mark.
    pub fn rewind<S: Shim>(&mut self, shim: &mut S, mark: Chain) {
        if let Some(open) = &mut self.open {
            open.chain.truncate(shim, mark);
        }
    }

    /// Appends a run to the open generation.
    ///
    /// # Errors
    /// `ESTALE` when none is open, `ENOMEM`; nothing is appended then.
    pub fn append<S: Shim>(&mut self, shim: &mut S, run: Run) -> Result<(), Errno> {
        let open = self.open.as_mut().ok_or(Errno::ESTALE)?;
        open.chain.append(shim, &mut open.spare, run)
    }

    /// Publishes the open generation.
    ///
    /// # Errors
    /// `ESTALE` when it is not this one; nothing changes then.
    pub fn publish<S: Shim>(&mut self, shim: &mut S, generation: u64, counts: &Counts) -> Result<(), Errno> {
        self.check_open(generation)?;
        let root = self.root.ok_or(Errno::ESTALE)?;
        let mut open = self.open.take().ok_or(Errno::ESTALE)?;
        let parity = (generation & 1) as usize;
        let page = shim.page(root);
        put_slot(page, parity, &open.chain, counts);
        put_u64(page, offset_of!(Root, pool_frames_clean), counts.pool_frames_clean);
        put_u64(page, offset_of!(Root, pool_frames), counts.pool_frames);
        shim.store_release(root, ROOT_ACTIVE_OFFSET, generation);
        self.active = generation;
        self.slots[parity] = open.chain;
        open.spare.free(shim);
        Ok(())
    }

    /// Publishes that there is nothing, and frees all pages but the root.
    pub fn withdraw<S: Shim>(&mut self, shim: &mut S) {
        if let Some(root) = self.root {
            shim.store_release(root, ROOT_ACTIVE_OFFSET, 0);
            let page = shim.page(root);
            for parity in 0..2 {
                put_slot(page, parity, &Chain::EMPTY, &Counts::default());
            }
            put_u64(page, offset_of!(Root, pool_frames_clean), 0);
            put_u64(page, offset_of!(Root, pool_frames), 0);
        }
        self.active = 0;
        self.drop_open(shim);
        for slot in &mut self.slots {
            slot.free(shim);
        }
    }
}

impl Default for Lists {
    fn default() -> Self {
        Self::new()
    }
}

fn put_slot(page: &mut [u8; PAGE_SIZE], parity: usize, chain: &Chain, counts: &Counts) {
    let base = ROOT_SLOTS_OFFSET + parity * size_of::<Slot>();
    put_u64(page, base + offset_of!(Slot, generation), chain.generation);
    put_u64(page, base + offset_of!(Slot, first_index_pfn), chain.first.map_or(NO_PFN, |pfn| pfn.0));
    put_u32(page, base + offset_of!(Slot, index_pages), chain.index_pages);
    put_u32(page, base + offset_of!(Slot, reserved), 0);
    put_u64(page, base + offset_of!(Slot, leaf_pages), chain.leaf_pages);
    put_u64(page, base + offset_of!(Slot, runs), chain.runs);
    put_u64(page, base + offset_of!(Slot, pages_read), chain.pages_read);
    put_u64(page, base + offset_of!(Slot, pages_written), chain.pages_written);
    put_u64(page, base + offset_of!(Slot, frames_read), counts.frames_read);
    put_u64(page, base + offset_of!(Slot, frames_written), counts.frames_written);
}
