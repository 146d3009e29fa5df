//! What a build of mysqld is that no catalogue knows, from two witnesses that know nothing of each other: its instructions, and its
//! memory while it runs.
//!
//! **Refuse rather than guess.** Each offset needs a witness that names exactly one place, and no witness that speaks against it:
//!
//! * *names*: a function or variable is found by its demangled name, and by what it takes (`names`);
//! * *code*: short functions that are exported say where a field is, as `buf_page_t::is_io_fix_read` does by comparing one byte (`code`);
//! * *memory*: what must hold for every control block holds at one offset only: frames lie 16 KiB apart, the page's own header says its
//!   id, an LSN that was flushed is the header's (`geometry`, `fields`, `tablespaces`).
//!
//! In the end the whole layout is held against all control blocks and against the files on disk (`agreement`): one block that contradicts it
//! while nothing changes it is enough to refuse.
//!
//! Nothing of mysqld is changed or stopped: memory is read, twice where it must not change in between.

mod agreement;
mod code;
mod fields;
mod geometry;
mod names;
mod tablespaces;
mod texts;

use std::collections::BTreeMap;
use std::io;

use serde::Serialize;
use thiserror::Error;

pub use agreement::Agreement;
pub use texts::ByText;

use crate::catalogue::{
    Arguments, BlockLayout, Build, CatalogueError, ChunkLayout, NodeLayout, PoolLayout, SpaceLayout, Values,
};
use crate::elf::{Elf, ElfError, ReadAt};
use crate::memory::{Memory, MemoryError};
use crate::process::{MysqldProcess, ProcessError};
use crate::spaces::Spaces;

/// `buf_page_state` of InnoDB since MySQL 5.6: 3 not used, 4 ready for use, 5 file page, 6 memory, 7 being removed.
const STATE_FILE_PAGE: u8 = 5;
/// `buf_io_fix`: 0 none, 1 read, 2 write, 3 pinned.
const IO_FIX_NONE: u8 = 0;
const IO_FIX_READ: u8 = 1;

/// Why nothing can be found out at all.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "each is what its source says")]
pub enum DeriveError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Elf(#[from] ElfError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("cannot list the open files of mysqld: {0}")]
    Spaces(io::Error),
    /// What was found out makes no sound entry.
    #[error("what was found out makes no sound entry: {0}")]
    Entry(#[from] CatalogueError),
}

/// What is known of one field of an entry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The offset, or the size.
    pub value: Option<usize>,
    /// Who says so, for people.
    pub witnesses: Vec<String>,
    /// What is missing or contradicts; empty when the value is sure.
    pub doubts: Vec<String>,
}

impl Finding {
    /// Brings two witnesses together: what memory allows, and what code names. Either may know nothing (`None`).
    fn of(memory: Option<Witness>, code: Option<Witness>) -> Self {
        let mut finding = Self::default();
        let mut candidates: Option<Vec<usize>> = None;
        for witness in [memory, code].into_iter().flatten() {
            candidates = Some(match candidates {
                None => witness.places.clone(),
                Some(before) => before.into_iter().filter(|place| witness.places.contains(place)).collect(),
            });
            finding.witnesses.push(witness.words());
        }
        match candidates.as_deref() {
            None => finding.doubts.push("neither memory nor code tells".to_owned()),
            Some([]) if finding.witnesses.len() > 1 => {
                finding.doubts.push("the witnesses contradict each other".to_owned())
            }
            Some([]) => finding.doubts.push("no place fits".to_owned()),
            Some([place]) => finding.value = Some(*place),
            Some(several) => finding.doubts.push(format!("several places fit: {}", places(several))),
        }
        finding
    }

    /// Nothing is known, and why.
    fn missing(why: impl Into<String>) -> Self {
        Self { doubts: vec![why.into()], ..Self::default() }
    }

    /// Whether there is one value and no doubt.
    pub fn is_sure(&self) -> bool {
        self.value.is_some() && self.doubts.is_empty()
    }
}

/// What one kind of evidence says of a field.
#[derive(Clone, Debug)]
struct Witness {
    /// Places that it allows.
    places: Vec<usize>,
    /// What it is.
    says: String,
}

impl Witness {
    fn new(mut places: Vec<usize>, says: impl Into<String>) -> Self {
        places.sort_unstable();
        places.dedup();
        Self { places, says: says.into() }
    }

    fn words(&self) -> String {
        format!("{}: {}", self.says, places(&self.places))
    }
}

/// Offsets for people; not more than a few.
fn places(places: &[usize]) -> String {
    let shown = places.iter().take(8).map(|place| format!("{place:#x}")).collect::<Vec<_>>();
    match places.len() {
        0 => "nowhere".to_owned(),
        1..=8 => shown.join(", "),
        more => format!("{} and {} more", shown.join(", "), more - 8),
    }
}

