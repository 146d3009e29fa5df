//! A domain's grant table, as the hypervisor keeps it: which of its frames a backend has mapped so that it may write to them.

use std::ffi::{c_int, c_uint, c_ulong, c_void};
use std::ptr::NonNull;

use enlightenment::PAGE_SIZE;

use super::control::{Control, OpenError};
use super::library::Library;
use super::release::Release;
use super::{CallError, DomainId};

/// `XENMEM_resource_grant_table`.
const RESOURCE_GRANT_TABLE: c_uint = 1;
/// `XENMEM_resource_grant_table_id_shared`.
const ID_SHARED: c_uint = 0;
/// `GTF_type_mask`.
const TYPE_MASK: u16 = 3;
/// `GTF_permit_access`.
const PERMIT_ACCESS: u16 = 1;
/// `GTF_writing`: set by the hypervisor as long as somebody has the frame mapped for writing.
const WRITING: u16 = 1 << 4;
/// Bytes of a `grant_entry_v1_t`.
const ENTRY: usize = 8;
/// Pages of a table at most: far above any limit that is set in practice (64 by default).
const MAX_PAGES: u32 = 4096;

/// `struct gnttab_query_size`.
#[repr(C)]
struct QuerySize {
    domain: u16,
    frames: u32,
    max_frames: u32,
    status: i16,
}

const _: () = assert!(size_of::<QuerySize>() == 16);

type Version = unsafe extern "C" fn(*mut c_void, u32) -> c_int;
type Query = unsafe extern "C" fn(*mut c_void, *mut QuerySize) -> c_int;
type Open = unsafe extern "C" fn(*mut c_void, c_uint) -> *mut c_void;
type Close = unsafe extern "C" fn(*mut c_void) -> c_int;
type MapResource = unsafe extern "C" fn(
    *mut c_void,
    u16,
    c_uint,
    c_uint,
    c_ulong,
    c_ulong,
    *mut *mut c_void,
    c_int,
    c_int,
) -> *mut c_void;
type UnmapResource = unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int;

/// The functions, of libxenctrl of the running release and of libxenforeignmemory, whose ABI is stable.
#[derive(Debug)]
pub struct Grants {
    version: Version,
    query: Query,
    foreign: NonNull<c_void>,
    close: Close,
    map: MapResource,
    unmap: UnmapResource,
}

// SAFETY: the handle of libxenforeignmemory is a file descriptor and a logger that is not used here; it may move between threads.
unsafe impl Send for Grants {}
// SAFETY: mapping and unmapping through one handle are system calls on its descriptor, without state in the handle.
unsafe impl Sync for Grants {}

/// Why the table cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// The hypervisor refused.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A layout that is not known here.
    #[error("domain {domain} has a grant table of version {version}, only 1 can be read")]
    Version {
        /// The domain.
        domain: DomainId,
        /// What the hypervisor says.
        version: c_int,
    },
}

impl Grants {
    /// Loads the functions.
    ///
    /// # Errors
    /// [`OpenError`] when a library is missing or this is no dom0.
    pub fn open(release: Release) -> Result<Self, OpenError> {
        let control = Library::load(&release.library("libxenctrl"))?;
        let memory = Library::load("libxenforeignmemory.so.1")?;
        // SAFETY: the signatures are those of xenctrl.h in 4.17 to 4.22, and of xenforeignmemory.h.
        let (version, query, open, close, map, unmap) = unsafe {
            (
                control.function::<Version>("xc_gnttab_get_version")?,
                control.function::<Query>("xc_gnttab_query_size")?,
                memory.function::<Open>("xenforeignmemory_open")?,
                memory.function::<Close>("xenforeignmemory_close")?,
                memory.function::<MapResource>("xenforeignmemory_map_resource")?,
                memory.function::<UnmapResource>("xenforeignmemory_unmap_resource")?,
            )
        };
        // SAFETY: a null logger means that errors are printed to stderr.
        let foreign = NonNull::new(unsafe { open(std::ptr::null_mut(), 0) })
            .ok_or_else(|| OpenError::Open(std::io::Error::last_os_error()))?;
        Ok(Self { version, query, foreign, close, map, unmap })
    }

