//! A domain's log of dirty pages, for the source's filter to look at.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::control::{Control, HypercallBuffer};
use super::foreign::ForeignMemory;
use super::{CallError, DomainId};
use crate::engine::DirtyLog;

/// Most frames of a domain whose log is looked at: 16 TiB, 512 MiB of bits.
const FRAMES_MAX: u64 = 1 << 32;

/// The log of a domain that is being saved.
#[derive(Debug)]
pub struct DomainLog {
    control: Arc<Control>,
    domain: DomainId,
    frames: u64,
    buffer: Mutex<HypercallBuffer>,
}

impl DomainLog {
    /// For a domain; it need not be logged yet.
    ///
    /// # Errors
    /// [`CallError`], most often because there is no such domain or no memory for the bits.
    pub fn new(control: &Arc<Control>, domain: DomainId) -> Result<Self, CallError> {
        // Whole words, so that the last frames have one too.
        let frames = control.guest_frames(domain)?.next_multiple_of(64).min(FRAMES_MAX);
        let buffer = HypercallBuffer::new(control, (frames / 8) as usize).ok_or_else(|| CallError {
            call: "xc__hypercall_buffer_alloc_pages",
            domain,
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        Ok(Self { control: Arc::clone(control), domain, frames, buffer: Mutex::new(buffer) })
    }
}

impl DirtyLog for DomainLog {
    fn peek(&self, bits: &mut Vec<u64>) -> io::Result<()> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        self.control.logdirty_peek(self.domain, self.frames, &mut buffer, bits).map_err(|error| error.source)
    }

    fn are_gone(&self, pfns: &[u64]) -> io::Result<Vec<bool>> {
        // Asked about PVH and HVM guests alone, whose frames are mapped by these very numbers.
        let memory = ForeignMemory::open().map_err(io::Error::other)?;
        // A call that maps nothing at all fails as a whole.
        let one =
            |pfn: &u64| memory.copy(self.domain, &[*pfn]).map_or(true, |pages| matches!(pages[..], [None]));
        Ok(pfns.iter().map(one).collect())
    }
}
