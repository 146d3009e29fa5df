//! What the core asks of the kernel.

use enlightenment::{PAGE_SIZE, Pfn};

use crate::Errno;

/// Stands in [`Shim::translate`]'s answer for a page that is mapped but must not be listed (the zero page, device memory).
pub const NOT_RAM: u64 = u64::MAX;

/// The kernel, as far as the core needs it: one method, one thing that only the kernel can do.
pub trait Shim {
    /// A process whose memory is held for translation.
    type Process;

    /// Allocates one page of zeros; `None` when there is no memory. No higher order is ever asked for.
    fn allocate(&mut self) -> Option<Pfn>;

    /// Frees a page that [`Self::allocate`] gave.
    fn free(&mut self, page: Pfn);

    /// The bytes of a page that [`Self::allocate`] gave.
    fn page(&mut self, page: Pfn) -> &mut [u8; PAGE_SIZE];

    /// Stores a 64-bit number at a multiple of 8 in such a page, whole, after everything that was written to any page before.
    fn store_release(&mut self, page: Pfn, offset: usize, value: u64);

    /// Copies from the calling process; `EFAULT` when it is not all there.
    ///
    /// # Errors
    /// `EFAULT`.
    fn copy_from_user(&mut self, to: &mut [u8], address: u64) -> Result<(), Errno>;

    /// Copies to the calling process.
    ///
    /// # Errors
    /// `EFAULT` when not all of it can be written.
    fn copy_to_user(&mut self, address: u64, from: &[u8]) -> Result<(), Errno>;

    /// Holds the memory of the process with this number in the caller's PID namespace until [`Self::release`].
    ///
    /// # Errors
    /// `ESRCH` when there is none, or it has no memory of its own.
    fn hold(&mut self, pid: i32) -> Result<Self::Process, Errno>;

    /// Lets go of it.
    fn release(&mut self, process: Self::Process);

    /// Writes the PFNs of the pages from `address` on into `pfns` and returns how many there are before the first that is not
    /// mapped; [`NOT_RAM`] stands for one that must not be listed. No page is brought in for that.
    ///
    /// # Errors
    /// `EINTR` when the caller is being killed.
    fn translate(&mut self, process: &Self::Process, address: u64, pfns: &mut [u64]) -> Result<usize, Errno>;

    /// A random number.
    fn random(&mut self) -> u64;

    /// Writes a xenstore node below [`enlightenment::xenstore::DIRECTORY`]; whether it worked. Neither has a NUL in it.
    fn xenstore_write(&mut self, node: &str, value: &str) -> bool;

    /// Reads such a node: how many bytes it has, the first of them in `to`. `None` when there is no such node.
    fn xenstore_read(&mut self, node: &str, to: &mut [u8]) -> Option<usize>;

    /// Removes the directory with all its nodes.
    fn xenstore_remove(&mut self);

    /// Allocates an event channel that dom0 may bind; `None` when Xen has none left.
    fn event_channel_allocate(&mut self) -> Option<u32>;

    /// Signals it; whether it worked.
    fn event_channel_signal(&mut self, port: u32) -> bool;

    /// Closes it.
    fn event_channel_close(&mut self, port: u32);
}
