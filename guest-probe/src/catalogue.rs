//! What is known of each build of mysqld: symbols, argument registers, structure offsets. The data is `catalogue.toml`, keyed by build
//! id, because names and layouts drift from version to version; an operator's own entries lie beside it in [`OWN_DIR`].
//!
//! An entry decides what is read of a running server's memory and believed, so it is checked as a whole before any of it is used:
//! every offset inside its structure, none over another, registers that the probes read, names that are names.

mod check;
mod error;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

pub use error::CatalogueError;

use crate::event::Layout;

const BUILT_IN: &str = include_str!("../catalogue.toml");

/// Where an operator's own entries lie: every `*.toml` there is one catalogue more.
pub const OWN_DIR: &str = "/etc/poolskip/catalogue.d";

/// No catalogue is larger than this, in bytes: an entry has about 2,000.
const LARGEST_FILE: u64 = 1 << 20;
/// No more files than this are read in [`OWN_DIR`].
const MOST_FILES: usize = 256;

/// All known builds.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    #[serde(rename = "build", default)]
    builds: Vec<Build>,
}

/// One build of mysqld.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Build {
    /// The package that brings it, for messages: name and version.
    pub package: String,
    /// The build id in its ELF file, in hexadecimal.
    pub build_id: String,
    /// Variables that are read.
    pub variables: Variables,
    /// Functions that are probed.
    pub functions: Functions,
    /// Registers in which these get what the probes read.
    pub arguments: Arguments,
    /// `buf_pool_t`.
    pub pool: PoolLayout,
    /// `buf_chunk_t`.
    pub chunk: ChunkLayout,
    /// `buf_block_t`.
    pub block: BlockLayout,
    /// `fil_space_t`.
    pub space: SpaceLayout,
    /// `fil_node_t`.
    pub node: NodeLayout,
    /// Values of enumerations.
    pub values: Values,
}

/// Symbols of variables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variables {
    /// Pointer to the array of pool instances.
    pub pools: String,
    /// How many instances there are, 8 bytes.
    pub pool_count: String,
    /// Bytes in a page, 8 bytes.
    pub page_size: String,
}

/// Symbols of functions; `guest-probe-ebpf` says what each tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "each is named after the eBPF program that probes it")]
pub struct Functions {
    pub read_complete: String,
    pub page_create: String,
    pub page_dirty: String,
    pub page_clean: String,
    pub frame_free: String,
    pub file_open: String,
    pub chunk_allocate: String,
    pub chunk_deallocate: String,
}

/// A register that the System V ABI of x86-64 passes an argument in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "each is its name")]
pub enum Register {
    Rdi,
    Rsi,
    Rdx,
    Rcx,
    R8,
    R9,
}

impl Register {
    /// In the order of arguments.
    pub const ALL: [Self; 6] = [Self::Rdi, Self::Rsi, Self::Rdx, Self::Rcx, Self::R8, Self::R9];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rdi => "rdi",
            Self::Rsi => "rsi",
            Self::Rdx => "rdx",
            Self::Rcx => "rcx",
            Self::R8 => "r8",
            Self::R9 => "r9",
        }
    }
}

/// In which register a function gets its control block, or its file node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "each is named after its function")]
pub struct Arguments {
    pub read_complete: Register,
    pub page_dirty: Register,
    pub page_clean: Register,
    pub frame_free: Register,
    pub file_open: Register,
}

impl Arguments {
    /// What the eBPF programs read (`guest-probe-ebpf`). A build whose functions have other arguments needs other programs.
    pub const OF_PROGRAMS: Self = Self {
        read_complete: Register::Rdi,
        page_dirty: Register::Rsi,
        page_clean: Register::Rdi,
        frame_free: Register::Rdi,
        file_open: Register::Rsi,
    };

    /// Each with its function's name in the catalogue.
    pub fn named(&self) -> [(&'static str, Register); 5] {
        [
            ("read_complete", self.read_complete),
            ("page_dirty", self.page_dirty),
            ("page_clean", self.page_clean),
            ("frame_free", self.frame_free),
            ("file_open", self.file_open),
        ]
    }
}

/// Offsets in a pool instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolLayout {
    /// Bytes in an instance.
    pub size: usize,
    /// Of the number of chunks, 8 bytes.
    pub chunk_count: usize,
    /// Of the pointer to the array of chunks.
    pub chunks: usize,
}

