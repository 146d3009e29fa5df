//! What stands in the migration stream between libxenguest and the network, on both sides.
//!
//! ```text
//!          source host                                            target host
//!  libxenguest ──► SourceFilter ════════ the stream ════════► TargetFilter ──► libxenguest
//!   (saves)        │   ▲    │                                  ▲  │   ▲          (restores)
//!                  ▼   │    │ hello: key, disks                │  ▼   │
//!               Window │    └──────── side channel ────────────┘ Restorer ◄── the domain's disks
//!              (copies)└─────────────── verdicts ────────────────────┘
//! ```
//!
//! The source's filter replaces PAGE_DATA records by [memory records](memory_record), in which a page may be a reference (place
//! on a disk, keyed hash) or a marker (zero page, run without data). The target's filter reads references from the disks,
//! checks the hashes, and rebuilds PAGE_DATA records for libxenguest, which never sees a private record.
//!
//! # What holds, whatever the hints say
//! * For every PFN, libxenguest at the target is handed what libxenguest at the source wrote last, before the next record that
//!   is not memory. Entries for one PFN arrive in the order in which they were written; those overtaken by a newer one may
//!   be missing.
//! * A page from a disk is handed on only if its keyed hash is that of the bytes which the source would have sent.
//! * When the first record after the memory, or VERIFY, passes, nothing is outstanding: the source sees to it, the target checks it.
//! * After VERIFY every byte travels as it is, and one record may say which pages were written since the suspension.
//! * The target reads from the network exactly up to the END record; libxl reads on from there.
//!
//! # When something fails
//! | what | then |
//! |---|---|
//! | side channel lost | the source sends every page that is not settled, and goes on without references |
//! | a disk cannot be read, or is not there | refusals; the pages themselves are sent |
//! | the target's filter or libxenguest fails | it closes its ends; the source's next write fails, and so does the save |
//! | the save side stops early | both filters report a stream that ends before END |
//!
//! Threads: on each side one that reads, one that decides and owns all state, and one that writes; beside them those that hash, those that
//! serve the side channel, and the restorer's. They meet in bounded channels; there is no lock around anything that waits.
//! `docs/stream.md` has every record byte by byte, and the states of both sides.

mod config;
mod descriptor;
mod dirty_log;
pub mod disk;
mod epochs;
mod error;
#[cfg(test)]
pub(crate) mod fault;
mod intake;
pub mod late_writes;
mod memory;
pub mod memory_record;
mod numbered;
mod outlet;
mod page_hash;
mod pfn_hash;
mod pool;
mod reference_map;
pub mod restorer;
pub mod side_message;
mod source;
mod summary;
mod target;
mod travel;
mod waiting;
mod watch;
mod window;
pub mod xen_stream;

#[cfg(test)]
mod tests;
#[cfg(test)]
#[allow(clippy::duplicate_mod, reason = "it is the same source on purpose")]
mod under_loom;

/// The locks of what waits for the wire.
mod sync {
    pub use std::sync::atomic::{AtomicU64, Ordering};
    pub use std::sync::{Condvar, Mutex, MutexGuard};
}

pub use config::{Config, DiskName};
pub use dirty_log::DirtyLog;
pub use error::{EngineError, HeaderProblem, SideError, StreamProblem};
pub use late_writes::LateWrites;
pub use reference_map::{MapError, Place, ReferenceMap};
pub use source::{Coming, Looks, PassLooks, SourceFilter, SourceParts};
pub use summary::{
    DiskSummary, DrainReport, RefusalCounts, SourceStats, SourceSummary, TargetStats, TargetSummary,
};
pub use target::{TargetFilter, TargetParts};
pub use travel::{BYTES_MAX as TRAVEL_BYTES_MAX, PFNS_MAX, Travel, Way, WayCounts};
pub use watch::Watch;
