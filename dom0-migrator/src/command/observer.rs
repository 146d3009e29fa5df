//! What `migrate` sees of a migration: it is shown while it goes on, and becomes the report file.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use super::metrics::Metrics;
use super::progress::{Progress, Status};
use super::remaining::{Estimator, Remaining};
use super::summary::{Outcome, Summary};
use super::{Migrate, connection};
use crate::control::HelperKind;
use crate::engine::Travel;
use crate::memory_map::MemoryMap;
use crate::report_file::{self, Date, Downtime, ReportFile, SeenBy, Timeline};
use crate::timeline::{
    INTERVAL, MARKS_MAX, Mark, Moment, Recorder, SourceSample, TargetSample, WireSample, milliseconds,
};

/// What xl says when the target has told that the domain runs there.
const RUNS_THERE: &str = "Target reports successful startup";

/// Sees a migration.
#[derive(Debug)]
pub struct Observer {
    began: Instant,
    date: Date,
    /// Shows it.
    pub progress: Progress,
    metrics: Metrics,
    source: Recorder<SourceSample>,
    marks: Vec<Mark>,
    wire: Recorder<WireSample>,
    wire_rate: f64,
    estimator: Estimator,
    /// Pass, pages done and pages in it.
    pass: (u32, u64, u64),
    helper_began: Option<Duration>,
    runs_there: Option<Duration>,
    travel: Travel,
}

/// What was seen, once the migration is over.
#[derive(Debug)]
pub struct Observed {
    date: Date,
    metrics: Metrics,
    source: Vec<SourceSample>,
    marks: Vec<Mark>,
    wire: Vec<WireSample>,
    helper_began: Option<Duration>,
    runs_there: Option<Duration>,
    travel: Travel,
    /// From the target's report.
    pub target: Vec<TargetSample>,
}

impl Observer {
    /// Begins.
    pub fn new(began: Instant, progress: Progress, metrics: Metrics) -> Self {
        Self {
            began,
            date: Date::now(),
            progress,
            metrics,
            source: Recorder::default(),
            marks: Vec::new(),
            wire: Recorder::default(),
            wire_rate: 0.0,
            estimator: Estimator::default(),
            pass: (0, 0, 0),
            helper_began: None,
            runs_there: None,
            travel: Travel::default(),
        }
    }

    /// The source's helper is there.
    pub fn helper_began(&mut self) {
        self.helper_began.get_or_insert(self.began.elapsed());
    }

    /// The source's helper tells its counters.
    pub fn sampled(&mut self, sample: SourceSample) {
        self.source.push(sample);
    }

    /// The source's helper tells what happens.
    pub fn marked(&mut self, mark: Mark) {
        if let Moment::Round { number, pages } = mark.what {
            self.estimator.round(self.began.elapsed().as_secs_f64(), number, pages);
            self.pass = (number, 0, pages.unwrap_or(0));
        }
        if self.marks.len() < MARKS_MAX {
            self.marks.push(mark);
        }
    }

    /// The source's helper tells how each page travelled.
    pub fn travelled(&mut self, travel: Travel) {
        self.travel = travel;
    }

    /// A pass is this far.
    pub fn passed(&mut self, round: u32, done: u64, total: u64) {
        self.estimator.progress(self.began.elapsed().as_secs_f64(), done, total);
        self.pass = (round, done, total);
    }

    /// xl says something.
    pub fn line(&mut self, line: &str) {
        if line.contains(RUNS_THERE) {
            self.runs_there.get_or_insert(self.began.elapsed());
        }
        self.progress.line(line);
    }

    /// Looks at the connections, if it is time to; `bytes` counts them.
    pub fn tick(&mut self, bytes: impl FnOnce() -> u64) {
        let now = self.began.elapsed();
        let seconds = now.as_secs_f64();
        let before = self.wire.last().unwrap_or_default();
        if seconds - before.seconds < INTERVAL.as_secs_f64() {
            return;
        }
        let bytes = bytes();
        self.wire_rate = bytes.saturating_sub(before.bytes) as f64 / (seconds - before.seconds);
        self.wire.push(WireSample { seconds: milliseconds(seconds), bytes });
        let status = self.status();
        self.progress.status(&status);
        self.metrics.running(&status);
    }

    /// How far it is.
    pub fn status(&self) -> Status {
        let seconds = self.began.elapsed().as_secs_f64();
        let (round, done, total) = self.pass;
        Status {
            seconds,
            round,
            done,
            total,
            wire_bytes: self.wire.last().map_or(0, |sample| sample.bytes),
            wire_rate: self.wire_rate,
            source: self.source.last(),
            remaining: if round == 0 { Remaining::Unknown } else { self.estimator.remaining(seconds) },
        }
    }

