//! The lists: which frames are as on disk at this moment, and where.
//!
//! **The rule at the moment of use.** A frame is listed when the frame table trusts it *and* its control block, read now, says the
//! same: the page of a file, the same page, nothing unflushed, no I/O under way, used by no thread, of a living tablespace that is neither
//! temporary nor compressed nor encrypted. The table alone does not know of a change that is half done; the blocks alone do not
//! tell a frame that was written to from one that was not.

use std::collections::BTreeMap;

use enlightenment::device::UserRun;
use enlightenment::{ListKind, PAGE_SIZE};
use serde::{Deserialize, Serialize};

use crate::control_blocks::{BlocksError, ControlBlock, ControlBlocks, SpacesInMemory};
use crate::coverage::Coverage;
use crate::frame_table::{FrameAddr, FrameState, FrameTable};
use crate::left_out::LeftOut;
use crate::memory::Memory;
use crate::spaces::SpaceFlags;
use crate::storage_map::{DiskPiece, StorageMap, unfit};

/// Runs that are handed over at once.
const RUNS_AT_ONCE: usize = 16_384;

/// What became of the frames of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListSummary {
    /// Frames of the pool.
    pub pool_frames: u64,
    /// Frames with a page that is as on disk.
    pub pool_frames_clean: u64,
    /// Frames in the read list.
    pub frames_read: u64,
    /// Frames in the written list.
    pub frames_written: u64,
    /// Guest pages in both.
    pub pages: u64,
    /// Runs that they make.
    pub runs: u64,
    /// Frames with a page that are in neither, by reason.
    pub left_out: BTreeMap<LeftOut, u64>,
    /// The same by tablespace; [`crate::coverage`] makes of it what people read.
    #[serde(skip)]
    pub by_space: BTreeMap<u32, Coverage>,
}

impl ListSummary {
    /// Adds what became of another pool; tablespaces are each server's own and stay behind.
    pub fn add(&mut self, other: &Self) {
        self.pool_frames += other.pool_frames;
        self.pool_frames_clean += other.pool_frames_clean;
        self.frames_read += other.frames_read;
        self.frames_written += other.frames_written;
        self.pages += other.pages;
        self.runs += other.runs;
        for (reason, count) in &other.left_out {
            *self.left_out.entry(*reason).or_default() += count;
        }
    }
}

/// Builds the lists and hands them to `sink`, piece by piece, in order of the frames' addresses within a chunk.
///
/// # Errors
/// When the control blocks cannot be read, or `sink` fails.
pub fn build<M: Memory, E>(
    blocks: &ControlBlocks<'_, M>,
    mut spaces: SpacesInMemory<'_, M>,
    table: &FrameTable,
    storage: &mut StorageMap<'_>,
    mut sink: impl FnMut(&mut [UserRun]) -> Result<(), E>,
) -> Result<ListSummary, ListError<E>> {
    let mut summary = ListSummary::default();
    let mut runs = Runs::default();
    let mut pieces = Vec::with_capacity(4);
    let mut failed = None;
    for chunk in blocks.chunks()? {
        blocks.for_each(chunk, |block| {
            summary.pool_frames += 1;
            if !block.is_file_page || failed.is_some() {
                return;
            }
            if block.oldest == 0 && !block.io_pending {
                summary.pool_frames_clean += 1;
            }
            let listed = judge(&block, table.get(block.frame), &mut spaces)
                .and_then(|kind| storage.pieces(block.page, &mut pieces).map(|()| kind));
            match listed {
                Ok(kind) => {
                    let of_space = summary.by_space.entry(block.page.space).or_default();
                    match kind {
                        ListKind::Read => {
                            summary.frames_read += 1;
                            of_space.frames_read += 1;
                        }
                        ListKind::Written => {
                            summary.frames_written += 1;
                            of_space.frames_written += 1;
                        }
                    }
                    for piece in &pieces {
                        summary.pages += u64::from(piece.pages);
                        runs.push(block.frame, piece, kind);
                    }
                    if runs.len() >= RUNS_AT_ONCE {
                        summary.runs += runs.len() as u64;
                        failed = runs.hand_over(&mut sink).err();
                    }
                }
                Err(reason) => {
                    *summary.left_out.entry(reason).or_default() += 1;
                    summary.by_space.entry(block.page.space).or_default().leave_out(reason);
                }
            }
        })?;
    }
    if let Some(error) = failed {
        return Err(ListError::Sink(error));
    }
    summary.runs += runs.len() as u64;
    runs.hand_over(&mut sink).map_err(ListError::Sink)?;
    Ok(summary)
}

