//! The report file: what a migration did, for people and programs that look at it later.
//!
//! JSON with a version. Whoever opens one did not necessarily write it, so [`parse`] takes nothing on trust: length, version, form,
//! and every number from which something is drawn or allocated.

mod date;
mod store;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use date::Date;
pub use store::{DIRECTORY, DIRECTORY_VARIABLE, StoreProblem, default_path, directory, newest, write};

use crate::command::Outcome;
use crate::control::HelperKind;
use crate::memory_map::{MapProblem, MemoryMap};
use crate::timeline::{
    self, MARKS_MAX, Mark, SAMPLES_MAX, SamplesProblem, SourceSample, TargetSample, WireSample,
};

/// Version of the file's form. A file of another version is refused by name.
pub const VERSION: u32 = 1;
/// Longest file in bytes. The longest that is written has some 2 MB: a map of unlike cells only.
pub const LENGTH_MAX: u64 = 8 << 20;
/// Longest text of any field.
const TEXT_MAX: usize = 4096;
/// Most settings or versions.
const ENTRIES_MAX: usize = 64;

/// A migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportFile {
    /// [`VERSION`].
    pub poolskip_report: u32,
    /// When the command began.
    pub began: Date,
    /// Name of the domain.
    pub domain: String,
    /// Where it went: host and port.
    pub target: String,
    /// The helper that both sides ran.
    pub helper: HelperKind,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed.
    pub error: Option<String>,
    /// From the command's start to the end of xl.
    pub total_seconds: f64,
    /// How long the domain stood still, as far as that was seen.
    pub downtime: Option<Downtime>,
    /// Bytes over the network, payload of all connections in both directions, as the kernel counts them.
    pub wire_bytes: u64,
    /// Bytes that libxenguest wrote at the source: what the stock helper would have sent for the same passes.
    pub stock_bytes: Option<u64>,
    /// What was asked for: options by name.
    pub settings: BTreeMap<String, String>,
    /// What ran: versions by program.
    pub versions: BTreeMap<String, String>,
    /// What it did from second to second.
    pub timeline: Timeline,
    /// How each page travelled the last time; none of a migration with libxl's own helper.
    pub memory: Option<MemoryMap>,
    /// The summary, as `migrate --json` writes it.
    pub summary: Value,
}

/// How long the domain stood still.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Downtime {
    /// So long.
    pub seconds: f64,
    /// Seen by whom.
    pub seen: SeenBy,
}

/// Who saw how long the domain stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeenBy {
    /// The source: from the suspension until xl told that the domain runs at the target. A little more than the guest notices.
    Source,
    /// A program in the guest that looks at the clock all the time.
    Guest,
}

/// What a migration did from second to second.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeline {
    /// When the source's helper began, in seconds since the command did: the zero of `source` and `marks`.
    pub helper_began_seconds: f64,
    /// The source's filter.
    pub source: Vec<SourceSample>,
    /// What happened when, at the source.
    pub marks: Vec<Mark>,
    /// The target's filter, by the clock of its own helper. Its last sample is the end of the stream, as the source's is.
    pub target: Vec<TargetSample>,
    /// The connections.
    pub wire: Vec<WireSample>,
}

/// Why a file is no report.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// Too long.
    #[error("it has {found} bytes, and a report has at most {LENGTH_MAX}")]
    Length {
        /// Its length.
        found: u64,
    },
    /// No JSON, or not ours.
    #[error("it is not a report of `dom0-migrator migrate`: {0}")]
    Form(#[from] serde_json::Error),
    /// Another version.
    #[error(
        "it has the form of version {found}, and this program reads version {VERSION}: use the release that wrote it"
    )]
    Version {
        /// Its version.
        found: u64,
    },
    /// A number that cannot be.
    #[error("{field} is {value}, which cannot be")]
    Number {
        /// Which.
        field: &'static str,
        /// Its value.
        value: f64,
    },
    /// A text that is too long, or too many of them.
    #[error("{field} is too long: {found}, {most} at most")]
    Text {
        /// Which.
        field: &'static str,
        /// Bytes, or entries.
        found: usize,
        /// Most of them.
        most: usize,
    },
    /// Samples that cannot be.
    #[error("timeline.{field}: {problem}")]
    Samples {
        /// Which.
        field: &'static str,
        /// What.
        problem: SamplesProblem,
    },
    /// A map that cannot be.
    #[error("memory: {0}")]
    Map(#[from] MapProblem),
}

