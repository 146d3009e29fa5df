//! What `guest-probe status` shows: asked and answered over a Unix socket, one JSON object and the end of the stream.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::frame_table::FrameCounts;
use crate::lists::ListSummary;
use crate::statistics::ProgramStatistics;

/// Where `run` listens.
pub const SOCKET_PATH: &str = "/run/poolskip/probe.sock";

/// No answer is longer.
const LONGEST_ANSWER: u64 = 16 << 20;

/// A running probe's state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The mysqld that is probed.
    pub mysqld_pid: i32,
    /// The package of its build.
    pub mysqld_package: String,
    /// Frames as the table has them.
    pub frames: FrameCounts,
    /// Events by kind.
    pub events: BTreeMap<String, u64>,
    /// Events that did not arrive.
    pub events_lost: u64,
    /// Snapshots that were taken.
    pub snapshots: u64,
    /// Milliseconds that the last one took.
    pub snapshot_milliseconds: u64,
    /// Requests that were answered.
    pub answers: u64,
    /// The last answer.
    pub last_answer: Option<Answer>,
    /// What the last request failed of.
    pub last_error: Option<String>,
    /// What the eBPF programs cost so far; zeros unless `run --statistics` was said.
    pub programs: Vec<ProgramStatistics>,
    /// Peak memory of the probe itself, in bytes.
    pub peak_memory_bytes: u64,
    /// Hints made wrong on purpose (`run --wrong-hints`).
    pub hints_made_wrong: u64,
}

/// An answered request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The request's number.
    pub sequence: u64,
    /// The generation that answers it.
    pub generation: u64,
    /// Guest pages that the module listed.
    pub pages_listed: u64,
    /// Guest pages that it could not translate.
    pub pages_unmapped: u64,
    /// Milliseconds from the request to the publication.
    pub milliseconds: u64,
    /// What became of the frames.
    pub lists: ListSummary,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "mysqld      process {}, {}", self.mysqld_pid, self.mysqld_package)?;
        let FrameCounts { free, read, written, dirty } = self.frames;
        writeln!(f, "frames      {read} read, {written} written and flushed, {dirty} dirty, {free} free")?;
        let events: Vec<_> = self.events.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        writeln!(f, "events      {}; {} lost", events.join(", "), self.events_lost)?;
        writeln!(f, "snapshots   {}, the last in {} ms", self.snapshots, self.snapshot_milliseconds)?;
        match &self.last_answer {
            None => writeln!(f, "published   nothing yet")?,
            Some(answer) => {
                let lists = &answer.lists;
                writeln!(
                    f,
                    "published   generation {} for request {}: {} read and {} written frames of {} clean ones, {} guest pages, in {} ms",
                    answer.generation,
                    answer.sequence,
                    lists.frames_read,
                    lists.frames_written,
                    lists.pool_frames_clean,
                    answer.pages_listed,
                    answer.milliseconds,
                )?;
                for (reason, count) in &lists.left_out {
                    writeln!(f, "left out    {count} frames: {}", reason.words())?;
                }
            }
        }
        if let Some(error) = &self.last_error {
            writeln!(f, "last error  {error}")?;
        }
        for program in self.programs.iter().filter(|program| program.runs > 0) {
            let each = program.nanoseconds / program.runs;
            writeln!(f, "program     {}: {} runs, {each} ns each", program.name, program.runs)?;
        }
        if self.hints_made_wrong > 0 {
            writeln!(f, "TEST AID    {} hints made wrong on purpose", self.hints_made_wrong)?;
        }
        write!(f, "memory      {} KiB at most", self.peak_memory_bytes / 1024)
    }
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
        let status = Status {
            mysqld_pid: 7,
            last_answer: Some(Answer { lists, ..Answer::default() }),
            events: [("free".to_owned(), 2)].into(),
            ..Status::default()
        };
        let json = serde_json::to_vec(&status).unwrap();
        assert_eq!(serde_json::from_slice::<Status>(&json).unwrap(), status);
        let words = status.to_string();
        assert!(words.contains("process 7") && words.contains("3 frames: dirty"), "{words}");
    }

    #[test]
    fn nobody_there_is_said() {
        let error = ask(Path::new("/nonexistent/probe.sock")).unwrap_err().to_string();
        assert!(error.contains("guest-probe run"), "{error}");
    }
}
