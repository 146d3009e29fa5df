//! The summary of a migration, made of what its processes report.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::bundle::{BlocksReport, Compression};
use crate::control::{HelperKind, TargetOutcome};
use crate::disks::RefusedDisk;
use crate::lists::ListsReport;
use crate::report::{BytesByClass, CarriedReport, SaveReport};

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The domain runs at the target.
    Migrated,
    /// It runs on here.
    Failed,
    /// It runs on here, since a signal came.
    Interrupted,
    /// The link broke in xl's last handshake.
    Undefined,
}

/// What went over the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WireBytes {
    /// xl's stream, both directions.
    pub stream: u64,
    /// The side channel, both directions.
    pub side: u64,
    /// The control connection, both directions.
    pub control: u64,
}

impl WireBytes {
    /// All of it.
    pub fn total(self) -> u64 {
        self.stream + self.side + self.control
    }
}

/// The summary. A number that a run does not have is null: the stock helper tells nothing, so of its runs only what can be seen
/// from outside is known.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Name of the domain.
    pub domain: String,
    /// The helper that both sides ran.
    pub helper: HelperKind,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed.
    pub error: Option<String>,
    /// From the command's start to the end of xl.
    pub total_seconds: f64,
    /// Bytes over the network, payload of all three connections in both directions, as the kernel counts them.
    pub wire_bytes: u64,
    /// The same by connection.
    pub wire: WireBytes,
    /// The stream in blocks; null when it went over one connection as it is.
    pub stream: Option<BlocksReport>,
    /// Passes over memory. For the stock helper, told from frame numbers that go down (may be too few).
    pub rounds: Option<u32>,
    /// Pages whose content went over the network, once each time; those sent to be compared not counted.
    pub pages_sent: Option<u64>,
    /// Pages that were left for a later pass, each time, since they were written to again before they were sent.
    pub pages_left_out: Option<u64>,
    /// Zero pages that went as markers.
    pub pages_zero: Option<u64>,
    /// Pages that went by reference.
    pub pages_referenced: Option<u64>,
    /// Of these: loaded from storage.
    pub pages_accepted: Option<u64>,
    /// Of these: refused, so that the page itself was sent.
    pub pages_refused: Option<u64>,
    /// Of these: overtaken by a newer copy before they were settled.
    pub pages_superseded: Option<u64>,
    /// Of these: not settled in time, so that the page itself was sent.
    pub pages_replaced: Option<u64>,
    /// Pages sent once more to be compared.
    pub pages_verified: Option<u64>,
    /// Bytes of the stream by what they were.
    pub bytes: Option<BytesByClass>,
    /// The guest's lists.
    pub lists: Option<ListsReport>,
    /// Why there were none.
    pub lists_problem: Option<String>,
    /// Disks of the domain whose pages never go by reference.
    pub disks_refused: Vec<RefusedDisk>,
    /// Pages that differed at the target; null when nothing was compared.
    pub verify_mismatches: Option<u64>,
    /// Pages that differed since they were written after the suspension, by backends or by Xen: nothing is lost by it.
    pub verify_late_writes: Option<u64>,
    /// All counters of the source's filter.
    pub source: Option<serde_json::Value>,
    /// What the target reports.
    pub target: Option<TargetOutcome>,
}

/// What a summary is made of.
#[derive(Debug)]
pub struct Parts {
    /// Name of the domain.
    pub domain: String,
    /// The helper that both sides ran.
    pub helper: HelperKind,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed.
    pub error: Option<String>,
    /// From the command's start to the end of xl.
    pub total_seconds: f64,
    /// Bytes over the network.
    pub wire: WireBytes,
    /// The stream in blocks.
    pub stream: Option<BlocksReport>,
    /// The source's helper's report.
    pub save: Option<SaveReport>,
    /// The carrier's report.
    pub carried: Option<CarriedReport>,
    /// Disks whose pages never go by reference.
    pub disks_refused: Vec<RefusedDisk>,
    /// The target's report.
    pub target: Option<TargetOutcome>,
}

impl Summary {
    /// Makes it.
    pub fn new(parts: Parts) -> Self {
        let Parts {
            domain,
            helper,
            outcome,
            error,
            total_seconds,
            wire,
            stream,
            save,
            carried,
            disks_refused,
            target,
        } = parts;
        let passed = carried.and_then(|carried| carried.pages).filter(|_| helper == HelperKind::Stock);
        let save = save.as_ref();
        let saved = |number: fn(&SaveReport) -> u64| save.map(number);
        Self {
            domain,
            helper,
            outcome,
            error,
            total_seconds,
            wire_bytes: wire.total(),
            wire,
            stream,
            rounds: save.map(|save| save.rounds).or(passed.map(|passed| passed.rounds)),
            pages_sent: saved(|save| save.pages_sent).or(passed.map(|passed| passed.sent)),
            pages_left_out: saved(|save| save.pages_left_out),
            pages_zero: saved(|save| save.pages_zero),
            pages_referenced: saved(|save| save.pages_referenced),
            pages_accepted: saved(|save| save.pages_accepted),
            pages_refused: saved(|save| save.pages_refused),
            pages_superseded: saved(|save| save.pages_superseded),
            pages_replaced: saved(|save| save.pages_replaced),
            pages_verified: saved(|save| save.pages_verified).or(passed.map(|passed| passed.verified)),
            bytes: save.map(|save| save.bytes),
            lists: save.and_then(|save| save.lists.clone()),
            lists_problem: save.and_then(|save| save.lists_problem.clone()),
            verify_mismatches: target.as_ref().and_then(|target| match &target.restore {
                Some(restore) => restore.verify_mismatches,
                // The stock helper only logs, so nothing logged means something only if pages were sent to be compared.
                None => passed.filter(|passed| passed.verified > 0).map(|_| target.mismatch_lines),
            }),
            disks_refused,
            verify_late_writes: target
                .as_ref()
                .and_then(|target| target.restore.as_ref()?.verify_late_writes),
            source: save.map(|save| save.engine.clone()),
            target,
        }
    }
}

