//! `guest-probe doctor`: whether a mysqld can be served, and from what that is known; nothing is attached and nothing published.

mod system;
mod words;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use procfs::process::all_processes;
use serde::Serialize;
use thiserror::Error;

pub use system::Check;

use crate::catalogue::{Build, Catalogue, CatalogueError};
use crate::control_blocks::{BlocksError, ControlBlocks, PoolVariables, SpacesInMemory};
use crate::derive::{self, Agreement, ByText, Derivation, DeriveError, Finding, SymbolFinding};
use crate::disk::Disks;
use crate::elf::{Elf, ElfError};
use crate::left_out::LeftOut;
use crate::lists::{self, ListSummary};
use crate::process::MysqldProcess;
use crate::spaces::Spaces;
use crate::storage_map::{DiskRule, StorageMap, unfit};

/// What is looked at.
#[derive(Clone, Debug)]
pub enum Subject {
    /// A process; the only mysqld where none is named.
    Process(Option<i32>),
    /// A program file.
    Binary(PathBuf),
}

/// What of a data file can be named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// The tablespace.
    pub space: u32,
    /// The file.
    pub file: String,
    /// Bytes that have a place on a disk.
    pub bytes_mapped: u64,
    /// Bytes that have none, by reason; the whole file where `left_out` says so.
    pub bytes_left_out: BTreeMap<LeftOut, u64>,
    /// Why none of it has.
    pub left_out: Option<LeftOut>,
    /// Where its device's pieces lie.
    pub disks: Vec<String>,
}

/// A field of the entry that would be used.
#[derive(Clone, Debug, Serialize)]
pub struct FieldReport {
    /// Its name.
    pub name: &'static str,
    /// What the catalogue says.
    pub catalogue: Option<usize>,
    /// What the running server says.
    pub found: Finding,
}

/// All that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The process; none for a file.
    pub pid: Option<i32>,
    /// Its program.
    pub program: String,
    /// Its build id, as far as there is one.
    pub build_id: Option<String>,
    /// The catalogue's package for that id.
    pub package: Option<String>,
    /// MariaDB's read completion, where the program has none of the names that are needed but has that function.
    pub mariadb_read_completion: Option<ByText>,
    /// Symbols that are needed.
    pub symbols: Vec<SymbolFinding>,
    /// Offsets and sizes that are needed; none of a file alone.
    pub fields: Vec<FieldReport>,
    /// The layout against all control blocks and the files.
    pub agreement: Option<Agreement>,
    /// The data files.
    pub files: Vec<FileReport>,
    /// What this machine has.
    pub system: Vec<Check>,
    /// What would be listed at this moment, whatever disk it lies on.
    pub lists: Option<ListSummary>,
    /// What keeps the build from being used, one sentence each.
    pub missing: Vec<String>,
    /// What keeps this machine from publishing, one sentence each.
    pub missing_here: Vec<String>,
}

impl Report {
    /// Whether `guest-probe run` would do its work.
    pub fn is_usable(&self) -> bool {
        self.missing.is_empty() && self.missing_here.is_empty()
    }
}

/// Why a doctor cannot even look.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "each is what its source says")]
pub enum DoctorError {
    #[error(transparent)]
    Derive(#[from] DeriveError),
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    #[error("cannot open {path}: {source}")]
    Open { path: PathBuf, source: io::Error },
    #[error("{path}: {source}")]
    Binary { path: PathBuf, source: ElfError },
    #[error(
        "no running mysqld has the build id {0}: start that server and let it work a little, since offsets are found in its memory"
    )]
    NotRunning(String),
    #[error("no entry can be made:\n  {}", .0.join("\n  "))]
    NotSure(Vec<String>),
}

/// Looks at a server or a file.
///
/// # Errors
/// [`DoctorError`] when there is nothing to look at, or a catalogue cannot be used. What is merely missing is in the report.
pub fn look(subject: &Subject, catalogue: &Catalogue, device: &Path) -> Result<Report, DoctorError> {
    let mut report = match subject {
        Subject::Process(pid) => look_at_process(*pid, catalogue)?,
        Subject::Binary(path) => look_at_binary(path, catalogue)?,
    };
    let (system, missing) = system::look(device);
    report.system = system;
    report.missing_here = missing;
    Ok(report)
}

