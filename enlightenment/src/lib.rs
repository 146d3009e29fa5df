//! What the guest tells the host.
//!
//! The ABI shared by `guest-probe` (which knows frames), `kernel-module` (which knows PFNs) and `dom0-migrator`
//! (which uses both). It has three faces, one module each:
//!
//! * [`device`]: what the probe and the kernel module say to each other over `/dev/poolskip`;
//! * [`list`]: the lists that lie in guest memory, as dom0 maps them;
//! * [`xenstore`]: the names and values of the nodes through which guest and dom0 find each other.
//!
//! Everything here is a *hint* for the reader: it may be stale, mistaken or hostile. Parsers take bytes, return values,
//! never panic and never allocate.
//!
//! All integers are little-endian and naturally aligned; every structure has its size asserted at compile time.
#![no_std]
#![forbid(unsafe_code)]

pub mod device;
pub mod list;
pub mod run;
pub mod xenstore;

pub use run::{Generation, ListKind, Pfn, Run, Vdev};

/// Version of everything in this crate. A reader refuses any other.
pub const ABI_VERSION: u32 = 1;

/// Bytes in a guest page, the unit of lists, hashes, references and refusals.
pub const PAGE_SIZE: usize = 4096;

#[cfg(not(target_endian = "little"))]
compile_error!("the enlightenment ABI is little-endian, and so must be its writer");

pub(crate) mod bytes {
    //! Reads of little-endian integers at a fixed place of a byte slice; `None` past the end.

    pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
    }

    pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
    }

    pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
        Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
    }
}
