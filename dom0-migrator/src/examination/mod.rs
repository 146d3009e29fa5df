//! What `doctor` asks another host's `receive`, and what it hears. Nothing is changed on either host by any of it, and no byte of a disk
//! goes over the network.
//!
//! ```text
//! doctor                                      receive
//!   │ ── control: Greeting, Examine(…) ────────►│
//!   │ ◄────────────────── Examined(…) ──────────│
//!   │ ── Examine(…) ───────────────────────────►│   as often as it likes
//!   │ ── Examine(Link { bytes }) ──────────────►│
//!   │ ◄────────────────── Examined(Ready) ──────│
//!   │ ══ bytes ════════════════════════════════►│
//!   │ ◄────────────────── Examined(Arrived) ────│
//! ```

mod attend;
pub mod blocks;

pub use attend::attend;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Bytes that one question about the link may bring.
pub const LINK_MAX: u64 = 1 << 30;
/// Offsets that one question about a disk may name.
pub const OFFSETS_MAX: usize = 256;

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Good,
    /// A migration can be done, but something had better be looked at.
    Warning,
    /// No migration with references can be done like this.
    Bad,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What.
    pub what: String,
    /// How good it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub way_out: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn good(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self { what: what.into(), state: State::Good, found: found.into(), way_out: None }
    }

    /// Something to look at.
    pub fn warning(what: impl Into<String>, found: impl Into<String>, way_out: &str) -> Self {
        Self { what: what.into(), state: State::Warning, found: found.into(), way_out: Some(way_out.into()) }
    }

    /// Something that must be mended.
    pub fn bad(what: impl Into<String>, found: impl Into<String>, way_out: &str) -> Self {
        Self { what: what.into(), state: State::Bad, found: found.into(), way_out: Some(way_out.into()) }
    }
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// How are you?
    Host,
    /// What time is it?
    Clock,
    /// What lies there?
    Blocks(Blocks),
    /// So many bytes follow, once you are ready.
    Link {
        /// How many, at most [`LINK_MAX`].
        bytes: u64,
    },
}

/// Blocks of a disk whose keyed hashes are wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    /// The disk, as the domain's configuration names it.
    pub path: PathBuf,
    /// 64 hexadecimal digits, chosen anew for each question: an answer tells nothing about another one.
    pub key: String,
    /// Offsets in bytes, each of a whole block within the disk.
    pub offsets: Vec<u64>,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// How the host is.
    Host(Box<Host>),
    /// The time, in nanoseconds after 1970.
    Clock(u64),
    /// The hashes, in the order of the offsets.
    Blocks {
        /// Bytes that the disk has.
        size: u64,
        /// Keyed BLAKE3 hashes, in hexadecimal.
        hashes: Vec<String>,
    },
    /// The bytes may come.
    Ready,
    /// They have come.
    Arrived,
    /// It cannot be answered.
    Not(String),
}

/// How a host is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Version of its program.
    pub version: String,
    /// What its helper speaks ([`crate::control::STREAM_VERSION`]).
    pub stream_version: u16,
    /// Its Xen, as in 4.17.
    pub xen: Option<String>,
    /// MiB that new domains can have.
    pub free_mib: Option<u64>,
    /// What its own `doctor` says.
    pub findings: Vec<Finding>,
}
