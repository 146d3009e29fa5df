//! What the processes of a migration report, and the one summary that is made of it.

use serde::{Deserialize, Serialize};

use crate::engine::{self, Travel};
use crate::lists::ListsReport;
use crate::timeline::TargetSample;

/// Bytes of the memory stream by what they were, as the source's filter counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BytesByClass {
    /// Contents of pages: sent the first time, sent again, refused or compared.
    pub page_data: u64,
    /// References: places and hashes.
    pub references: u64,
    /// Markers of zero pages and of pages that have no content.
    pub markers: u64,
    /// Headers, frame numbers and records that are not memory.
    pub other: u64,
}

/// What the source's helper did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SaveReport {
    /// Why the save failed, when it did.
    pub error: Option<String>,
    /// From the start of the helper to the end of the save.
    pub seconds: f64,
    /// Passes over memory, the last one included.
    pub rounds: u32,
    /// Pages whose content went over the network, those compared in the end not counted.
    pub pages_sent: u64,
    /// Pages that were left for a later pass, each time, since they were written to again before they were sent.
    #[serde(default)]
    pub pages_left_out: u64,
    /// Zero pages that went as markers.
    pub pages_zero: u64,
    /// Pages that went by reference.
    pub pages_referenced: u64,
    /// Of these: loaded from storage by the target.
    pub pages_accepted: u64,
    /// Of these: refused by the target.
    pub pages_refused: u64,
    /// Of these: overtaken by a newer copy.
    pub pages_superseded: u64,
    /// Of these: not settled in time, and sent after all.
    pub pages_replaced: u64,
    /// Pages that were sent once more to be compared.
    pub pages_verified: u64,
    /// Bytes by class.
    pub bytes: BytesByClass,
    /// Whether the target answered on the side channel.
    pub side_channel: bool,
    /// The guest's lists, when there were any.
    pub lists: Option<ListsReport>,
    /// Why there were none.
    pub lists_problem: Option<String>,
    /// All counters of the filter.
    pub engine: serde_json::Value,
    /// How each page travelled the last time; handed over apart from the rest.
    #[serde(skip)]
    pub travel: Travel,
}

impl SaveReport {
    /// Takes over what the filter counted.
    pub fn count(&mut self, summary: &engine::SourceSummary) {
        let stats = &summary.stats;
        self.rounds = stats.rounds;
        self.pages_sent = stats.pages_raw + stats.references_refused + stats.references_replaced;
        self.pages_left_out = stats.pages_left_out;
        self.pages_zero = stats.pages_zero;
        self.pages_referenced = stats.pages_referenced;
        self.pages_accepted = stats.references_accepted;
        self.pages_refused = stats.references_refused;
        self.pages_superseded = stats.references_superseded;
        self.pages_replaced = stats.references_replaced;
        self.pages_verified = stats.pages_verified;
        self.bytes = BytesByClass {
            page_data: stats.bytes_page_data,
            references: stats.bytes_references,
            markers: stats.bytes_markers,
            other: stats.bytes_other,
        };
        self.side_channel = summary.poolskip;
        self.engine = serde_json::to_value(summary).unwrap_or_default();
    }
}

/// What the target's helper did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// Why the restore failed, when it did.
    pub error: Option<String>,
    /// Whether it failed only since the source stopped in the middle.
    pub cut_short: bool,
    /// From the start of the helper to the end of the restore.
    pub seconds: f64,
    /// Whether pages were compared at the end.
    pub verified: bool,
    /// Pages that differed; none when nothing was compared. Without those of `verify_late_writes`.
    pub verify_mismatches: Option<u64>,
    /// Pages that differed since the source itself did not send the same bytes again: something wrote to them after the suspension.
    /// Xen's own comparison counts these too.
    #[serde(default)]
    pub verify_late_writes: Option<u64>,
    /// All counters of the filter.
    pub engine: serde_json::Value,
    /// What it did from second to second.
    #[serde(default)]
    pub timeline: Vec<TargetSample>,
}

/// What went through the carrier of xl's stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedReport {
    /// Bytes to the target.
    pub bytes_sent: u64,
    /// Bytes from the target.
    pub bytes_received: u64,
    /// Memory as a look at the passing stream counted it; none when the stream could not be followed.
    pub pages: Option<CarriedPages>,
}

/// Pages in a stream of libxl's that passed by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedPages {
    /// Pages with content, those after VERIFY not counted.
    pub sent: u64,
    /// Pages with content after VERIFY.
    pub verified: u64,
    /// Passes over memory. A pass is taken to begin where frame numbers go down, so one that happens to go on upwards from the
    /// one before is counted with it.
    pub rounds: u32,
}