/// Bytes, as people read them.
pub fn bytes(count: u64) -> String {
    match count {
        0..10_000 => format!("{count} B"),
        10_000..10_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<22} {value}");
        let count = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
        row("domain", self.domain.clone())?;
        row("outcome", format!("{:?}", self.outcome).to_lowercase())?;
        if let Some(error) = &self.error {
            row("reason", error.clone())?;
        }
        row("time", format!("{:.1} s", self.total_seconds))?;
        row("on the wire", bytes(self.wire_bytes))?;
        if let Some(BlocksReport { connections, compression, chosen, bytes_before, bytes_after }) =
            &self.stream
        {
            row("connections", connections.to_string())?;
            if *compression != Compression::Off {
                row("compressed", format!("{} to {}", bytes(*bytes_before), bytes(*bytes_after)))?;
            }
            if let Some(chosen) = chosen {
                row("  chosen", chosen.clone())?;
            }
        }
        row("passes", count(self.rounds.map(u64::from)))?;
        row("pages sent", count(self.pages_sent))?;
        if let Some(left @ 1..) = self.pages_left_out {
            row("  left for later", left.to_string())?;
        }
        row("zero pages", count(self.pages_zero))?;
        row("by reference", count(self.pages_referenced))?;
        row("  loaded", count(self.pages_accepted))?;
        row("  refused", count(self.pages_refused))?;
        row("  overtaken", count(self.pages_superseded))?;
        row("  not in time", count(self.pages_replaced))?;
        if let Some(lists) = &self.lists {
            let frames = format!(
                "{} read and {} written, {} clean of {}",
                lists.frames_read, lists.frames_written, lists.pool_frames_clean, lists.pool_frames
            );
            row("frames listed", frames)?;
            row("  cached files", format!("{} pages", lists.pages_of_cached_files()))?;
        } else if let Some(problem) = &self.lists_problem {
            row("no lists", problem.clone())?;
        }
        for RefusedDisk { disk, reason } in &self.disks_refused {
            row("disk not referenced", format!("{disk}: {reason}"))?;
        }
        if let Some(mismatches) = self.verify_mismatches {
            row("compared", format!("{} pages, {mismatches} differ", count(self.pages_verified)))?;
            if let Some(late) = self.verify_late_writes.filter(|&late| late > 0) {
                row("  written late", format!("{late} more, after the suspension"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{CarriedPages, RestoreReport};

    fn parts(helper: HelperKind, save: Option<SaveReport>) -> Parts {
        let restore = RestoreReport { verify_mismatches: Some(2), ..RestoreReport::default() };
        Parts {
            domain: "db1".into(),
            helper,
            outcome: Outcome::Migrated,
            error: None,
            total_seconds: 1.5,
            wire: WireBytes { stream: 100, side: 20, control: 3 },
            stream: None,
            save,
            carried: Some(CarriedReport {
                pages: Some(CarriedPages { sent: 9, verified: 0, rounds: 2 }),
                ..CarriedReport::default()
            }),
            disks_refused: Vec::new(),
            target: Some(TargetOutcome { restore: Some(restore), ..TargetOutcome::default() }),
        }
    }

    #[test]
    fn a_stock_run_has_what_was_seen_and_null_for_the_rest() {
        let json = serde_json::to_value(Summary::new(parts(HelperKind::Stock, None))).unwrap();
        assert_eq!(json["helper"], "stock");
        assert_eq!((&json["pages_sent"], &json["rounds"]), (&9.into(), &2.into()));
        assert_eq!(json["pages_referenced"], serde_json::Value::Null);
        assert_eq!(json["wire_bytes"], 123);
        assert_eq!(json["verify_mismatches"], 2);
    }

    #[test]
    fn our_own_run_counts_for_itself() {
        let save = SaveReport { pages_sent: 4, rounds: 3, ..SaveReport::default() };
        let json = serde_json::to_value(Summary::new(parts(HelperKind::Poolskip, Some(save)))).unwrap();
        assert_eq!((&json["pages_sent"], &json["rounds"]), (&4.into(), &3.into()));
        assert_eq!(json["verify_mismatches"], 2);
    }
}
