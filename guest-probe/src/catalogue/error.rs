//! Why a catalogue is refused, one sentence each.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::{LARGEST_FILE, MOST_FILES, Register};

/// Why a catalogue cannot be used, or has no entry.
#[derive(Debug, Error)]
pub enum CatalogueError {
    /// It is not TOML, or lacks or has too many fields.
    #[error("the catalogue cannot be read: {0}")]
    Syntax(#[from] toml::de::Error),
    /// A file of the operator's own cannot be used.
    #[error("{path}: {error}; correct it or take it away")]
    Own {
        /// The file.
        path: PathBuf,
        /// Why.
        error: Box<Self>,
    },
    /// A file cannot be read.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    /// A file is no catalogue by its size.
    #[error("it has {bytes} bytes or more, where a catalogue has at most {LARGEST_FILE}")]
    TooLarge {
        /// Its size, as far as it was read.
        bytes: u64,
    },
    /// There are too many files.
    #[error("{0} has more than {MOST_FILES} catalogues")]
    TooMany(PathBuf),
    /// Two entries are for one build.
    #[error("two entries have the build id {0}: which one is right cannot be told")]
    Twice(String),
    /// A name is none.
    #[error("catalogue entry {build_id}: {field} is {value:?}, which is no {what}")]
    Name {
        /// The entry.
        build_id: String,
        /// The field.
        field: &'static str,
        /// What it says, cut.
        value: String,
        /// What it should be.
        what: &'static str,
    },
    /// A function's argument is not where the probes read it.
    #[error(
        "catalogue entry {build_id}: {function} has its argument in {}, but the probes read it in {}: \
         this build needs other probes", says.name(), read.name()
    )]
    Register {
        /// The entry.
        build_id: String,
        /// The function.
        function: &'static str,
        /// What the entry says.
        says: Register,
        /// What the probes read.
        read: Register,
    },
    /// An offset lies outside its structure.
    #[error(
        "catalogue entry {build_id}: offset {offset:#x} ({bytes} bytes) lies outside a {structure} of {size:#x} bytes"
    )]
    Outside {
        /// The entry.
        build_id: String,
        /// The structure.
        structure: &'static str,
        /// The offset.
        offset: usize,
        /// Bytes at the offset.
        bytes: usize,
        /// Bytes in the structure.
        size: usize,
    },
    /// Two fields share bytes.
    #[error("catalogue entry {build_id}: {first} and {second} of {structure} lie over each other")]
    Overlap {
        /// The entry.
        build_id: String,
        /// The structure.
        structure: &'static str,
        /// A field.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// A field lies where a compiler puts none.
    #[error(
        "catalogue entry {build_id}: {field} of {structure} lies at {offset:#x}, no multiple of its {bytes} bytes"
    )]
    Misaligned {
        /// The entry.
        build_id: String,
        /// The structure.
        structure: &'static str,
        /// The field.
        field: &'static str,
        /// Its offset.
        offset: usize,
        /// Its size.
        bytes: usize,
    },
    /// One number stands for two things.
    #[error("catalogue entry {build_id}: io_fix_none and io_fix_read are both {value}")]
    Values {
        /// The entry.
        build_id: String,
        /// The number.
        value: u8,
    },
    /// The build is not known.
    #[error(
        "mysqld with build id {build_id} is not in the catalogue, which knows: {known}; \
         `guest-probe doctor` says what can be found out about it, `guest-probe catalogue add --pid` makes an entry"
    )]
    Unknown {
        /// The build id.
        build_id: String,
        /// The packages that are known.
        known: String,
    },
}