/// A symbol that is needed, as it was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SymbolFinding {
    /// The field of the catalogue that names it.
    pub field: &'static str,
    /// Its mangled name.
    pub symbol: Option<String>,
    /// What it is called in the source.
    pub called: String,
    /// Its address in the file.
    pub address: Option<u64>,
    /// What its first bytes mean for a probe; none for a variable.
    pub entry: Option<String>,
    /// Why it is not known.
    pub doubt: Option<String>,
}

/// All that was found out about a build.
#[derive(Clone, Debug, Serialize)]
pub struct Derivation {
    /// The build id.
    pub build_id: String,
    /// The symbols.
    pub symbols: Vec<SymbolFinding>,
    /// Fields by name, as `block.oldest`.
    pub fields: BTreeMap<&'static str, Finding>,
    /// The layout against all control blocks and the files; none when the layout is not whole.
    pub agreement: Option<Agreement>,
    /// The entry, when all of it is sure.
    #[serde(skip)]
    pub build: Option<Build>,
}

impl Derivation {
    /// What keeps the build from being used, one sentence each.
    pub fn missing(&self) -> Vec<String> {
        let symbols = self
            .symbols
            .iter()
            .filter_map(|symbol| symbol.doubt.as_ref().map(|doubt| format!("{}: {doubt}", symbol.called)));
        let fields = self
            .fields
            .iter()
            .filter(|(_, finding)| !finding.is_sure())
            .map(|(name, finding)| format!("{name}: {}", finding.doubts.join("; ")));
        let agreement = self.agreement.iter().flat_map(|agreement| agreement.doubts());
        symbols.chain(fields).chain(agreement).collect()
    }

    /// What in an entry contradicts what was found out, one sentence each. A field that could not be found out contradicts nothing.
    pub fn contradictions(&self, build: &Build) -> Vec<String> {
        let mut found = Vec::new();
        for (name, value) in fields_of(build) {
            if let Some(finding) = self.fields.get(name) {
                let allowed = finding.value.is_none_or(|sure| sure == value);
                if !allowed {
                    found.push(format!(
                        "{name} is {value:#x} in the catalogue, but {}",
                        finding.witnesses.join("; ")
                    ));
                }
            }
        }
        for (field, name) in build.names() {
            let symbol = self.symbols.iter().find(|symbol| symbol.field == field);
            if let Some(other) =
                symbol.and_then(|symbol| symbol.symbol.as_ref()).filter(|other| *other != name)
            {
                found.push(format!(
                    "{field} is {name} in the catalogue, but {other} has the name that it should have"
                ));
            }
        }
        found
    }
}

/// The numbers of an entry, with the names that findings have.
pub fn fields_of(build: &Build) -> [(&'static str, usize); 22] {
    let Build { pool, chunk, block, space, node, .. } = build;
    [
        ("pool.size", pool.size),
        ("pool.chunk_count", pool.chunk_count),
        ("pool.chunks", pool.chunks),
        ("chunk.size", chunk.size),
        ("chunk.block_count", chunk.block_count),
        ("chunk.blocks", chunk.blocks),
        ("block.size", block.size),
        ("block.page_id", block.page_id),
        ("block.page_size", block.page_size),
        ("block.fix_count", block.fix_count),
        ("block.io_fix", block.io_fix),
        ("block.state", block.state),
        ("block.newest", block.newest),
        ("block.oldest", block.oldest),
        ("block.space", block.space),
        ("block.version", block.version),
        ("block.frame", block.frame),
        ("space.id", space.id),
        ("space.version", space.version),
        ("space.deleted", space.deleted),
        ("space.flags", space.flags),
        ("node.space", node.space),
    ]
}

/// A server that is looked at: its memory, and where its program's addresses lie in it.
struct Server<'a, F: ReadAt + ?Sized, M> {
    elf: &'a Elf<'a, F>,
    memory: &'a M,
    /// Bytes from an address in the file to the one in memory.
    bias: u64,
    /// No more frames than this can be.
    most_frames: u64,
}

/// Finds out about a running server's build what can be found out.
///
/// # Errors
/// [`DeriveError`] when the process or its file cannot be read at all. What can merely not be told is in the result.
pub fn derive(process: &MysqldProcess) -> Result<Derivation, DeriveError> {
    let exe = process.exe()?;
    let elf = Elf::parse(&exe)?;
    let bias = process.load_address()?.wrapping_sub(elf.first_address());
    let memory = process.memory();
    let server = Server { elf: &elf, memory: &memory, bias, most_frames: process.most_frames()? };
    let spaces = Spaces::scan(process).map_err(DeriveError::Spaces)?;
    server.derive(&spaces)
}

/// What a program file alone tells: its symbols. Offsets need a process.
///
/// # Errors
/// [`ElfError`] when it cannot be read.
pub fn symbols<F: ReadAt + ?Sized>(elf: &Elf<'_, F>) -> Result<(Vec<SymbolFinding>, Arguments), ElfError> {
    let found = names::find(elf)?;
    Ok((found.symbols, found.arguments))
}

