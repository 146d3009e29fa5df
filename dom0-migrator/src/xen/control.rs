//! libxenctrl: a handle to the hypervisor, and the few calls made on it directly.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::NonNull;

use super::library::{Library, LibraryError};
use super::logger::Logger;
use super::release::Release;
use super::{CallError, DomainId};

/// `XEN_DOMCTL_SHADOW_OP_OFF`: no shadow mode, so no log of dirty pages either.
const SHADOW_OP_OFF: c_uint = 0;

type Open = unsafe extern "C" fn(*mut c_void, *mut c_void, c_uint) -> *mut c_void;
type Close = unsafe extern "C" fn(*mut c_void) -> c_int;
type NrGpfns = unsafe extern "C" fn(*mut c_void, u32, *mut u64) -> c_int;
type ShadowControl = unsafe extern "C" fn(*mut c_void, u32, c_uint, *mut c_void, c_uint) -> c_int;

/// An open `xc_interface`.
#[derive(Debug)]
pub struct Control {
    handle: NonNull<c_void>,
    close: Close,
    nr_gpfns: NrGpfns,
    shadow_control: ShadowControl,
    // Dropped after the handle is closed.
    _logger: Logger,
}

// SAFETY: xenctrl.h promises that a handle may be used by several threads unless XC_OPENFLAG_NON_REENTRANT was given, and the
// logger's sink is Send and Sync.
unsafe impl Send for Control {}
// SAFETY: see above.
unsafe impl Sync for Control {}

/// Why there is no handle.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A library or a function is missing.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The hypervisor's interface could not be opened.
    #[error(
        "cannot open the hypervisor's interface: {0}; is this dom0, with privcmd loaded, and are you root?"
    )]
    Open(std::io::Error),
}

impl Control {
    /// Opens the hypervisor's interface; the library's messages go to `logger`.
    ///
    /// # Errors
    /// [`OpenError`] when the library is missing or this is no dom0.
    pub fn open(release: Release, logger: Logger) -> Result<Self, OpenError> {
        let library = Library::load(&release.library("libxenctrl"))?;
        // SAFETY: the four signatures are those of xenctrl.h in 4.17 to 4.22 (xen_pfn_t is 64 bits wide on x86-64; the fourth
        // argument of xc_shadow_control, a pointer to an integer whose width changed, is always null here).
        let (open, close, nr_gpfns, shadow_control) = unsafe {
            (
                library.function::<Open>("xc_interface_open")?,
                library.function::<Close>("xc_interface_close")?,
                library.function::<NrGpfns>("xc_domain_nr_gpfns")?,
                library.function::<ShadowControl>("xc_shadow_control")?,
            )
        };
        // SAFETY: the logger outlives the handle, both being owned by the result.
        let handle = NonNull::new(unsafe { open(logger.as_ptr(), logger.as_ptr(), 0) })
            .ok_or_else(|| OpenError::Open(std::io::Error::last_os_error()))?;
        Ok(Self { handle, close, nr_gpfns, shadow_control, _logger: logger })
    }

    /// The handle, for functions of libxenguest.
    pub(crate) fn as_ptr(&self) -> *mut c_void {
        self.handle.as_ptr()
    }

    /// One more than the highest guest frame number of a domain.
    ///
    /// # Errors
    /// [`CallError`], most often because there is no such domain.
    pub fn guest_frames(&self, domain: DomainId) -> Result<u64, CallError> {
        let mut frames = 0;
        // SAFETY: the handle is open, and the pointer is to a live integer.
        if unsafe { (self.nr_gpfns)(self.as_ptr(), domain.0, &raw mut frames) } < 0 {
            return Err(CallError::last("xc_domain_nr_gpfns", domain));
        }
        Ok(frames)
    }

    /// Turns the log of dirty pages off, as `xc_domain_save` does when it ends. Harmless when it is off.
    ///
    /// # Errors
    /// [`CallError`], most often because there is no such domain.
    pub fn logdirty_off(&self, domain: DomainId) -> Result<(), CallError> {
        // SAFETY: the handle is open; this operation takes no memory.
        let done =
            unsafe { (self.shadow_control)(self.as_ptr(), domain.0, SHADOW_OP_OFF, std::ptr::null_mut(), 0) };
        if done < 0 {
            return Err(CallError::last("xc_shadow_control(off)", domain));
        }
        Ok(())
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it after this.
        unsafe { (self.close)(self.as_ptr()) };
    }
}
