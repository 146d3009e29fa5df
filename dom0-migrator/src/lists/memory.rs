//! A guest's memory, page by page, as the lists name it.

use std::io;

use enlightenment::{PAGE_SIZE, Pfn};

use crate::xen::control::{Control, OpenError};
use crate::xen::foreign::ForeignMemory;
use crate::xen::guest::{Guest, MachineFrames};
use crate::xen::{CallError, DomainId};
use crate::xenstore::{Store, StoreError};

/// A guest's memory; a fake stands in its place in tests.
pub trait GuestMemory {
    /// The guest's last frame number.
    fn last_pfn(&self) -> Pfn;

    /// Copies of pages, in the order asked for; `None` where the guest has no page.
    ///
    /// # Errors
    /// When none of them could be mapped.
    fn pages(&mut self, pfns: &[Pfn]) -> io::Result<Vec<Option<Box<[u8]>>>>;
}

/// Why a guest's memory cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// xenstore does not tell the domain's kind.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A kind of domain that is not known.
    #[error("domain {domain} is of type {kind:?}, known are pv, pvh and hvm")]
    Kind {
        /// The domain.
        domain: DomainId,
        /// What xenstore says.
        kind: Option<String>,
    },
    /// A library is missing.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The hypervisor refused.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The domain has no memory, says the hypervisor.
    #[error("domain {0} has no memory")]
    Empty(DomainId),
}

/// Memory of a running domain.
pub struct DomainMemory<'a> {
    foreign: ForeignMemory,
    domain: DomainId,
    last_pfn: Pfn,
    /// PV guests are mapped by machine frame; the others by their own numbers.
    machine_frames: Option<MachineFrames<'a>>,
}

impl<'a> DomainMemory<'a> {
    /// Opens a domain's memory for reading.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn open(
        store: &mut impl Store,
        control: &'a Control,
        guest: &'a Guest,
        domain: DomainId,
    ) -> Result<Self, MemoryError> {
        let kind = store.read_text(&format!("/libxl/{domain}/type"))?;
        let machine_frames = match kind.as_deref() {
            Some("pv") => Some(guest.machine_frames(control, domain)?),
            Some("pvh" | "hvm") => None,
            _ => return Err(MemoryError::Kind { domain, kind }),
        };
        let frames = control.guest_frames(domain)?;
        let last_pfn = frames.checked_sub(1).map(Pfn).ok_or(MemoryError::Empty(domain))?;
        Ok(Self { foreign: ForeignMemory::open()?, domain, last_pfn, machine_frames })
    }
}

impl GuestMemory for DomainMemory<'_> {
    fn last_pfn(&self) -> Pfn {
        self.last_pfn
    }

    fn pages(&mut self, pfns: &[Pfn]) -> io::Result<Vec<Option<Box<[u8]>>>> {
        let frames: Vec<Option<u64>> = pfns
            .iter()
            .map(|&pfn| match &self.machine_frames {
                _ if pfn > self.last_pfn => None,
                Some(table) => table.lookup(pfn),
                None => Some(pfn.0),
            })
            .collect();
        let known: Vec<u64> = frames.iter().flatten().copied().collect();
        let mut copies = self.foreign.copy(self.domain, &known)?.into_iter();
        Ok(frames
            .into_iter()
            .map(|frame| frame.and_then(|_| copies.next().flatten()))
            .map(|page| page.filter(|page| page.len() == PAGE_SIZE))
            .collect())
    }
}
