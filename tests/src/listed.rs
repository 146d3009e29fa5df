//! Lists held against the disk, byte for byte, while the server stands still.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use enlightenment::device::UserRun;
use guest_probe::control_blocks::BlocksError;
use guest_probe::left_out::LeftOut;
use guest_probe::lists::ListSummary;
use guest_probe::session::Session;

use crate::disk::Disk;
use crate::truth::{Block, Memory, PAGE};

/// Bytes in a guest page.
pub const GUEST_PAGE: usize = 4096;

/// The lists as things are now; with a second look where that finds more, as for an answer to dom0.
///
/// # Errors
/// When the pool cannot be read.
pub fn lists(session: &mut Session) -> Result<(Vec<UserRun>, ListSummary)> {
    let mut once = || -> Result<(Vec<UserRun>, ListSummary, bool)> {
        let mut runs = Vec::new();
        let summary = session.lists(|piece| {
            runs.extend_from_slice(piece);
            Ok::<(), BlocksError>(())
        })?;
        let more = session.would_list_more(&summary);
        Ok((runs, summary, more))
    };
    let (runs, summary, more) = once()?;
    if !more {
        return Ok((runs, summary));
    }
    let (runs, summary, _) = once()?;
    Ok((runs, summary))
}

/// Compares all guest pages of the runs with the disk; returns how many there are. The server must stand still.
///
/// # Errors
/// When a page differs, or a run is on another disk.
pub fn compare(runs: &[UserRun], disk: &Disk, memory: &Memory) -> Result<u64> {
    let (major, minor) = disk.number()?;
    let mut pages = 0;
    for run in runs {
        ensure!(run.vdev == major << 20 | minor, "run {run:?} is on another disk");
        let length = usize::from(run.pages) * GUEST_PAGE;
        let in_memory = memory.read(run.address, length)?;
        let on_disk = disk.read(run.disk_offset, length)?;
        for (index, (left, right)) in in_memory.chunks(GUEST_PAGE).zip(on_disk.chunks(GUEST_PAGE)).enumerate()
        {
            ensure!(
                left == right,
                "guest page {index} of {run:?} differs from the disk; the heads of both frames: {} {}",
                head(&in_memory, index),
                head(&on_disk, index)
            );
        }
        pages += u64::from(run.pages);
    }
    Ok(pages)
}

/// The header of the frame that a guest page is a part of, as hexadecimal digits: checksum, number, neighbours, LSN and type of its page.
fn head(run: &[u8], guest_page: usize) -> String {
    let at = guest_page * GUEST_PAGE / PAGE * PAGE;
    run.iter().skip(at).take(38).map(|byte| format!("{byte:02x}")).collect()
}

/// Frames that could be listed, by control blocks that were read independently at the same moment: those at rest, without those that the lists
/// say can never be, or not at this moment, read from disk as they are.
pub fn could_be_listed(blocks: &BTreeMap<u64, Block>, lists: &ListSummary) -> u64 {
    const UNFIT: [LeftOut; 6] = [
        LeftOut::Stale,
        LeftOut::Temporary,
        LeftOut::Compressed,
        LeftOut::Encrypted,
        LeftOut::Hole,
        LeftOut::BeyondFile,
    ];
    let unfit: u64 = UNFIT.iter().filter_map(|reason| lists.left_out.get(reason)).sum();
    let at_rest = blocks.values().filter(|block| at_rest(block)).count() as u64;
    at_rest.saturating_sub(unfit)
}

/// Whether a frame could be listed, as far as its control block, read independently, says: a page of a file, as on disk, at rest.
pub fn at_rest(block: &Block) -> bool {
    block.is_file_page && !block.dirty && block.io_fix == 0 && block.fix_count == 0
}