/// Reads a report.
///
/// # Errors
/// [`ParseError`]: what is wrong, and where.
pub fn parse(bytes: &[u8]) -> Result<ReportFile, ParseError> {
    #[derive(Deserialize)]
    struct Versioned {
        poolskip_report: u64,
    }
    if bytes.len() as u64 > LENGTH_MAX {
        return Err(ParseError::Length { found: bytes.len() as u64 });
    }
    // First the version alone, so that a file of another one is not called malformed.
    let found = serde_json::from_slice::<Versioned>(bytes)?.poolskip_report;
    if found != u64::from(VERSION) {
        return Err(ParseError::Version { found });
    }
    let report: ReportFile = serde_json::from_slice(bytes)?;
    report.check()?;
    Ok(report)
}

impl ReportFile {
    /// Checks what the form alone does not say.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), ParseError> {
        let times = [
            ("total_seconds", Some(self.total_seconds)),
            ("downtime.seconds", self.downtime.as_ref().map(|downtime| downtime.seconds)),
            ("timeline.helper_began_seconds", Some(self.timeline.helper_began_seconds)),
        ];
        for (field, value) in times {
            if let Some(value) = value.filter(|value| !(0.0..1e9).contains(value)) {
                return Err(ParseError::Number { field, value });
            }
        }
        let texts = [
            ("domain", self.domain.len()),
            ("target", self.target.len()),
            ("error", self.error.as_ref().map_or(0, String::len)),
        ];
        for (field, found) in texts {
            if found > TEXT_MAX {
                return Err(ParseError::Text { field, found, most: TEXT_MAX });
            }
        }
        for (field, entries) in [("settings", &self.settings), ("versions", &self.versions)] {
            if entries.len() > ENTRIES_MAX {
                return Err(ParseError::Text { field, found: entries.len(), most: ENTRIES_MAX });
            }
            let longest = entries.iter().map(|(name, value)| name.len().max(value.len())).max();
            if let Some(found) = longest.filter(|&longest| longest > TEXT_MAX) {
                return Err(ParseError::Text { field, found, most: TEXT_MAX });
            }
        }
        let samples = |field| move |problem| ParseError::Samples { field, problem };
        let Timeline { source, marks, target, wire, .. } = &self.timeline;
        timeline::check(source, SAMPLES_MAX, true).map_err(samples("source"))?;
        timeline::check(target, SAMPLES_MAX, true).map_err(samples("target"))?;
        timeline::check(wire, SAMPLES_MAX, true).map_err(samples("wire"))?;
        timeline::check(marks, MARKS_MAX, false).map_err(samples("marks"))?;
        self.memory.as_ref().map_or(Ok(()), MemoryMap::check)?;
        Ok(())
    }

    /// A number of the summary, by its JSON pointer.
    pub fn number(&self, pointer: &str) -> Option<u64> {
        self.summary.pointer(pointer)?.as_u64()
    }

    /// A text of the summary, by its JSON pointer.
    pub fn text(&self, pointer: &str) -> Option<&str> {
        self.summary.pointer(pointer)?.as_str()
    }

    /// When the target's helper began by the source's helper's clock, taken from the end of the stream, which both have seen.
    pub fn target_offset(&self) -> Option<f64> {
        let (source, target) = (self.timeline.source.last()?, self.timeline.target.last()?);
        Some(source.seconds - target.seconds)
    }
}

#[cfg(test)]
mod tests;