/// Offsets in a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkLayout {
    /// Bytes in a chunk's descriptor.
    pub size: usize,
    /// Of the number of control blocks, 8 bytes.
    pub block_count: usize,
    /// Of the pointer to the array of control blocks.
    pub blocks: usize,
}

/// Offsets in a control block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockLayout {
    /// Bytes in a control block.
    pub size: usize,
    /// Of the tablespace id and, 4 bytes on, the page number.
    pub page_id: usize,
    /// Of the `page_size_t`, 8 bytes.
    pub page_size: usize,
    /// Of the number of threads that use the page, 4 bytes.
    pub fix_count: usize,
    /// Of the kind of I/O that is under way, 1 byte.
    pub io_fix: usize,
    /// Of the block's state, 1 byte.
    pub state: usize,
    /// Of the LSN of the newest change, 8 bytes, 0 when the page was not changed since it was loaded.
    pub newest: usize,
    /// Of the LSN of the oldest change that is not on disk, 8 bytes, 0 when the page is clean.
    pub oldest: usize,
    /// Of the pointer to the tablespace.
    pub space: usize,
    /// Of the tablespace's version when the page was loaded, 4 bytes.
    pub version: usize,
    /// Of the frame's address.
    pub frame: usize,
}

/// Offsets in a tablespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpaceLayout {
    /// Of its id, 4 bytes.
    pub id: usize,
    /// Of its version, 4 bytes: pages of an older one are stale.
    pub version: usize,
    /// Of the byte that says it was dropped.
    pub deleted: usize,
    /// Of its flags, 4 bytes, as in page 0 of its file.
    pub flags: usize,
}

/// Offsets in a tablespace's file node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeLayout {
    /// Of the pointer to the tablespace.
    pub space: usize,
}

/// Values of enumerations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Values {
    /// State of a block that holds a page of a file.
    pub state_file_page: u8,
    /// No I/O is under way.
    pub io_fix_none: u8,
    /// A read is under way.
    pub io_fix_read: u8,
}

impl Catalogue {
    /// The catalogue that this program was built with.
    ///
    /// # Errors
    /// Never for a program that passed its tests.
    pub fn built_in() -> Result<Self, CatalogueError> {
        Self::parse(BUILT_IN)
    }

    /// The built-in catalogue with the operator's own entries.
    ///
    /// # Errors
    /// [`CatalogueError`] of the first file that cannot be used: an entry that is wrong in one way is not trusted in others.
    pub fn installed() -> Result<Self, CatalogueError> {
        Self::with_own(Path::new(OWN_DIR))
    }

    /// [`Catalogue::installed`] with another directory.
    ///
    /// # Errors
    /// The same.
    pub fn with_own(dir: &Path) -> Result<Self, CatalogueError> {
        let mut catalogue = Self::built_in()?;
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(catalogue),
            Err(error) => return Err(own(dir, error.into())),
        };
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(|error| own(dir, error.into()))?.path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                if paths.len() == MOST_FILES {
                    return Err(CatalogueError::TooMany(dir.to_path_buf()));
                }
                paths.push(path);
            }
        }
        paths.sort();
        for path in paths {
            let more = read_file(&path).and_then(|text| Self::parse(&text));
            let added = more.and_then(|more| {
                catalogue.builds.extend(more.builds);
                catalogue.check_ids()
            });
            added.map_err(|error| own(&path, error))?;
        }
        Ok(catalogue)
    }

    /// Parses and checks a catalogue.
    ///
    /// # Errors
    /// [`CatalogueError`] for what is wrong first.
    pub fn parse(text: &str) -> Result<Self, CatalogueError> {
        if text.len() as u64 > LARGEST_FILE {
            return Err(CatalogueError::TooLarge { bytes: text.len() as u64 });
        }
        let catalogue: Self = toml::from_str(text)?;
        for build in &catalogue.builds {
            build.check()?;
        }
        catalogue.check_ids()?;
        Ok(catalogue)
    }

    /// The entry of a build.
    ///
    /// # Errors
    /// [`CatalogueError::Unknown`].
    pub fn find(&self, build_id: &str) -> Result<&Build, CatalogueError> {
        self.builds.iter().find(|build| build.build_id == build_id).ok_or_else(|| CatalogueError::Unknown {
            build_id: build_id.to_owned(),
            known: self.builds.iter().map(|build| build.package.as_str()).collect::<Vec<_>>().join(", "),
        })
    }

    /// All entries.
    pub fn builds(&self) -> &[Build] {
        &self.builds
    }

    fn check_ids(&self) -> Result<(), CatalogueError> {
        let mut seen = HashSet::new();
        match self.builds.iter().find(|build| !seen.insert(&build.build_id)) {
            Some(twice) => Err(CatalogueError::Twice(twice.build_id.clone())),
            None => Ok(()),
        }
    }
}