    /// The end, with the last count of the connections' bytes.
    pub fn finish(mut self, bytes: u64) -> Observed {
        self.progress.finish();
        let seconds = milliseconds(self.began.elapsed().as_secs_f64());
        self.wire.push(WireSample { seconds, bytes });
        Observed {
            date: self.date,
            metrics: self.metrics,
            source: self.source.finish(),
            marks: self.marks,
            wire: self.wire.finish(),
            helper_began: self.helper_began,
            runs_there: self.runs_there,
            travel: self.travel,
            target: Vec::new(),
        }
    }
}

impl Observed {
    /// Both sides have said their last words since: so many bytes went in all.
    pub fn carried_in_all(&mut self, bytes: u64) {
        if let Some(last) = self.wire.last_mut() {
            last.bytes = bytes;
        }
    }

    /// Writes the report and the last figures.
    pub fn close(mut self, options: &Migrate, summary: &Summary) {
        let mut metrics = std::mem::take(&mut self.metrics);
        let report = self.report(options, summary);
        metrics.over(&report);
        write_report(&report, options.report.as_deref());
    }

    /// The report file, of this and the summary.
    fn report(self, options: &Migrate, summary: &Summary) -> ReportFile {
        let helper_began = self.helper_began.unwrap_or_default();
        let downtime = self.downtime(summary.outcome);
        let stock_bytes = summary.source.as_ref().and_then(|source| source.get("bytes_in")?.as_u64());
        ReportFile {
            poolskip_report: report_file::VERSION,
            began: self.date,
            domain: summary.domain.clone(),
            target: connection::with_port(&options.target),
            helper: summary.helper,
            outcome: summary.outcome,
            error: summary.error.clone(),
            total_seconds: milliseconds(summary.total_seconds),
            downtime,
            wire_bytes: summary.wire_bytes,
            stock_bytes: match summary.helper {
                HelperKind::Poolskip => stock_bytes,
                // What was compressed counts as what it was.
                HelperKind::Stock => Some(summary.stream.as_ref().map_or(summary.wire_bytes, |stream| {
                    (summary.wire_bytes + stream.bytes_before).saturating_sub(stream.bytes_after)
                })),
            },
            settings: settings(options),
            versions: versions(),
            timeline: Timeline {
                helper_began_seconds: milliseconds(helper_began.as_secs_f64()),
                source: self.source,
                marks: self.marks,
                target: self.target,
                wire: self.wire,
            },
            memory: MemoryMap::of(&self.travel),
            summary: serde_json::to_value(summary).unwrap_or_default(),
        }
    }

    /// From the suspension to xl's word that the domain runs at the target.
    fn downtime(&self, outcome: Outcome) -> Option<Downtime> {
        let suspended = self.marks.iter().find(|mark| mark.what == Moment::Suspended)?.seconds;
        let runs_there = self.runs_there.filter(|_| outcome == Outcome::Migrated)?.as_secs_f64();
        let seconds = runs_there - self.helper_began?.as_secs_f64() - suspended;
        (seconds >= 0.0).then(|| Downtime { seconds: milliseconds(seconds), seen: SeenBy::Source })
    }
}

/// Writes the report where it is wanted, and says where. What happened to the domain does not depend on it.
fn write_report(report: &ReportFile, path: Option<&Path>) {
    let default;
    let path = match path {
        Some(path) => path,
        None => {
            default = report_file::default_path(&report.domain, report.began);
            &default
        }
    };
    match report_file::write(report, path) {
        Ok(()) => eprintln!("report: {} (`dom0-migrator report` makes a page of it)", path.display()),
        Err(problem) => eprintln!("dom0-migrator: warning: {problem}"),
    }
}

fn settings(options: &Migrate) -> BTreeMap<String, String> {
    let yes_or_no = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    BTreeMap::from([
        ("references".into(), yes_or_no(!options.no_references && !options.stock)),
        (
            "the log of dirty pages looked at".into(),
            if options.no_peek || options.stock { "no" } else { "as configured" }.into(),
        ),
        ("all memory compared at the end".into(), yes_or_no(options.debug)),
        (
            "patience for the guest's lists".into(),
            options.wait_lists.map_or_else(|| "as configured".to_owned(), |seconds| format!("{seconds} s")),
        ),
        ("window".into(), format!("{} MiB", crate::engine::Config::default().window_bytes >> 20)),
    ])
}

fn versions() -> BTreeMap<String, String> {
    let mut versions = BTreeMap::from([("dom0-migrator".into(), env!("CARGO_PKG_VERSION").into())]);
    if let Ok(release) = crate::xen::release::Release::running() {
        versions.insert("Xen at the source".into(), release.to_string());
    }
    if let Ok(kernel) = std::fs::read_to_string("/proc/sys/kernel/osrelease") {
        versions.insert("Linux at the source".into(), kernel.trim().chars().take(128).collect());
    }
    versions
}
