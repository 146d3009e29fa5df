//! What `guest-probe status` shows: asked and answered over a Unix socket, one JSON object and the end of the stream.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use enlightenment::device::Stats;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::Mode;
use crate::coverage::TableCoverage;
use crate::frame_table::FrameCounts;
use crate::lists::ListSummary;
use crate::page_cache::CacheSummary;
use crate::statistics::ProgramStatistics;

/// Where `run` listens.
pub const SOCKET_PATH: &str = "/run/poolskip/probe.sock";

/// No answer is longer.
const LONGEST_ANSWER: u64 = 16 << 20;

/// A running probe's state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of guest-probe.
    pub version: String,
    /// When probes are in place.
    pub mode: Mode,
    /// Servers that are probed at this moment.
    pub servers: Vec<ServerStatus>,
    /// Servers that are to be probed and cannot be.
    pub refused: Vec<RefusedStatus>,
    /// Seconds since dom0's last request; none when there was none.
    pub seconds_since_request: Option<u64>,
    /// Requests that were answered.
    pub answers: u64,
    /// The last answer.
    pub last_answer: Option<Answer>,
    /// Whether what it published still is.
    pub published: bool,
    /// What failed last.
    pub last_error: Option<String>,
    /// Peak memory of the probe itself, in bytes.
    pub peak_memory_bytes: u64,
    /// Hints made wrong on purpose (`run --wrong-hints`).
    pub hints_made_wrong: u64,
    /// The kernel module's counters; none when it does not tell them.
    pub module: Option<ModuleStatus>,
}

/// What the kernel module has counted since it was loaded ([`enlightenment::device::Stats`]).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleStatus {
    /// Whether dom0 can find the lists.
    pub announced: bool,
    /// Whether dom0 has said that a migration has begun, and not yet that it has ended.
    pub migrating: bool,
    /// Requests that came from dom0.
    pub requests: u64,
    /// Signals to dom0.
    pub signals: u64,
    /// Generations and withdrawals that dom0 was not told of during a migration.
    pub untold: u64,
    /// Calls that published something.
    pub calls: u64,
    /// Generations published.
    pub generations: u64,
    /// Pages of the guest that hold lists now.
    pub list_pages: u64,
}

impl From<Stats> for ModuleStatus {
    fn from(stats: Stats) -> Self {
        Self {
            announced: stats.xen == 1,
            migrating: stats.migrating == 1,
            requests: stats.requests,
            signals: stats.signals,
            untold: stats.untold,
            calls: stats.calls,
            generations: stats.generations,
            list_pages: stats.list_pages,
        }
    }
}

/// A server that is probed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// The process.
    pub mysqld_pid: i32,
    /// The package of its build.
    pub mysqld_package: String,
    /// Its build id.
    pub mysqld_build_id: String,
    /// Probes in it.
    pub probes: u64,
    /// Frames as the table has them.
    pub frames: FrameCounts,
    /// Events by kind.
    pub events: BTreeMap<String, u64>,
    /// Events for which the ring buffer had no room: each time a new snapshot is taken.
    pub events_lost: u64,
    /// Events whose control block could not be read; as above.
    pub events_unreadable: u64,
    /// Snapshots that were taken.
    pub snapshots: u64,
    /// Milliseconds that the last one took.
    pub snapshot_milliseconds: u64,
    /// What the eBPF programs cost so far; none unless the kernel counts (`statistics`).
    pub programs: Vec<ProgramStatistics>,
}

/// A server that is not probed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedStatus {
    /// The process.
    pub mysqld_pid: i32,
    /// Why not.
    pub why: String,
    /// Whether it stays so for as long as this process runs.
    pub is_final: bool,
}

