//! libxenctrl: a handle to the hypervisor, and the few calls made on it directly.

use std::ffi::{c_int, c_longlong, c_uint, c_ulong, c_void};
use std::ptr::NonNull;

use enlightenment::PAGE_SIZE;

use super::library::{Library, LibraryError};
use super::logger::Logger;
use super::release::Release;
use super::{CallError, DomainId};

/// `XEN_DOMCTL_SHADOW_OP_OFF`: no shadow mode, so no log of dirty pages either.
const SHADOW_OP_OFF: c_uint = 0;
/// `XEN_DOMCTL_SHADOW_OP_PEEK`: reads the log of dirty pages and leaves it as it is.
const SHADOW_OP_PEEK: c_uint = 12;

type Open = unsafe extern "C" fn(*mut c_void, *mut c_void, c_uint) -> *mut c_void;
type Close = unsafe extern "C" fn(*mut c_void) -> c_int;
type NrGpfns = unsafe extern "C" fn(*mut c_void, u32, *mut u64) -> c_int;
type ShadowControl = unsafe extern "C" fn(*mut c_void, u32, c_uint, *mut c_void, c_uint) -> c_int;
type LogdirtyControl = unsafe extern "C" fn(
    *mut c_void,
    u32,
    c_uint,
    *mut HypercallBuffer,
    c_ulong,
    c_uint,
    *mut ShadowStats,
) -> c_longlong;
type AllocPages = unsafe extern "C" fn(*mut c_void, *mut HypercallBuffer, c_int) -> *mut c_void;
type FreePages = unsafe extern "C" fn(*mut c_void, *mut HypercallBuffer, c_int);

/// `xc_hypercall_buffer_t`, the same in 4.17 to 4.22.
#[repr(C)]
struct HypercallBuffer {
    memory: *mut c_void,
    shadow: *mut HypercallBuffer,
    direction: c_int,
    user: *mut c_void,
    size: usize,
}

/// `xc_shadow_op_stats_t`: what the call counts, of which nothing is used here.
#[repr(C)]
#[derive(Default)]
struct ShadowStats {
    faults: u32,
    dirty: u32,
}

const _: () = {
    assert!(size_of::<HypercallBuffer>() == 40);
    assert!(size_of::<ShadowStats>() == 8);
};

/// An open `xc_interface`.
#[derive(Debug)]
pub struct Control {
    handle: NonNull<c_void>,
    close: Close,
    nr_gpfns: NrGpfns,
    shadow_control: ShadowControl,
    logdirty_control: LogdirtyControl,
    alloc_pages: AllocPages,
    free_pages: FreePages,
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
        // SAFETY: the signatures are those of xenctrl.h in 4.17 to 4.22 (xen_pfn_t is 64 bits wide on x86-64; the fourth
        // argument of xc_shadow_control, a pointer to an integer whose width changed, is always null here).
        let (open, close, nr_gpfns, shadow_control, logdirty_control, alloc_pages, free_pages) = unsafe {
            (
                library.function::<Open>("xc_interface_open")?,
                library.function::<Close>("xc_interface_close")?,
                library.function::<NrGpfns>("xc_domain_nr_gpfns")?,
                library.function::<ShadowControl>("xc_shadow_control")?,
                library.function::<LogdirtyControl>("xc_logdirty_control")?,
                library.function::<AllocPages>("xc__hypercall_buffer_alloc_pages")?,
                library.function::<FreePages>("xc__hypercall_buffer_free_pages")?,
            )
        };
        // SAFETY: the logger outlives the handle, both being owned by the result.
        let handle = NonNull::new(unsafe { open(logger.as_ptr(), logger.as_ptr(), 0) })
            .ok_or_else(|| OpenError::Open(std::io::Error::last_os_error()))?;
        Ok(Self {
            handle,
            close,
            nr_gpfns,
            shadow_control,
            logdirty_control,
            alloc_pages,
            free_pages,
            _logger: logger,
        })
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

    /// The guest frames that the log of dirty pages has now, as a bitmap (frame `n` is bit `n % 8` of byte `n / 8`). The log stays
    /// as it is: whoever reads it next finds the same frames.
    ///
    /// # Errors
    /// [`CallError`], most often because there is no such domain or its log is off.
    pub fn logdirty_peek(&self, domain: DomainId) -> Result<Vec<u8>, CallError> {
        let frames = self.guest_frames(domain)?;
        let bytes = frames.div_ceil(8) as usize;
        let pages = c_int::try_from(bytes.div_ceil(PAGE_SIZE).max(1)).unwrap_or(c_int::MAX);
        let mut buffer = HypercallBuffer {
            memory: std::ptr::null_mut(),
            shadow: std::ptr::null_mut(),
            direction: 0,
            user: std::ptr::null_mut(),
            size: 0,
        };
        // SAFETY: the handle is open, the structure is live and zeroed as `DECLARE_HYPERCALL_BUFFER` does it.
        let memory = unsafe { (self.alloc_pages)(self.as_ptr(), &raw mut buffer, pages) };
        if memory.is_null() {
            return Err(CallError::last("xc_hypercall_buffer_alloc_pages", domain));
        }
        let mut stats = ShadowStats::default();
        // SAFETY: the buffer has at least one bit for each of `frames` frames.
        let done = unsafe {
            (self.logdirty_control)(
                self.as_ptr(),
                domain.0,
                SHADOW_OP_PEEK,
                &raw mut buffer,
                frames,
                0,
                &raw mut stats,
            )
        };
        // Taken before anything else can change it.
        let result = if done == c_longlong::try_from(frames).unwrap_or(c_longlong::MAX) {
            let mut bitmap = vec![0; bytes];
            // SAFETY: the allocation has `pages` whole pages, which are at least `bytes`, and the hypercall has filled them.
            unsafe { std::ptr::copy_nonoverlapping(memory.cast::<u8>(), bitmap.as_mut_ptr(), bytes) };
            Ok(bitmap)
        } else {
            Err(CallError::last("xc_logdirty_control(peek)", domain))
        };
        // SAFETY: allocated above with the same number of pages, and not used after this.
        unsafe { (self.free_pages)(self.as_ptr(), &raw mut buffer, pages) };
        result
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it after this.
        unsafe { (self.close)(self.as_ptr()) };
    }
}
