//! The records on disk: one file for each migration and side, replaced as a whole and flushed before anything follows from it.
//!
//! ```text
//! /var/lib/poolskip/migrations/
//!   ID-source.json      what happened, and the state         ID-source.lock    held by the process that works on it
//!   ID-source.progress  how far it is, for `status`          ID-source.cancel  is there when it is to be given up
//! ```
//!
//! The lock is the kernel's (`flock`): it ends with its process, however that ends, so a record whose lock is free has nobody.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::{IllegalStep, SourceState, State, TargetState};
use crate::control::Token;
use crate::xen::DomainId;

/// Where records are kept.
pub const DIRECTORY: &str = "/var/lib/poolskip/migrations";
/// Environment variable that names another place.
pub const ENVIRONMENT: &str = "POOLSKIP_MIGRATIONS";
/// Version of the file's form.
const VERSION: u32 = 1;
/// Longest record that is read; a real one has less than 2 KiB.
const RECORD_MAX: u64 = 64 * 1024;
/// Closed records that are kept, the newest of each side.
const CLOSED_KEPT: usize = 100;

/// Which side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Where the domain comes from.
    Source,
    /// Where it goes to.
    Target,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// Why a record could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A file could not be read or written.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not a record of ours.
    #[error(
        "{path} is no record of a migration: {problem}; move it away when you know what became of the domain"
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Another process works on it.
    #[error("migration {id} is being worked on by a running command; `dom0-migrator cancel {id}` ends it")]
    Busy {
        /// The migration.
        id: Token,
    },
    /// The source may not take this step.
    #[error(transparent)]
    Source(#[from] IllegalStep<super::SourceEvent>),
    /// The target may not take this step.
    #[error(transparent)]
    Target(#[from] IllegalStep<super::TargetEvent>),
}

/// A process of this host, told apart from later ones of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it began, in the kernel's ticks after boot (field 22 of `/proc/PID/stat`).
    pub began: u64,
}

impl Process {
    /// A running process.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before it may have spaces and brackets of its own.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_whitespace();
        let dead = matches!(fields.next()?, "Z" | "X");
        let began = fields.nth(18)?.parse().ok()?;
        (!dead).then_some(Self { pid, began })
    }

    /// Whether it still runs.
    pub fn runs(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content<S> {
    /// Version of this form.
    pub version: u32,
    /// The migration, the same on both sides.
    pub id: Token,
    /// The side.
    pub side: Side,
    /// Name of the domain, as it is when it runs.
    pub domain: String,
    /// Its number on this host; at the target not known before it is created.
    pub domain_id: Option<DomainId>,
    /// The other host: for the source where to ask, for the target where it came from.
    pub peer: String,
    /// This host's boot (`/proc/sys/kernel/random/boot_id`): after another one, no domain of before is here.
    pub boot: String,
    /// xl, while it runs.
    pub xl: Option<Process>,
    /// The state.
    pub state: S,
    /// All states so far, and when, in seconds after 1970.
    pub history: Vec<(S, u64)>,
    /// What went wrong, in words.
    pub note: Option<String>,
}

/// The directory.
#[derive(Clone, Debug)]
pub struct Records {
    directory: PathBuf,
}

/// A record that this process works on.
#[derive(Debug)]
pub struct Record<S> {
    content: Content<S>,
    path: PathBuf,
    /// The file that says how far it is, and the bytes in it.
    shown: Option<(File, usize)>,
    _lock: Flock<File>,
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> RecordError + 'a {
    move |source| RecordError::Io { what, path: path.to_owned(), source }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// This host's boot.
pub fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Replaces a file as a whole: after this either the old or the new content is there, and on disk.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), RecordError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    #[cfg(test)]
    crate::engine::fault::point(directory, crate::engine::fault::Point::RecordWrite)
        .map_err(io_error("write", path))?;
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(io_error("write beside", path))?;
    file.write_all(bytes).map_err(io_error("write", path))?;
    file.as_file().sync_all().map_err(io_error("flush", path))?;
    file.persist(path).map_err(|error| io_error("replace", path)(error.error))?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(io_error("flush beside", path))
}