/// An answered request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The request's number.
    pub sequence: u64,
    /// The generation that answers it.
    pub generation: u64,
    /// Servers whose frames are in it.
    pub servers: u64,
    /// Servers that could not be read at that moment, by PID, with the reason.
    pub left_out: BTreeMap<i32, String>,
    /// Guest pages that the module listed.
    pub pages_listed: u64,
    /// Guest pages that it could not translate.
    pub pages_unmapped: u64,
    /// Milliseconds from the request to the publication.
    pub milliseconds: u64,
    /// What became of the frames.
    pub lists: ListSummary,
    /// What became of the page cache; none when it is not listed.
    pub page_cache: Option<CacheSummary>,
    /// The same by table, those with the most frames first.
    pub tables: Vec<TableCoverage>,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.mode, self.servers.len()) {
            (Mode::OnDemand, 0) => writeln!(f, "mode        on demand: nothing is attached")?,
            (Mode::OnDemand, count) => writeln!(f, "mode        on demand: {count} mysqld attached")?,
            (Mode::Resident, count) => writeln!(f, "mode        resident: {count} mysqld attached")?,
        }
        for server in &self.servers {
            write!(f, "{server}")?;
        }
        for refused in &self.refused {
            let yet = if refused.is_final { "" } else { " yet" };
            writeln!(f, "not probed  process {}{yet}: {}", refused.mysqld_pid, refused.why)?;
        }
        match &self.last_answer {
            None => writeln!(f, "published   nothing yet")?,
            Some(answer) => {
                let withdrawn = if self.published { "" } else { " (withdrawn since)" };
                write!(f, "published   {answer}")?;
                writeln!(f, "{withdrawn}")?;
                if let Some(cache) = &answer.page_cache {
                    writeln!(f, "page cache  {cache}")?;
                }
                write_coverage(f, &answer.lists, &answer.tables)?;
                for (pid, why) in &answer.left_out {
                    writeln!(f, "left out    process {pid}: {why}")?;
                }
            }
        }
        if let Some(error) = &self.last_error {
            writeln!(f, "last error  {error}")?;
        }
        if self.hints_made_wrong > 0 {
            writeln!(f, "TEST AID    {} hints made wrong on purpose", self.hints_made_wrong)?;
        }
        write!(f, "memory      {} KiB at most", self.peak_memory_bytes / 1024)
    }
}

impl fmt::Display for ServerStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mysqld_pid, mysqld_package, probes, .. } = self;
        writeln!(f, "mysqld      process {mysqld_pid}, {mysqld_package}, {probes} probes")?;
        let FrameCounts { free, read, written, dirty } = self.frames;
        writeln!(f, "  frames    {read} read, {written} written and flushed, {dirty} dirty, {free} free")?;
        let events: Vec<_> = self.events.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        let events = if events.is_empty() { "none".to_owned() } else { events.join(", ") };
        writeln!(
            f,
            "  events    {events}; {} lost, {} unreadable",
            self.events_lost, self.events_unreadable
        )?;
        writeln!(f, "  snapshots {}, the last in {} ms", self.snapshots, self.snapshot_milliseconds)?;
        for program in self.programs.iter().filter(|program| program.runs > 0) {
            let each = program.nanoseconds / program.runs;
            writeln!(f, "  program   {}: {} runs, {each} ns each", program.name, program.runs)?;
        }
        Ok(())
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lists = &self.lists;
        write!(
            f,
            "generation {} for request {}: {} read and {} written frames of {} clean ones ({}), {} guest pages, in {} ms",
            self.generation,
            self.sequence,
            lists.frames_read,
            lists.frames_written,
            lists.pool_frames_clean,
            percent(lists.frames_read + lists.frames_written, lists.pool_frames_clean),
            self.pages_listed,
            self.milliseconds,
        )
    }
}

impl fmt::Display for CacheSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { files, pages, pages_changed, pages_without_place, .. } = self;
        write!(
            f,
            "{pages} guest pages of {files} files listed; left out: {pages_changed} changed, {pages_without_place} with no place"
        )?;
        for (reason, count) in &self.files_left_out {
            write!(f, ", {count} files ({})", reason.words())?;
        }
        write!(f, "; in {} ms", self.milliseconds)?;
        match &self.ended_early {
            None => Ok(()),
            Some(why) => write!(f, ". Not all files were looked at: {why}"),
        }
    }
}