fn own(path: &Path, error: CatalogueError) -> CatalogueError {
    CatalogueError::Own { path: path.to_path_buf(), error: Box::new(error) }
}

/// Reads a file that may be anything: no more than a catalogue can have, and no FIFO that never ends.
fn read_file(path: &Path) -> Result<String, CatalogueError> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file").into());
    }
    let mut text = String::new();
    let bytes = File::open(path)?.take(LARGEST_FILE + 1).read_to_string(&mut text)? as u64;
    if bytes > LARGEST_FILE {
        return Err(CatalogueError::TooLarge { bytes });
    }
    Ok(text)
}

impl Build {
    /// What the eBPF programs need of it.
    pub fn event_layout(&self, wake_at: u32) -> Layout {
        // `check` has held every offset against LARGEST_STRUCTURE, so none is cut off.
        Layout {
            block_page_id: self.block.page_id as u32,
            block_io_fix: self.block.io_fix as u32,
            block_state: self.block.state as u32,
            block_frame: self.block.frame as u32,
            node_space: self.node.space as u32,
            space_id: self.space.id as u32,
            io_fix_read: self.values.io_fix_read,
            state_file_page: self.values.state_file_page,
            reserved: [0; 2],
            wake_at,
        }
    }

    /// Bytes of a `fil_space_t` that hold all fields that are read.
    pub fn space_bytes(&self) -> usize {
        let SpaceLayout { id, version, deleted, flags } = self.space;
        id.max(version).max(deleted).max(flags) + 4
    }

