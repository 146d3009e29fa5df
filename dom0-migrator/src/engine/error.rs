//! Why a filter stopped.

use std::io;

/// Why a filter stopped before the end of the stream.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A system call on one of the filter's descriptors failed.
    #[error("{what} at stream offset {offset}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Bytes of the input stream consumed before.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The input ended before its END record.
    #[error("stream ended at offset {offset}, inside {what}: the side that writes it has stopped")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Bytes of the input stream consumed before.
        offset: u64,
    },
    /// The input is not a stream that this filter understands.
    #[error("record {record:#010x} at stream offset {offset}: {problem}")]
    Stream {
        /// Where the record's header begins.
        offset: u64,
        /// Its type.
        record: u32,
        /// What is wrong with it.
        problem: StreamProblem,
    },
    /// Pages were left for a later pass and did not come in one: somebody else has cleared the log of dirty pages.
    #[error(
        "{pages} pages that were left for a later pass did not come (the first is PFN {first:#x}): the log of dirty pages is cleared by somebody else; try again with --no-peek"
    )]
    LeftOut {
        /// How many.
        pages: u64,
        /// The first of them.
        first: u64,
    },
    /// The two headers at the start of the stream.
    #[error("stream header: {0}")]
    Header(HeaderProblem),
    /// The filter's thread could not be started.
    #[error("cannot start the filter: {0}")]
    Start(io::Error),
    /// [`abort`](super::SourceFilter::abort) was called.
    #[error("aborted")]
    Aborted,
    /// The filter's thread has ended; `finish` tells why.
    #[error("the stream filter has already ended")]
    Gone,
    /// The filter's thread panicked: a bug.
    #[error("the stream filter's thread panicked")]
    Panicked,
}

/// What is wrong with the stream's two headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderProblem {
    /// The marker is not eight bytes of ones.
    #[error("marker is {0:#018x}, expected all ones")]
    Marker(u64),
    /// Not "XENF".
    #[error("id is {0:#010x}, expected 0x58454e46 (XENF)")]
    Id(u32),
    /// A version that is not known.
    #[error("stream version {0}, known are 2 and 3")]
    Version(u32),
    /// A big-endian image.
    #[error("big-endian image")]
    BigEndian,
    /// Pages are not 4 KiB.
    #[error("pages of 2^{0} bytes, expected 2^12")]
    PageShift(u16),
}

/// What is wrong with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamProblem {
    /// The length cannot be right for the type.
    #[error("length {length} does not fit the record, expected {expected}")]
    Length {
        /// The length in the header.
        length: u64,
        /// What the content asks for, or the most that is allowed.
        expected: u64,
    },
    /// PAGE_DATA with no PFN, or more than 1,024.
    #[error("{0} PFNs, expected 1 to 1024")]
    Count(u32),
    /// A page type that libxc does not know.
    #[error("unknown page type {page_type:#x} of PFN {pfn:#x}")]
    PageType {
        /// The type's four bits.
        page_type: u8,
        /// The PFN.
        pfn: u64,
    },
    /// A mandatory record of an unknown type.
    #[error("unknown mandatory record")]
    Unknown,
    /// Checkpointed streams (Remus, COLO) give the descriptor back to libxl in the middle.
    #[error("checkpointed streams are not supported")]
    Checkpoint,
    /// A record with our type, but not our magic, kind or version.
    #[error("not a memory record of this version: magic {magic:#010x}, kind {kind}, version {version}")]
    Private {
        /// Its first four bytes.
        magic: u32,
        /// Its kind.
        kind: u16,
        /// Its version.
        version: u16,
    },
    /// A private record where none may be: no side channel, or after VERIFY, or after the memory.
    #[error("a private record is not allowed here: {0}")]
    Forbidden(&'static str),
    /// A span of no page, beyond the last PFN, of an unknown kind, or of a type that does not go with its kind.
    #[error("bad span {index}: kind {kind}, page type {page_type:#x}, {count} pages from PFN {pfn:#x}")]
    Span {
        /// Its place in the record.
        index: u32,
        /// Its kind.
        kind: u8,
        /// Its page type.
        page_type: u8,
        /// Pages in it.
        count: u32,
        /// Its first PFN.
        pfn: u64,
    },
    /// References are numbered without a gap.
    #[error("references begin at number {found}, expected {expected}")]
    Sequence {
        /// The number in the record.
        found: u64,
        /// The number that follows the last one.
        expected: u64,
    },
    /// More references than were agreed on.
    #[error("{0} references outstanding, more than were agreed on")]
    Outstanding(u64),
    /// Memory is over, or VERIFY comes, and references are not settled.
    #[error("memory ends with {0} references that are neither loaded nor replaced")]
    Unsettled(u64),
}

/// Why the first exchange on the side channel failed, or what came over it later made no sense.
#[derive(Debug, thiserror::Error)]
pub enum SideError {
    /// A system call failed, or the other side has gone.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Not our message.
    #[error("message with magic {magic:#010x} and kind {kind}, expected kind {expected}")]
    Unexpected {
        /// Magic found.
        magic: u32,
        /// Kind found.
        kind: u16,
        /// Kind expected.
        expected: u16,
    },
    /// Another version of the protocol.
    #[error("side channel of version {found}, this is version {expected}")]
    Version {
        /// Found.
        found: u16,
        /// Expected.
        expected: u16,
    },
    /// A length or count out of bounds, or a field that cannot be.
    #[error("malformed message: {0}")]
    Malformed(&'static str),
    /// Random bytes for the key could not be had.
    #[error("no random key: {0}")]
    Random(io::Error),
}
