//! libxenforeignmemory: another domain's pages in this process.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::NonNull;

use enlightenment::PAGE_SIZE;

use super::DomainId;
use super::control::OpenError;
use super::library::Library;

type Open = unsafe extern "C" fn(*mut c_void, c_uint) -> *mut c_void;
type Close = unsafe extern "C" fn(*mut c_void) -> c_int;
type Map = unsafe extern "C" fn(*mut c_void, u32, c_int, usize, *const u64, *mut c_int) -> *mut c_void;
type Unmap = unsafe extern "C" fn(*mut c_void, *mut c_void, usize) -> c_int;

/// An open `xenforeignmemory_handle`. The library's ABI is stable (`libxenforeignmemory.so.1`).
#[derive(Debug)]
pub struct ForeignMemory {
    handle: NonNull<c_void>,
    close: Close,
    map: Map,
    unmap: Unmap,
}

impl ForeignMemory {
    /// Opens it.
    ///
    /// # Errors
    /// [`OpenError`] when the library is missing or this is no dom0.
    pub fn open() -> Result<Self, OpenError> {
        let library = Library::load("libxenforeignmemory.so.1")?;
        // SAFETY: the signatures are those of xenforeignmemory.h, whose ABI is stable.
        let (open, close, map, unmap) = unsafe {
            (
                library.function::<Open>("xenforeignmemory_open")?,
                library.function::<Close>("xenforeignmemory_close")?,
                library.function::<Map>("xenforeignmemory_map")?,
                library.function::<Unmap>("xenforeignmemory_unmap")?,
            )
        };
        // SAFETY: a null logger means that errors are printed to stderr.
        let handle = NonNull::new(unsafe { open(std::ptr::null_mut(), 0) })
            .ok_or_else(|| OpenError::Open(std::io::Error::last_os_error()))?;
        Ok(Self { handle, close, map, unmap })
    }

    /// Copies pages of a domain, read-only: `frames` as the domain's kind wants them (MFNs for PV, GFNs otherwise).
    /// A page that cannot be mapped is `None`.
    ///
    /// The guest may write to them meanwhile; so they are copied before anything looks at them.
    ///
    /// # Errors
    /// The error of a call that mapped nothing at all.
    pub fn copy(&self, domain: DomainId, frames: &[u64]) -> std::io::Result<Vec<Option<Box<[u8]>>>> {
        if frames.is_empty() {
            return Ok(Vec::new());
        }
        let mut errors = vec![0; frames.len()];
        // SAFETY: both arrays have as many entries as is said.
        let mapped = unsafe {
            (self.map)(
                self.handle.as_ptr(),
                domain.0,
                libc::PROT_READ,
                frames.len(),
                frames.as_ptr(),
                errors.as_mut_ptr(),
            )
        };
        if mapped.is_null() {
            return Err(std::io::Error::last_os_error());
        }
        let pages = errors
            .iter()
            .enumerate()
            .map(|(index, &error)| {
                (error == 0).then(|| {
                    let mut page = vec![0_u8; PAGE_SIZE].into_boxed_slice();
                    // SAFETY: page `index` of the mapping is there (its error is 0); the bytes are copied without a reference to
                    // memory that the guest may change.
                    unsafe {
                        std::ptr::copy_nonoverlapping(
                            mapped.cast::<u8>().add(index * PAGE_SIZE),
                            page.as_mut_ptr(),
                            PAGE_SIZE,
                        );
                    }
                    page
                })
            })
            .collect();
        // SAFETY: this is the mapping made above, and nothing refers to it any more.
        unsafe { (self.unmap)(self.handle.as_ptr(), mapped, frames.len()) };
        Ok(pages)
    }
}

impl Drop for ForeignMemory {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it after this.
        unsafe { (self.close)(self.handle.as_ptr()) };
    }
}