    /// The entry as a catalogue of its own.
    ///
    /// # Errors
    /// When it cannot be written as TOML: never for a sound entry.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(&Catalogue { builds: vec![self.clone()] })
    }

    /// All symbols, with the fields that have them.
    pub fn names(&self) -> [(&'static str, &str); 11] {
        let Variables { pools, pool_count, page_size } = &self.variables;
        let functions = &self.functions;
        [
            ("pools", pools),
            ("pool_count", pool_count),
            ("page_size", page_size),
            ("read_complete", &functions.read_complete),
            ("page_create", &functions.page_create),
            ("page_dirty", &functions.page_dirty),
            ("page_clean", &functions.page_clean),
            ("frame_free", &functions.frame_free),
            ("file_open", &functions.file_open),
            ("chunk_allocate", &functions.chunk_allocate),
            ("chunk_deallocate", &functions.chunk_deallocate),
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_built_in_catalogue_is_sound() {
        let catalogue = Catalogue::built_in().unwrap();
        assert!(!catalogue.builds.is_empty());
        for build in &catalogue.builds {
            assert_eq!(catalogue.find(&build.build_id).unwrap().package, build.package);
            assert!(build.build_id.bytes().all(|digit| digit.is_ascii_hexdigit()));
        }
    }

    #[test]
    fn an_unknown_build_is_named_with_those_that_are_known() {
        let error = Catalogue::built_in().unwrap().find("00ff").unwrap_err().to_string();
        assert!(error.contains("00ff") && error.contains("mysql-server-core"), "{error}");
    }

    #[test]
    fn an_offset_outside_its_structure_is_refused() {
        let text = BUILT_IN.replace("frame = 0x100", "frame = 0x16c");
        assert!(matches!(
            Catalogue::parse(&text),
            Err(CatalogueError::Outside { structure: "buf_block_t", offset: 0x16c, .. })
        ));
        let text = BUILT_IN.replace("frame = 0x100", "frame = 0xfffffffffffffff");
        assert!(Catalogue::parse(&text).is_err());
    }

    fn refused(from: &str, to: &str) -> String {
        assert!(BUILT_IN.contains(from), "{from}");
        Catalogue::parse(&BUILT_IN.replacen(from, to, 1)).unwrap_err().to_string()
    }

    #[test]
    fn nonsense_is_refused_in_a_sentence() {
        let id = "cc8a18826385d7182761a4a8f41044748267244d";
        for (from, to, words) in [
            ("state = 0x15", "state = 0x14", "io_fix and state of buf_block_t lie over each other"),
            (
                "newest = 0x30",
                "newest = 0x34",
                "newest of buf_block_t lies at 0x34, no multiple of its 8 bytes",
            ),
            ("oldest = 0x38", "oldest = 0x30", "lie over each other"),
            ("oldest = 0x38", "oldest = -8", "invalid value"),
            ("oldest = 0x38", "oldest = \"0x38\"", "invalid type"),
            ("oldest = 0x38", "", "missing field `oldest`"),
            ("oldest = 0x38", "oldest = 0x38\noldish = 1", "unknown field `oldish`"),
            ("chunks = 0x178", "chunks = 0x168", "lie over each other"),
            ("size = 0x2548", "size = 0x100", "lies outside a buf_pool_t of 0x100 bytes"),
            ("size = 24", "size = 0xffffffffffff", "lies outside a buf_chunk_t"),
            ("flags = 0x90", "flags = 0x1c", "lie over each other"),
            ("page_dirty = \"rsi\"", "page_dirty = \"eax\"", "unknown variant `eax`, expected one of `rdi`"),
            ("page_dirty = \"rsi\"", "page_dirty = \"rdx\"", "the probes read it in rsi"),
            (id, "not hexadecimal", "no build id"),
            (id, "", "no build id"),
            ("mysql-server-core 9.7.4-2", "a\\u001b[2Jb", "no name of a package"),
            ("\"buf_pool_ptr\"", "\"\"", "no symbol"),
            ("\"buf_pool_ptr\"", "\"srv_page_size\"", "another field has it"),
            ("io_fix_read = 1", "io_fix_read = 0", "are both 0"),
            ("io_fix_read = 1", "io_fix_read = 256", "invalid value"),
        ] {
            let error = refused(from, to);
            assert!(error.contains(words), "{to:?}: {error}");
        }
        assert!(matches!(
            Catalogue::parse(&format!("{BUILT_IN}{BUILT_IN}")),
            Err(CatalogueError::Twice(twice)) if twice == id
        ));
        let huge = "#".repeat(LARGEST_FILE as usize + 1);
        assert!(matches!(Catalogue::parse(&huge), Err(CatalogueError::TooLarge { .. })));
    }

    #[test]
    fn an_operator_s_own_entries_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let other = "00112233445566778899";
        let id = Catalogue::built_in().unwrap().builds[0].build_id.clone();
        assert!(Catalogue::with_own(&dir.path().join("none")).unwrap().find(&id).is_ok());
        fs::write(dir.path().join("a.toml"), BUILT_IN.replace(&id, other)).unwrap();
        fs::write(dir.path().join("notes.txt"), "not a catalogue").unwrap();
        let catalogue = Catalogue::with_own(dir.path()).unwrap();
        assert!(catalogue.find(&id).is_ok() && catalogue.find(other).is_ok());
        assert_eq!(catalogue.builds().len(), 2);
        // What is wrong is named with its file.
        let refused = |text: &[u8]| {
            fs::write(dir.path().join("b.toml"), text).unwrap();
            Catalogue::with_own(dir.path()).unwrap_err().to_string()
        };
        for (text, words) in [
            (BUILT_IN.as_bytes(), "two entries have the build id"),
            (b"build = 7", "invalid type"),
            (b"\xff\xfe", "UTF-8"),
            (vec![b' '; LARGEST_FILE as usize + 1].as_slice(), "where a catalogue has at most"),
        ] {
            let error = refused(text);
            assert!(error.contains("b.toml") && error.contains(words), "{error}");
        }
        fs::remove_file(dir.path().join("b.toml")).unwrap();
        fs::create_dir(dir.path().join("b.toml")).unwrap();
        assert!(Catalogue::with_own(dir.path()).unwrap_err().to_string().contains("no regular file"));
    }

    #[test]
    fn an_entry_survives_being_written() {
        let build = Catalogue::built_in().unwrap().builds[0].clone();
        let written = build.to_toml().unwrap();
        assert_eq!(Catalogue::parse(&written).unwrap().builds, [build]);
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in ".{0,400}") {
            let _ = Catalogue::parse(&text);
        }

        #[test]
        fn a_damaged_catalogue_is_parsed_or_refused(at in 0..BUILT_IN.len(), with in "[ -~]{0,3}") {
            let mut text = BUILT_IN.to_owned();
            if text.is_char_boundary(at) && text.is_char_boundary(at + 1) {
                text.replace_range(at..=at, &with);
                let _ = Catalogue::parse(&text);
            }
        }
    }
}
