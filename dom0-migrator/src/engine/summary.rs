//! What the filters did, in numbers.

use serde::Serialize;

use super::late_writes::LateWrites;
use super::travel::{Travel, WayCounts};

/// The source filter's counters; bytes are bytes, times are seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SourceStats {
    /// Bytes read from libxenguest.
    pub bytes_in: u64,
    /// Bytes written to the network.
    pub bytes_out: u64,
    /// Of these: page contents (raw, refused, resent and verified ones alike).
    pub bytes_page_data: u64,
    /// Of these: references (place and hash).
    pub bytes_references: u64,
    /// Of these: markers of zero pages and of runs without data.
    pub bytes_markers: u64,
    /// Of these: everything else (headers, PFN arrays, records that are not memory).
    pub bytes_other: u64,
    /// Entries with data that came in, VERIFY's not counted.
    pub pages_in: u64,
    /// Of these: sent as they are.
    pub pages_raw: u64,
    /// Of these: sent as zero markers.
    pub pages_zero: u64,
    /// Of these: sent as references.
    pub pages_referenced: u64,
    /// Entries with data in passes after the first: the page was written to meanwhile.
    pub pages_resent: u64,
    /// Of those that came in: left out, since the log of dirty pages had marked them again; they came once more in a later pass.
    pub pages_left_out: u64,
    /// Of the raw ones: page tables, which always go raw.
    pub pages_page_table: u64,
    /// Entries without data (unpopulated, broken).
    pub pages_without_data: u64,
    /// Pages that VERIFY sent again.
    pub pages_verified: u64,
    /// Pages that VERIFY brought other than they were sent last: written after the suspension, and told to the target.
    pub pages_written_late: u64,
    /// Listed pages that went raw since the window was full.
    pub pages_window_full: u64,
    /// Listed pages that went raw since the target has not opened their disk.
    pub pages_disk_missing: u64,
    /// References that the target accepted.
    pub references_accepted: u64,
    /// References that the target refused; the page itself followed unless it was superseded.
    pub references_refused: u64,
    /// Refused ones by reason.
    pub refused: RefusalCounts,
    /// References superseded by a newer entry before they were settled.
    pub references_superseded: u64,
    /// References that were not settled in time (drain timeout, end of memory, loss of the side channel): the page itself was sent.
    pub references_replaced: u64,
    /// References outstanding now.
    pub references_outstanding: u64,
    /// Most references outstanding at once.
    pub references_outstanding_peak: u64,
    /// Passes over memory that have begun, the one after suspension included.
    pub rounds: u32,
    /// Pages by the way that they went, each time that they went; VERIFY's not counted.
    pub ways: WayCounts,
    /// Time spent hashing.
    pub hashing_seconds: f64,
    /// Time that the drain before suspension took.
    pub drain_seconds: f64,
    /// Whether the side channel was lost (references then stop, the migration goes on).
    pub side_channel_lost: bool,
}

/// Refused references by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RefusalCounts {
    /// The bytes on the disk are others.
    pub hash: u64,
    /// The disk could not be read.
    pub io_error: u64,
    /// The place is not on the disk.
    pub out_of_bounds: u64,
    /// The target has no such disk.
    pub unknown_disk: u64,
}

impl RefusalCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.hash + self.io_error + self.out_of_bounds + self.unknown_disk
    }
}

/// One disk, as the target answered for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskSummary {
    /// The virtual device's number.
    pub vdev: u32,
    /// Its size on the target in bytes, 0 when it was not opened.
    pub size_bytes: u64,
    /// Why the target did not open it.
    pub problem: Option<String>,
}

/// What the source filter did, at the end.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SourceSummary {
    /// The counters.
    #[serde(flatten)]
    pub stats: SourceStats,
    /// Whether there was a side channel whose hello was answered.
    pub poolskip: bool,
    /// The disks, as the target answered.
    pub disks: Vec<DiskSummary>,
    /// Guest pages that the map placed on disks.
    pub pages_mapped: u64,
    /// How each page travelled the last time.
    #[serde(skip)]
    pub travel: Travel,
}

/// What [`drain`](super::SourceFilter::drain) did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct DrainReport {
    /// References outstanding when it began.
    pub outstanding: u64,
    /// Accepted while it waited.
    pub accepted: u64,
    /// Refused while it waited.
    pub refused: u64,
    /// Not settled in time: the page itself was sent.
    pub replaced: u64,
    /// Whether the target confirmed that everything has come through.
    pub synced: bool,
    /// How long it took.
    pub seconds: f64,
}

/// The target filter's counters.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TargetStats {
    /// Bytes read from the network.
    pub bytes_in: u64,
    /// Bytes written to libxenguest.
    pub bytes_out: u64,
    /// Pages that came as they are.
    pub pages_raw: u64,
    /// Pages that came as zero markers.
    pub pages_zero: u64,
    /// Entries without data.
    pub pages_without_data: u64,
    /// Pages that came as references.
    pub references: u64,
    /// Of these: read from disk and accepted.
    pub references_accepted: u64,
    /// Of these: refused, by reason.
    pub refused: RefusalCounts,
    /// Of these: superseded by a newer entry before they were loaded.
    pub references_superseded: u64,
    /// References outstanding now.
    pub references_outstanding: u64,
    /// Most references outstanding at once.
    pub references_outstanding_peak: u64,
    /// Reads from disks.
    pub disk_reads: u64,
    /// Bytes read from disks.
    pub disk_bytes: u64,
    /// Time that all reader threads spent reading.
    pub disk_seconds: f64,
    /// Time that all reader threads spent hashing.
    pub hashing_seconds: f64,
    /// Whether the side channel was lost.
    pub side_channel_lost: bool,
}

/// What the target filter did, at the end.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TargetSummary {
    /// The counters.
    #[serde(flatten)]
    pub stats: TargetStats,
    /// Whether there was a side channel whose hello came.
    pub poolskip: bool,
    /// The disks.
    pub disks: Vec<DiskSummary>,
    /// Pages that were written after the suspension: VERIFY brings other bytes than were sent last.
    #[serde(skip)]
    pub late_writes: LateWrites,
}