fn empty(pid: Option<i32>, program: String) -> Report {
    Report {
        pid,
        program,
        build_id: None,
        package: None,
        mariadb_read_completion: None,
        symbols: Vec::new(),
        fields: Vec::new(),
        agreement: None,
        files: Vec::new(),
        system: Vec::new(),
        lists: None,
        missing: Vec::new(),
        missing_here: Vec::new(),
    }
}

fn open_binary(path: &Path) -> Result<File, DoctorError> {
    let failed = |source| DoctorError::Open { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")));
    }
    Ok(file)
}

fn look_at_binary(path: &Path, catalogue: &Catalogue) -> Result<Report, DoctorError> {
    let file = open_binary(path)?;
    let mut report = empty(None, path.display().to_string());
    let wrong = |source| DoctorError::Binary { path: path.to_path_buf(), source };
    let elf = Elf::parse(&file).map_err(wrong)?;
    let id = elf.build_id().map_err(wrong)?;
    let known = catalogue.find(&id).ok();
    report.package = known.map(|build| build.package.clone());
    let (symbols, _) = derive::symbols(&elf).map_err(wrong)?;
    if known.is_none() {
        look_for_mariadb(&elf, &symbols, &mut report).map_err(wrong)?;
        let doubts = symbols
            .iter()
            .filter_map(|symbol| Some(format!("{}: {}", symbol.called, symbol.doubt.as_ref()?)));
        report.missing.extend(doubts);
        report.missing.push(match running(&id) {
            Some(pid) => format!(
                "offsets are found in a running server's memory: use --pid {pid}, which runs this build"
            ),
            None => "offsets are found in a running server's memory: start it, and use --pid".to_owned(),
        });
    }
    if report.missing.len() > 1 && elf.symbol_counts().map_err(wrong)? == (0, 0) {
        report.missing.insert(
            0,
            "the file has no symbols at all: was it stripped of them, or linked statically?".to_owned(),
        );
    }
    report.symbols = symbols;
    report.build_id = Some(id);
    Ok(report)
}

/// MariaDB hides all names; what can be found without them is told, and what cannot.
fn look_for_mariadb(
    elf: &Elf<'_, File>,
    symbols: &[SymbolFinding],
    report: &mut Report,
) -> Result<(), ElfError> {
    if symbols.iter().any(|symbol| symbol.symbol.is_some()) {
        return Ok(());
    }
    if let Ok(found) = derive::read_completion_by_text(elf)? {
        report.missing.push(
            "this is MariaDB, whose InnoDB functions are hidden: the function that completes a read was found by the text that it \
             alone uses, but none that makes a page dirty or clean or frees a frame; a list without those would be wrong"
                .to_owned(),
        );
        report.mariadb_read_completion = Some(found);
    }
    Ok(())
}

/// A mysqld that runs a build.
fn running(build_id: &str) -> Option<i32> {
    all_processes().ok()?.flatten().map(|process| process.pid()).find(|pid| {
        let id = File::open(format!("/proc/{pid}/exe"))
            .ok()
            .and_then(|exe| Elf::parse(&exe).ok()?.build_id().ok());
        id.as_deref() == Some(build_id)
    })
}

fn look_at_process(pid: Option<i32>, catalogue: &Catalogue) -> Result<Report, DoctorError> {
    let process = MysqldProcess::find(pid).map_err(DeriveError::from)?;
    let path = process.exe_path();
    let program = std::fs::read_link(&path).unwrap_or_else(|_| path.clone());
    let mut report = empty(Some(process.pid), program.display().to_string());
    let derivation = derive::derive(&process)?;
    let known = catalogue.find(&derivation.build_id).ok();
    report.build_id = Some(derivation.build_id.clone());
    report.package = known.map(|build| build.package.clone());
    match known {
        Some(build) => {
            let agreement = derive::agreement(&process, build)?;
            report.missing = derivation.contradictions(build);
            report.missing.extend(agreement.doubts());
            report.agreement = Some(agreement);
        }
        None => {
            let exe = process.exe().map_err(DeriveError::from)?;
            let elf = Elf::parse(&exe).map_err(DeriveError::from)?;
            look_for_mariadb(&elf, &derivation.symbols, &mut report).map_err(DeriveError::from)?;
            report.missing.extend(derivation.missing());
            report.agreement = derivation.agreement.clone();
        }
    }
    let of_catalogue: BTreeMap<_, _> = known.map(derive::fields_of).into_iter().flatten().collect();
    report.fields = derivation
        .fields
        .iter()
        .map(|(name, found)| FieldReport {
            name,
            catalogue: of_catalogue.get(name).copied(),
            found: found.clone(),
        })
        .collect();
    report.symbols = derivation.symbols.clone();
    let spaces = Spaces::scan(&process).map_err(DeriveError::Spaces)?;
    let mut disks = Disks::default();
    // MariaDB's tablespaces have flags of another meaning.
    let flags_are_known = report.mariadb_read_completion.is_none();
    report.files = look_at_files(&spaces, &mut disks, flags_are_known);
    let build = known.cloned().or(derivation.build);
    if let Some(build) = build.filter(|_| report.missing.is_empty()) {
        match would_list(&process, &build, &spaces, &mut disks) {
            Ok(lists) => report.lists = Some(lists),
            Err(error) => report.missing.push(error),
        }
    }
    Ok(report)
}