/// Writes the frames that are left out by reason, and how many of each table are listed.
pub fn write_coverage(
    f: &mut fmt::Formatter<'_>,
    lists: &ListSummary,
    tables: &[TableCoverage],
) -> fmt::Result {
    for (reason, count) in &lists.left_out {
        writeln!(f, "left out    {count} frames: {}", reason.words())?;
    }
    if !tables.is_empty() {
        writeln!(f, "tables      {:>10} {:>10} {:>10} {:>7}", "read", "written", "left out", "listed")?;
    }
    for TableCoverage { table, coverage, .. } in tables {
        let listed = coverage.frames_read + coverage.frames_written;
        write!(
            f,
            "            {:>10} {:>10} {:>10} {:>7} {table}",
            coverage.frames_read,
            coverage.frames_written,
            coverage.left_out,
            percent(listed, coverage.frames())
        )?;
        for (index, (reason, count)) in coverage.reasons.iter().enumerate() {
            write!(f, "{} {count} {}", if index == 0 { ":" } else { "," }, reason.words())?;
        }
        writeln!(f)?;
    }
    Ok(())
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1} %", part as f64 * 100.0 / whole as f64) }
}

/// Why there is no status.
#[derive(Debug, Error)]
pub enum StatusError {
    /// Nobody listens.
    #[error("no guest-probe answers at {path}: {source} (start one with `guest-probe run`)")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The answer is none.
    #[error("guest-probe's answer cannot be read: {0}")]
    Answer(#[from] serde_json::Error),
    /// It broke off.
    #[error("guest-probe's answer broke off: {0}")]
    Read(io::Error),
}

/// Asks a running probe.
///
/// # Errors
/// [`StatusError`].
pub fn ask(path: &Path) -> Result<Status, StatusError> {
    let connect = |source| StatusError::Connect { path: path.to_path_buf(), source };
    let stream = UnixStream::connect(path).map_err(connect)?;
    // An answer in the making may take a while; a probe that hangs may not hang its asker.
    stream.set_read_timeout(Some(Duration::from_secs(60))).map_err(connect)?;
    let mut answer = Vec::new();
    stream.take(LONGEST_ANSWER).read_to_end(&mut answer).map_err(StatusError::Read)?;
    Ok(serde_json::from_slice(&answer)?)
}

/// The most memory that this process ever had, in bytes; 0 when the kernel does not say.
pub fn peak_memory_bytes() -> u64 {
    let status = procfs::process::Process::myself().and_then(|process| process.status());
    status.ok().and_then(|status| status.vmhwm).map_or(0, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::left_out::LeftOut;

    #[test]
    fn a_status_survives_the_socket() {
        let lists = ListSummary { left_out: [(LeftOut::Dirty, 3)].into(), ..ListSummary::default() };
        let mut table = TableCoverage { pid: 7, table: "a/b".into(), ..TableCoverage::default() };
        for reason in [LeftOut::Dirty, LeftOut::Dirty, LeftOut::InUse] {
            table.coverage.leave_out(reason);
        }
        let tables = vec![table];
        let server = ServerStatus {
            mysqld_pid: 7,
            events: [("free".to_owned(), 2)].into(),
            ..ServerStatus::default()
        };
        let status = Status {
            servers: vec![server],
            last_answer: Some(Answer { lists, tables, ..Answer::default() }),
            ..Status::default()
        };
        let json = serde_json::to_vec(&status).unwrap();
        assert_eq!(serde_json::from_slice::<Status>(&json).unwrap(), status);
        let words = status.to_string();
        assert!(words.contains("process 7") && words.contains("3 frames: dirty"), "{words}");
        assert!(words.contains("0.0 % a/b: 2 dirty, 1 in use by a thread\n"), "{words}");
    }

    #[test]
    fn a_page_cache_that_is_not_all_listed_is_said_with_what_is() {
        let cache = CacheSummary { files: 2, pages: 30, ..CacheSummary::default() };
        let words = |ended_early: Option<&str>| {
            let page_cache = Some(CacheSummary { ended_early: ended_early.map(Into::into), ..cache.clone() });
            let status =
                Status { last_answer: Some(Answer { page_cache, ..Answer::default() }), ..Status::default() };
            let words = status.to_string();
            let mut lines =
                words.lines().filter(|line| line.starts_with("page cache  30 guest pages of 2 files listed"));
            (lines.next().unwrap().to_owned(), lines.count())
        };
        let (line, more) = words(Some("the kernel does not say"));
        assert!(
            line.ends_with(". Not all files were looked at: the kernel does not say") && more == 0,
            "{line}"
        );
        assert!(!words(None).0.contains("Not all"), "{}", words(None).0);
    }

    #[test]
    fn nobody_there_is_said() {
        let error = ask(Path::new("/nonexistent/probe.sock")).unwrap_err().to_string();
        assert!(error.contains("guest-probe run"), "{error}");
    }
}