impl Records {
    /// The directory that the environment or else the configuration names, made if it is not there.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn open(configured: Option<&Path>) -> Result<Self, RecordError> {
        let directory = std::env::var_os(ENVIRONMENT)
            .map(PathBuf::from)
            .or_else(|| configured.map(Path::to_owned))
            .unwrap_or_else(|| DIRECTORY.into());
        fs::create_dir_all(&directory).map_err(io_error("make", &directory))?;
        Ok(Self { directory })
    }

    /// A directory that is there.
    #[cfg(test)]
    pub(crate) fn open_at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    fn path(&self, id: &Token, side: Side, kind: &str) -> PathBuf {
        self.directory.join(format!("{id}-{side}.{kind}"))
    }

    /// Begins a record in its first state, on disk when this returns.
    ///
    /// # Errors
    /// [`RecordError`], [`RecordError::Busy`] if there is one of that number already.
    pub fn begin<S: State>(
        &self,
        id: &Token,
        state: S,
        domain: &str,
        domain_id: Option<DomainId>,
        peer: &str,
    ) -> Result<Record<S>, RecordError> {
        let lock = self.lock(id, S::SIDE)?;
        let path = self.path(id, S::SIDE, "json");
        if path.exists() {
            return Err(RecordError::Busy { id: id.clone() });
        }
        let content = Content {
            version: VERSION,
            id: id.clone(),
            side: S::SIDE,
            domain: domain.to_owned(),
            domain_id,
            peer: peer.to_owned(),
            boot: boot(),
            xl: None,
            state,
            history: vec![(state, now())],
            note: None,
        };
        let record = Record { content, path, shown: None, _lock: lock };
        record.write()?;
        Ok(record)
    }

    /// Takes over a record that nobody works on; none when there is none.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn take<S: State>(&self, id: &Token) -> Result<Option<Record<S>>, RecordError> {
        let path = self.path(id, S::SIDE, "json");
        if !path.exists() {
            return Ok(None);
        }
        let lock = self.lock(id, S::SIDE)?;
        // Read under the lock: it may have changed before.
        Ok(Some(Record { content: read(&path)?, path, shown: None, _lock: lock }))
    }

    fn lock(&self, id: &Token, side: Side) -> Result<Flock<File>, RecordError> {
        let path = self.path(id, side, "lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io_error("open", &path))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            nix::Error::EWOULDBLOCK => RecordError::Busy { id: id.clone() },
            error => io_error("lock", &path)(error.into()),
        })
    }

    /// Whether a process works on it.
    pub fn is_busy(&self, id: &Token, side: Side) -> bool {
        matches!(self.lock(id, side), Err(RecordError::Busy { .. }))
    }

    /// Numbers of all records of a side, in no order.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    fn ids(&self, side: Side) -> Result<Vec<Token>, RecordError> {
        let failed = io_error("read", &self.directory);
        let entries = fs::read_dir(&self.directory).map_err(failed)?;
        let end = format!("-{side}.json");
        Ok(entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(&end).and_then(Token::parse))
            .collect())
    }

    /// All records of a side, the oldest first. One that cannot be read is said and left out.
    ///
    /// # Errors
    /// [`RecordError::Io`] when the directory cannot be read.
    pub fn all<S: State>(&self) -> Result<Vec<Content<S>>, RecordError> {
        let mut all: Vec<Content<S>> = Vec::new();
        for id in self.ids(S::SIDE)? {
            match read(&self.path(&id, S::SIDE, "json")) {
                Ok(content) => all.push(content),
                Err(error) => tracing::error!(%error, "a record cannot be used"),
            }
        }
        all.sort_by_key(|content| (content.history.first().map(|(_, when)| *when), content.id.clone()));
        Ok(all)
    }

    /// All records of a side that are not closed.
    ///
    /// # Errors
    /// [`RecordError::Io`] when the directory cannot be read.
    pub fn open_ones<S: State>(&self) -> Result<Vec<Content<S>>, RecordError> {
        let mut all = self.all::<S>()?;
        all.retain(|content| content.state.duty() != super::Duty::Nothing);
        Ok(all)
    }

    /// Removes the oldest closed records.
    pub fn prune(&self) {
        fn oldest<S: State>(records: &Records) -> Vec<Token> {
            let mut closed = records.all::<S>().unwrap_or_default();
            closed.retain(|content| content.state.duty() == super::Duty::Nothing);
            let surplus = closed.len().saturating_sub(CLOSED_KEPT);
            closed.into_iter().take(surplus).map(|content| content.id).collect()
        }
        let surplus =
            [(Side::Source, oldest::<SourceState>(self)), (Side::Target, oldest::<TargetState>(self))];
        for (side, ids) in surplus {
            for id in ids.iter().filter(|id| !self.is_busy(id, side)) {
                for kind in ["json", "progress", "cancel", "lock"] {
                    let _ = fs::remove_file(self.path(id, side, kind));
                }
            }
        }
    }

    /// Asks the process that works on it to give up.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn ask_to_cancel(&self, id: &Token, side: Side) -> Result<(), RecordError> {
        let path = self.path(id, side, "cancel");
        File::create(&path).map(drop).map_err(io_error("write", &path))
    }

    /// How far it is, as its process last wrote it.
    pub fn progress(&self, id: &Token, side: Side) -> Option<Progress> {
        serde_json::from_slice(&fs::read(self.path(id, side, "progress")).ok()?).ok()
    }
}