fn look_at_files(spaces: &Spaces, disks: &mut Disks, flags_are_known: bool) -> Vec<FileReport> {
    let mut files: Vec<FileReport> = spaces
        .iter()
        .map(|file| {
            let space = file.header.space;
            let (mut bytes_mapped, mut bytes_left_out, mut left_out) = (0, BTreeMap::new(), None);
            let by_flags = if flags_are_known { unfit(file.header.flags) } else { None };
            let found = match by_flags {
                Some(reason) => Err(reason),
                None => StorageMap::new(spaces, disks, DiskRule::Any).bytes_of(file),
            };
            match found {
                Ok((mapped, rest)) => (bytes_mapped, bytes_left_out) = (mapped, rest),
                Err(reason) => left_out = Some(reason),
            }
            let disks = disks.map(file.device).map(|map| map.words().collect()).unwrap_or_default();
            let file = file.name.display().to_string();
            FileReport { space, file, bytes_mapped, bytes_left_out, left_out, disks }
        })
        .collect();
    files.sort_by_key(|file| file.space);
    files
}

fn would_list(
    process: &MysqldProcess,
    build: &Build,
    spaces: &Spaces,
    disks: &mut Disks,
) -> Result<ListSummary, String> {
    let words = |error: &dyn std::fmt::Display| format!("lists cannot be built: {error}");
    let exe = process.exe().map_err(|error| words(&error))?;
    let elf = Elf::parse(&exe).map_err(|error| words(&error))?;
    let bias = process.load_address().map_err(|error| words(&error))?.wrapping_sub(elf.first_address());
    let names = &build.variables;
    let places =
        elf.symbols(&[&names.pools, &names.pool_count, &names.page_size]).map_err(|error| words(&error))?;
    let [pools, pool_count, page_size] = places[..] else { return Err(words(&"symbols are missing")) };
    let at = |place: crate::elf::Place| bias.wrapping_add(place.address);
    let variables = PoolVariables { pools: at(pools), pool_count: at(pool_count), page_size: at(page_size) };
    let memory = process.memory();
    let most_frames = process.most_frames().map_err(|error| words(&error))?;
    let blocks = ControlBlocks::new(&memory, build, variables, most_frames);
    let table = blocks.snapshot().map_err(|error| words(&error))?;
    let mut storage = StorageMap::new(spaces, disks, DiskRule::Any);
    let in_memory = SpacesInMemory::new(&memory, build);
    lists::build(&blocks, in_memory, &table, &mut storage, |_| Ok::<(), BlocksError>(()))
        .map_err(|error| words(&error))
}

/// Makes a catalogue entry from a running server, its own or one that runs a binary's build.
///
/// # Errors
/// [`DoctorError::NotSure`] with all that is missing, when there is any doubt.
pub fn make_entry(subject: &Subject) -> Result<Build, DoctorError> {
    let pid = match subject {
        Subject::Process(pid) => *pid,
        Subject::Binary(path) => {
            let file = open_binary(path)?;
            let wrong = |source| DoctorError::Binary { path: path.to_path_buf(), source };
            let id = Elf::parse(&file).and_then(|elf| elf.build_id()).map_err(wrong)?;
            Some(running(&id).ok_or(DoctorError::NotRunning(id))?)
        }
    };
    let process = MysqldProcess::find(pid).map_err(DeriveError::from)?;
    let derivation: Derivation = derive::derive(&process)?;
    let missing = derivation.missing();
    derivation.build.ok_or(DoctorError::NotSure(missing))
}
