//! What was read of a guest's lists.

use std::time::Duration;

use enlightenment::ListKind;
use serde::{Deserialize, Serialize};

use super::walk::Walked;

/// What was read of a guest's lists, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ListsReport {
    /// The generation that was read.
    pub generation: u64,
    /// Frames in the read list, as the guest counted them.
    pub frames_read: u64,
    /// Frames in the written list, as the guest counted them.
    pub frames_written: u64,
    /// Frames of the pool.
    pub pool_frames: u64,
    /// Of these: clean ones, listed or not.
    pub pool_frames_clean: u64,
    /// Guest pages of the read list.
    pub pages_read: u64,
    /// Guest pages of the written list.
    pub pages_written: u64,
    /// Guest pages of both.
    pub pages_listed: u64,
    /// Runs that were read.
    pub runs: u64,
    /// Runs that were refused, since they cannot be right.
    pub runs_refused: u64,
    /// Pages of the lists that could not be mapped.
    pub list_pages_unreadable: u64,
    /// Times that the reading began anew, since the guest went on meanwhile.
    pub retries: u32,
    /// How long the answer was waited for; the guest may have been asked earlier, so that xl could start meanwhile.
    pub wait_seconds: f64,
    /// From the answer to the end of the reading.
    pub read_seconds: f64,
}

impl ListsReport {
    /// Of what a walk found.
    pub fn new(walked: &Walked, wait: Duration, read: Duration) -> Self {
        Self {
            generation: walked.slot.generation,
            frames_read: walked.slot.frames_read,
            frames_written: walked.slot.frames_written,
            pool_frames: walked.pool_frames,
            pool_frames_clean: walked.pool_frames_clean,
            pages_read: walked.map.pages(ListKind::Read),
            pages_written: walked.map.pages(ListKind::Written),
            pages_listed: walked.map.len(),
            runs: walked.runs,
            runs_refused: walked.runs_refused,
            list_pages_unreadable: walked.unreadable,
            retries: walked.retries,
            wait_seconds: wait.as_secs_f64(),
            read_seconds: read.as_secs_f64(),
        }
    }

    /// Guest pages that are listed and of no frame of a pool, so of the guest kernel's page cache: those beyond four for each listed frame. Of
    /// a frame that does not lie on disk in whole pages fewer are listed, so it may be some more.
    pub fn pages_of_cached_files(&self) -> u64 {
        let frames = self.frames_read.saturating_add(self.frames_written);
        self.pages_listed.saturating_sub(frames.saturating_mul(PAGES_IN_A_FRAME))
    }
}

/// Guest pages of 4 KiB in a frame of 16 KiB.
const PAGES_IN_A_FRAME: u64 = 4;
