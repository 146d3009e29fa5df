//! The lists that the guest publishes: asking for them, finding them in its memory, and reading them.
//!
//! All of it is hints, and all of it may be hostile: whatever goes wrong here is a reason to migrate without references, and
//! never one to fail.

mod event_channel;
mod memory;
mod report;
mod request;
mod walk;

pub use memory::{DomainMemory, GuestMemory, MemoryError};
pub use report::ListsReport;
pub use request::{Asked, RequestError, Requester};
pub use walk::{WalkError, Walked, walk};

use std::time::{Duration, Instant};

use crate::engine::ReferenceMap;
use crate::xen::DomainId;
use crate::xen::control::Control;
use crate::xen::guest::Guest;
use crate::xenstore::Xenstore;

/// Why there are no lists.
#[derive(Debug, thiserror::Error)]
pub enum ListsError {
    /// The guest did not answer.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Its memory cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// What is there are no lists.
    #[error(transparent)]
    Walk(#[from] WalkError),
}

/// Lists as they were read.
#[derive(Debug)]
pub struct Lists {
    /// Where pages lie.
    pub map: ReferenceMap,
    /// What was read.
    pub report: ListsReport,
}

/// Asks a domain for its lists, if it was not `asked` already, and reads them.
///
/// # Errors
/// [`ListsError`]: then the migration goes on without references.
pub fn take(
    requester: &mut Requester<Xenstore>,
    control: &Control,
    guest: &Guest,
    domain: DomainId,
    asked: Option<u64>,
    patience: Duration,
) -> Result<Lists, ListsError> {
    let asked = asked.map_or_else(|| requester.request(), Ok)?;
    // While the guest makes them: a table of the frames of all its memory takes a while.
    let mut memory = DomainMemory::open(requester.store(), control, guest, domain)?;
    let started = Instant::now();
    let asked = requester.snapshot(Some(asked), patience)?;
    let wait = started.elapsed();
    let started = Instant::now();
    let walked = walk(&mut memory, asked.root)?;
    let report = ListsReport::new(&walked, wait, started.elapsed());
    Ok(Lists { map: walked.map, report })
}
