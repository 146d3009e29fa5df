//! The core of `poolskip.ko`: turns addresses of a process into PFNs, and keeps lists of them that dom0 can read.
//!
//! Everything that decides something is here, in safe code without allocator or `std`; everything that touches the kernel
//! is behind [`Shim`], which the C in `kernel/` implements in the guest and a fake implements in the tests. The contracts are
//! those of `enlightenment`: [`enlightenment::device`] towards the probe, [`enlightenment::list`] and
//! [`enlightenment::xenstore`] towards dom0.
//!
//! ```text
//! probe ──ioctl──► Module ──► add: UserRun ──Shim::translate──► Run ──► Lists ──► Chain ──► pages that dom0 maps
//!       ◄──read───    │
//!                     └─► Announcement ──► xenstore nodes, event channel ──► dom0
//! ```
//!
//! The caller (the C shim) holds one lock around every call, so there is no concurrency in here but dom0's: that one reads
//! the lists through mappings of its own, at any time, and is served by the order of writes (see [`Lists`]).
#![no_std]
#![forbid(unsafe_code)]

mod add;
mod announcement;
mod chain;
mod errno;
mod lists;
mod module;
mod requests;
mod shim;
mod wire;

pub use announcement::Announcement;
pub use chain::Chain;
pub use errno::Errno;
pub use lists::{Counts, Lists};
pub use module::Module;
pub use requests::Requests;
pub use shim::{NOT_RAM, Shim};