/// How far a migration is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The pass over memory, from 1 on.
    pub round: u32,
    /// Pages done in it.
    pub done: u64,
    /// Pages in it.
    pub total: u64,
    /// What is going on, in words.
    pub phase: String,
}

fn read<S: State>(path: &Path) -> Result<Content<S>, RecordError> {
    let malformed = |problem: String| RecordError::Malformed { path: path.to_owned(), problem };
    let length = fs::metadata(path).map_err(io_error("read", path))?.len();
    if length > RECORD_MAX {
        return Err(malformed(format!("it has {length} bytes")));
    }
    let bytes = fs::read(path).map_err(io_error("read", path))?;
    Content::parse(&bytes).map_err(malformed)
}

impl<S: State> Content<S> {
    /// What a record's file says.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let content: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if content.version != VERSION || content.side != S::SIDE {
            return Err(format!("it is of version {} and of the {}", content.version, content.side));
        }
        Ok(content)
    }
}

impl<S: State> Record<S>
where
    RecordError: From<IllegalStep<S::Event>>,
{
    /// Takes a step; on disk when this returns.
    ///
    /// # Errors
    /// [`RecordError`]. The state is then what it was; if the disk failed, the file may have either.
    pub fn step(&mut self, event: S::Event) -> Result<S, RecordError> {
        let before = self.content.clone();
        let next = self.note(event)?;
        if let Err(error) = self.write() {
            self.content = before;
            return Err(error);
        }
        Ok(next)
    }

    /// Takes a step that need not be on disk: if this process ends now, whoever finds the state before does the same as in the
    /// one after. It goes to disk with the next one.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn note(&mut self, event: S::Event) -> Result<S, RecordError> {
        let next = self.content.state.after(event)?;
        self.content.state = next;
        self.content.history.push((next, now()));
        tracing::debug!(id = %self.content.id, state = next.name(), ?event, "step");
        Ok(next)
    }
}

impl<S: State> Record<S> {
    /// What it says.
    pub fn content(&self) -> &Content<S> {
        &self.content
    }

    /// The state.
    pub fn state(&self) -> S {
        self.content.state
    }

    /// Adds what was not known in the beginning.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn amend(&mut self, change: impl FnOnce(&mut Content<S>)) -> Result<(), RecordError> {
        change(&mut self.content);
        self.write()
    }

    /// Whether somebody wants it given up.
    pub fn is_cancelled(&self) -> bool {
        self.path.with_extension("cancel").exists()
    }

    /// Tells `status` how far it is. Nothing depends on it, so it is not flushed; and the file is written over, neither cut off nor
    /// replaced, which some file systems take for a reason to flush it at once.
    pub fn show(&mut self, progress: &Progress) {
        let path = self.path.with_extension("progress");
        if let Err(error) = self.try_show(&path, progress) {
            tracing::debug!(?path, %error, "progress could not be written");
        }
    }

    fn try_show(&mut self, path: &Path, progress: &Progress) -> io::Result<()> {
        let (file, length) = match &mut self.shown {
            Some(shown) => shown,
            none => none.insert((File::create(path)?, 0)),
        };
        let mut bytes = serde_json::to_vec(progress)?;
        // Spaces behind it mean nothing in JSON.
        bytes.resize(bytes.len().max(*length), b' ');
        *length = bytes.len();
        file.write_all_at(&bytes, 0)
    }

    fn write(&self) -> Result<(), RecordError> {
        let mut bytes = serde_json::to_vec_pretty(&self.content)
            .map_err(|error| io_error("write", &self.path)(error.into()))?;
        bytes.push(b'\n');
        replace(&self.path, &bytes)
    }
}