/// MariaDB's function that completes the read of a page, which has no name in the file; an explanation when it cannot be told.
///
/// # Errors
/// [`ElfError`] when the file cannot be read.
pub fn read_completion_by_text<F: ReadAt + ?Sized>(
    elf: &Elf<'_, F>,
) -> Result<Result<ByText, String>, ElfError> {
    texts::read_completion(elf)
}

/// Holds an entry against all control blocks of a running server and against its files.
///
/// # Errors
/// [`DeriveError`] when the process cannot be read.
pub fn agreement(process: &MysqldProcess, build: &Build) -> Result<Agreement, DeriveError> {
    let exe = process.exe()?;
    let elf = Elf::parse(&exe)?;
    let bias = process.load_address()?.wrapping_sub(elf.first_address());
    let spaces = Spaces::scan(process).map_err(DeriveError::Spaces)?;
    agreement::of(&elf, &process.memory(), bias, process.most_frames()?, build, &spaces)
}

impl<F: ReadAt + ?Sized, M: Memory> Server<'_, F, M> {
    fn derive(&self, spaces: &Spaces) -> Result<Derivation, DeriveError> {
        let build_id = self.elf.build_id()?;
        let names = names::find(self.elf)?;
        let code = code::Evidence::read(self.elf)?;
        let mut fields: BTreeMap<&'static str, Finding> = BTreeMap::new();
        let pools = geometry::find(self, &names, &code, &mut fields)?;
        match &pools {
            Some(pools) => {
                let samples = fields::sample(self.memory, pools);
                fields::find(&samples, &code, &mut fields);
                tablespaces::find(self.memory, &samples, &code, spaces, &mut fields);
            }
            None => {
                let why = "where the control blocks are is not known";
                for name in fields::ALL.into_iter().chain(tablespaces::ALL) {
                    fields.insert(name, Finding::missing(why));
                }
            }
        }
        let mut derivation =
            Derivation { build_id, symbols: names.symbols, fields, agreement: None, build: None };
        let doubt = derivation.symbols.iter().any(|symbol| symbol.doubt.is_some())
            || derivation.fields.values().any(|finding| !finding.is_sure());
        if doubt {
            return Ok(derivation);
        }
        let Some(build) = entry(&derivation, names.arguments) else { return Ok(derivation) };
        build.check()?;
        let agreement = agreement::of(self.elf, self.memory, self.bias, self.most_frames, &build, spaces)?;
        derivation.build = agreement.doubts().is_empty().then_some(build);
        derivation.agreement = Some(agreement);
        Ok(derivation)
    }
}

/// The entry that the findings make; `None` when one is missing.
fn entry(derivation: &Derivation, arguments: Arguments) -> Option<Build> {
    let at = |name: &str| derivation.fields.get(name)?.value;
    let symbol = |field: &str| {
        derivation
            .symbols
            .iter()
            .find(|symbol| symbol.field == field)
            .and_then(|symbol| symbol.symbol.clone())
    };
    Some(Build {
        package: format!("derived from the running server, build {}", derivation.build_id),
        build_id: derivation.build_id.clone(),
        variables: crate::catalogue::Variables {
            pools: symbol("pools")?,
            pool_count: symbol("pool_count")?,
            page_size: symbol("page_size")?,
        },
        functions: crate::catalogue::Functions {
            read_complete: symbol("read_complete")?,
            page_create: symbol("page_create")?,
            page_dirty: symbol("page_dirty")?,
            page_clean: symbol("page_clean")?,
            frame_free: symbol("frame_free")?,
            file_open: symbol("file_open")?,
            chunk_allocate: symbol("chunk_allocate")?,
            chunk_deallocate: symbol("chunk_deallocate")?,
        },
        arguments,
        pool: PoolLayout {
            size: at("pool.size")?,
            chunk_count: at("pool.chunk_count")?,
            chunks: at("pool.chunks")?,
        },
        chunk: ChunkLayout {
            size: at("chunk.size")?,
            block_count: at("chunk.block_count")?,
            blocks: at("chunk.blocks")?,
        },
        block: BlockLayout {
            size: at("block.size")?,
            page_id: at("block.page_id")?,
            page_size: at("block.page_size")?,
            fix_count: at("block.fix_count")?,
            io_fix: at("block.io_fix")?,
            state: at("block.state")?,
            newest: at("block.newest")?,
            oldest: at("block.oldest")?,
            space: at("block.space")?,
            version: at("block.version")?,
            frame: at("block.frame")?,
        },
        space: SpaceLayout {
            id: at("space.id")?,
            version: at("space.version")?,
            deleted: at("space.deleted")?,
            flags: at("space.flags")?,
        },
        node: NodeLayout { space: at("node.space")? },
        values: Values {
            state_file_page: STATE_FILE_PAGE,
            io_fix_none: IO_FIX_NONE,
            io_fix_read: IO_FIX_READ,
        },
    })
}

/// Whether a value can be an address of a process: canonical, not in the first page, aligned for a structure.
fn is_address(value: u64) -> bool {
    (0x1_0000..1 << 47).contains(&value) && value.is_multiple_of(8)
}