    /// Frames that somebody has mapped for writing now, as the table names them: machine frames of a PV domain, guest frames of
    /// any other. Sorted, each once.
    ///
    /// # Errors
    /// [`GrantError`].
    pub fn mapped_for_writing(&self, control: &Control, domain: DomainId) -> Result<Vec<u64>, GrantError> {
        // SAFETY: the handle is open.
        let version = unsafe { (self.version)(control.as_ptr(), domain.0) };
        if version != 1 {
            return Err(GrantError::Version { domain, version });
        }
        let number = u16::try_from(domain.0).unwrap_or(u16::MAX);
        let mut query = QuerySize { domain: number, frames: 0, max_frames: 0, status: 0 };
        // SAFETY: the handle is open, and the structure is live.
        let done = unsafe { (self.query)(control.as_ptr(), &raw mut query) };
        if done != 0 || query.status != 0 {
            return Err(CallError::last("xc_gnttab_query_size", domain).into());
        }
        let pages = query.frames.min(MAX_PAGES) as usize;
        if pages == 0 {
            return Ok(Vec::new());
        }
        let mut address = std::ptr::null_mut();
        // SAFETY: the handle is open; the table has that many pages.
        let resource = unsafe {
            (self.map)(
                self.foreign.as_ptr(),
                number,
                RESOURCE_GRANT_TABLE,
                ID_SHARED,
                0,
                pages as c_ulong,
                &raw mut address,
                libc::PROT_READ,
                0,
            )
        };
        if resource.is_null() {
            return Err(CallError::last("xenforeignmemory_map_resource", domain).into());
        }
        let mut table = vec![0; pages * PAGE_SIZE];
        // SAFETY: as many pages are mapped; they are copied without a reference, since the guest may write to them.
        unsafe { std::ptr::copy_nonoverlapping(address.cast::<u8>(), table.as_mut_ptr(), table.len()) };
        // SAFETY: mapped above, and not used after this.
        unsafe { (self.unmap)(self.foreign.as_ptr(), resource) };
        Ok(writable(&table))
    }
}

impl Drop for Grants {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it after this.
        unsafe { (self.close)(self.foreign.as_ptr()) };
    }
}

/// The frames of entries (`grant_entry_v1_t`: flags, domain, frame) that are mapped for writing.
fn writable(table: &[u8]) -> Vec<u64> {
    let mut frames: Vec<u64> = table
        .chunks_exact(ENTRY)
        .filter_map(|entry| {
            let &[flags_low, flags_high, _, _, a, b, c, d] = entry else { return None };
            let flags = u16::from_le_bytes([flags_low, flags_high]);
            let is_mapped = flags & TYPE_MASK == PERMIT_ACCESS && flags & WRITING != 0;
            is_mapped.then(|| u64::from(u32::from_le_bytes([a, b, c, d])))
        })
        .collect();
    frames.sort_unstable();
    frames.dedup();
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_mapped_for_writing_counts() {
        let entry =
            |flags: u16, frame: u32| [&flags.to_le_bytes()[..], &[0, 0], &frame.to_le_bytes()].concat();
        let table = [
            entry(0, 1),                                // invalid
            entry(PERMIT_ACCESS, 2),                    // granted, not mapped
            entry(PERMIT_ACCESS | 1 << 3, 3),           // mapped for reading
            entry(PERMIT_ACCESS | 1 << 3 | WRITING, 9), // for both
            entry(2 | WRITING, 5),                      // a transfer
            entry(PERMIT_ACCESS | WRITING, 4),
            entry(PERMIT_ACCESS | WRITING, 9),
        ]
        .concat();
        assert_eq!(writable(&table), [4, 9]);
        assert!(writable(&table[..7]).is_empty());
    }

    /// Every function that is called has to be in the library of the release; needs libxen-dev's 4.17 on this machine.
    #[test]
    fn the_functions_are_in_the_library() {
        match Grants::open(Release::new(4, 17)) {
            Ok(_) | Err(OpenError::Open(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
}