impl<S> Drop for Record<S> {
    fn drop(&mut self) {
        for kind in ["progress", "cancel"] {
            let _ = fs::remove_file(self.path.with_extension(kind));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SourceEvent, TargetEvent};
    use super::*;

    fn records() -> (tempfile::TempDir, Records) {
        let directory = tempfile::tempdir().unwrap();
        let records = Records { directory: directory.path().to_owned() };
        (directory, records)
    }

    #[test]
    fn a_record_is_found_as_it_was_left() {
        let (_directory, records) = records();
        let id = Token::random().unwrap();
        let mut record =
            records.begin(&id, SourceState::Sending, "db1", Some(DomainId(3)), "host:8002").unwrap();
        record.step(SourceEvent::Permission).unwrap();
        assert!(matches!(record.step(SourceEvent::Resumed), Err(RecordError::Source(_))));
        assert!(matches!(records.take::<SourceState>(&id), Err(RecordError::Busy { .. })));
        assert!(records.is_busy(&id, Side::Source));
        drop(record);
        let record = records.take::<SourceState>(&id).unwrap().unwrap();
        assert_eq!((record.state(), record.content().domain.as_str()), (SourceState::Given, "db1"));
        assert_eq!(record.content().history.len(), 2);
        assert!(records.take::<TargetState>(&id).unwrap().is_none());
    }

    #[test]
    fn both_sides_may_lie_in_one_place() {
        let (_directory, records) = records();
        let id = Token::random().unwrap();
        let source = records.begin(&id, SourceState::Sending, "db1", None, "").unwrap();
        let mut target = records.begin(&id, TargetState::Receiving, "db1", None, "").unwrap();
        assert!(records.begin(&id, TargetState::Receiving, "db1", None, "").is_err());
        target.step(TargetEvent::Complete).unwrap();
        assert_eq!(records.open_ones::<TargetState>().unwrap()[0].state, TargetState::Ready);
        assert_eq!(records.open_ones::<SourceState>().unwrap().len(), 1);
        drop(source);
    }

    #[test]
    fn a_file_that_is_no_record_is_named_and_the_others_are_read() {
        let (directory, records) = records();
        let id = Token::random().unwrap();
        records.begin(&id, SourceState::Sending, "db1", None, "").unwrap();
        for content in ["", "{}", "[1,2]", "\u{0}"] {
            let other = Token::random().unwrap();
            let path = directory.path().join(format!("{other}-source.json"));
            fs::write(&path, content).unwrap();
            let error = records.take::<SourceState>(&other).unwrap_err().to_string();
            assert!(error.contains(&other.to_string()), "{error}");
        }
        fs::write(directory.path().join("..-source.json"), "").unwrap();
        assert_eq!(records.all::<SourceState>().unwrap().len(), 1);
    }

    #[test]
    fn old_closed_records_go_and_open_ones_stay() {
        let (_directory, records) = records();
        let id = Token::random().unwrap();
        drop(records.begin(&id, SourceState::Sending, "open", None, "").unwrap());
        for _ in 0..CLOSED_KEPT + 3 {
            let id = Token::random().unwrap();
            drop(records.begin(&id, SourceState::Removed, "closed", None, "").unwrap());
        }
        records.prune();
        assert_eq!(records.all::<SourceState>().unwrap().len(), CLOSED_KEPT + 1);
        assert_eq!(records.open_ones::<SourceState>().unwrap().len(), 1);
    }

    #[test]
    fn a_cancel_and_progress_reach_their_process_and_go_with_it() {
        let (_directory, records) = records();
        let id = Token::random().unwrap();
        let mut record = records.begin(&id, SourceState::Sending, "db1", None, "").unwrap();
        assert!(!record.is_cancelled());
        records.ask_to_cancel(&id, Side::Source).unwrap();
        assert!(record.is_cancelled());
        let progress = Progress { round: 2, done: 1, total: 9, phase: "sending".into() };
        record.show(&Progress { phase: "something longer".into(), ..progress.clone() });
        record.show(&progress);
        assert_eq!(records.progress(&id, Side::Source), Some(progress));
        drop(record);
        assert_eq!(records.progress(&id, Side::Source), None);
        assert!(!records.take::<SourceState>(&id).unwrap().unwrap().is_cancelled());
    }

    #[test]
    fn a_process_is_told_from_a_later_one() {
        let own = Process::of(std::process::id()).unwrap();
        assert!(own.runs());
        assert!(!Process { began: own.began + 1, ..own }.runs());
        assert_eq!(Process::of(u32::MAX), None);
    }
}