/// Why lists were not built.
#[derive(Debug, thiserror::Error)]
pub enum ListError<E> {
    /// The control blocks cannot be read.
    #[error(transparent)]
    Blocks(#[from] BlocksError),
    /// Who takes the lists did not.
    #[error("{0}")]
    Sink(E),
}

/// The list of a frame by its control block and the table.
fn judge<M: Memory>(
    block: &ControlBlock,
    state: Option<FrameState>,
    spaces: &mut SpacesInMemory<'_, M>,
) -> Result<ListKind, LeftOut> {
    if block.oldest != 0 {
        return Err(LeftOut::Dirty);
    }
    if block.io_pending {
        return Err(LeftOut::IoPending);
    }
    if block.fix_count != 0 {
        return Err(LeftOut::InUse);
    }
    let kind = match state {
        Some(FrameState::Read(page)) if page == block.page => ListKind::Read,
        Some(FrameState::Written(page)) if page == block.page => ListKind::Written,
        // It may have been dirtied at this very moment; or it was cleaned while a snapshot was taken, which the next one heals.
        _ => return Err(LeftOut::TableDiffers),
    };
    if block.compressed {
        return Err(LeftOut::Compressed);
    }
    let space = spaces.get(block.space).ok_or(LeftOut::Stale)?;
    if space.deleted || space.id != block.page.space || space.version != block.version {
        return Err(LeftOut::Stale);
    }
    unfit(SpaceFlags(space.flags)).map_or(Ok(kind), Err)
}

/// Runs on their way.
#[derive(Default)]
pub(crate) struct Runs(Vec<UserRun>);

impl Runs {
    pub(crate) fn push(&mut self, frame: FrameAddr, piece: &DiskPiece, kind: ListKind) {
        let run = UserRun {
            address: frame.0.wrapping_add(piece.offset),
            disk_offset: piece.disk_offset,
            vdev: piece.vdev.0,
            pages: piece.pages,
            list: kind as u8,
            reserved: 0,
        };
        if !self.0.last_mut().is_some_and(|last| try_extend(last, &run)) {
            self.0.push(run);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn hand_over<E>(
        &mut self,
        sink: &mut impl FnMut(&mut [UserRun]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.0.is_empty() {
            return Ok(());
        }
        sink(&mut self.0)?;
        self.0.clear();
        Ok(())
    }
}

/// Appends a run to the one before if it continues it in memory and on disk.
fn try_extend(run: &mut UserRun, next: &UserRun) -> bool {
    let Some(pages) = run.pages.checked_add(next.pages) else { return false };
    let length = u64::from(run.pages) * PAGE_SIZE as u64;
    let joins = (run.vdev, run.list) == (next.vdev, next.list)
        && run.address.checked_add(length) == Some(next.address)
        && run.disk_offset.checked_add(length) == Some(next.disk_offset);
    if joins {
        run.pages = pages;
    }
    joins
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Catalogue;
    use crate::frame_table::PageId;
    use crate::memory::fake::FakeMemory;

    const ID: PageId = PageId { space: 7, page: 3 };
    const SPACE: u64 = 0x5000;

    fn block() -> ControlBlock {
        ControlBlock {
            page: ID,
            is_file_page: true,
            compressed: false,
            fix_count: 0,
            io_pending: false,
            reading: false,
            newest: 0,
            oldest: 0,
            space: SPACE,
            version: 2,
            frame: FrameAddr(0x10_0000),
        }
    }

    fn judged(
        block: &ControlBlock,
        state: Option<FrameState>,
        flags: u32,
        deleted: u8,
    ) -> Result<ListKind, LeftOut> {
        let catalogue = Catalogue::built_in().unwrap();
        let build = catalogue.find("cc8a18826385d7182761a4a8f41044748267244d").unwrap();
        let mut space = vec![0; build.space_bytes()];
        space[0x18..0x1c].copy_from_slice(&7_u32.to_le_bytes());
        space[0x1c..0x20].copy_from_slice(&2_u32.to_le_bytes());
        space[0x28] = deleted;
        space[0x90..0x94].copy_from_slice(&flags.to_le_bytes());
        let memory = FakeMemory(vec![(SPACE, space)]);
        judge(block, state, &mut SpacesInMemory::new(&memory, build))
    }

    #[test]
    fn a_frame_is_listed_when_table_and_block_agree() {
        assert_eq!(judged(&block(), Some(FrameState::Read(ID)), 0, 0), Ok(ListKind::Read));
        assert_eq!(judged(&block(), Some(FrameState::Written(ID)), 0, 0), Ok(ListKind::Written));
    }

    #[test]
    fn one_doubt_is_enough() {
        let read = Some(FrameState::Read(ID));
        let other = Some(FrameState::Read(PageId { space: 7, page: 4 }));
        for state in [None, Some(FrameState::Free), Some(FrameState::Dirty(ID)), other] {
            assert_eq!(judged(&block(), state, 0, 0), Err(LeftOut::TableDiffers));
        }
        type Doubt = fn(&mut ControlBlock);
        let doubts: [(Doubt, LeftOut); 7] = [
            (|block| block.oldest = 1, LeftOut::Dirty),
            (|block| block.io_pending = true, LeftOut::IoPending),
            (|block| block.fix_count = 1, LeftOut::InUse),
            (|block| block.compressed = true, LeftOut::Compressed),
            (|block| block.version = 1, LeftOut::Stale),
            (|block| block.space = 0, LeftOut::Stale),
            (|block| block.space = 0x9999, LeftOut::Stale),
        ];
        for (doubt, reason) in doubts {
            let mut block = block();
            doubt(&mut block);
            assert_eq!(judged(&block, read, 0, 0), Err(reason));
        }
        assert_eq!(judged(&block(), read, 0, 1), Err(LeftOut::Stale));
        assert_eq!(judged(&block(), read, 0x1000, 0), Err(LeftOut::Temporary));
        assert_eq!(judged(&block(), read, 0x2000, 0), Err(LeftOut::Encrypted));
        assert_eq!(judged(&block(), read, 0x2, 0), Err(LeftOut::Compressed));
    }

    #[test]
    fn neighbours_become_one_run() {
        let mut runs = Runs::default();
        let piece = |offset, disk_offset, pages| DiskPiece {
            offset,
            vdev: enlightenment::Vdev(51712),
            disk_offset,
            pages,
        };
        runs.push(FrameAddr(0x10_0000), &piece(0, 0x8000, 4), ListKind::Read);
        runs.push(FrameAddr(0x10_4000), &piece(0, 0xc000, 2), ListKind::Read);
        runs.push(FrameAddr(0x10_4000), &piece(0x2000, 0x20_0000, 2), ListKind::Read);
        runs.push(FrameAddr(0x10_8000), &piece(0, 0x20_2000, 4), ListKind::Written);
        let shapes: Vec<_> = runs.0.iter().map(|run| (run.address, run.disk_offset, run.pages)).collect();
        assert_eq!(shapes, [(0x10_0000, 0x8000, 6), (0x10_6000, 0x20_0000, 2), (0x10_8000, 0x20_2000, 4)]);
    }
}
