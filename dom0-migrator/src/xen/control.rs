//! libxenctrl: a handle to the hypervisor, and the few calls made on it directly.

use std::ffi::{c_int, c_longlong, c_uint, c_ulong, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use enlightenment::PAGE_SIZE;

use super::library::{Library, LibraryError};
use super::logger::Logger;
use super::release::Release;
use super::{CallError, DomainId};

/// `XEN_DOMCTL_SHADOW_OP_OFF`: no shadow mode, so no log of dirty pages either.
const SHADOW_OP_OFF: c_uint = 0;
/// `XEN_DOMCTL_SHADOW_OP_PEEK`: copies the log of dirty pages, and does not clear it.
const SHADOW_OP_PEEK: c_uint = 12;

type Open = unsafe extern "C" fn(*mut c_void, *mut c_void, c_uint) -> *mut c_void;
type Close = unsafe extern "C" fn(*mut c_void) -> c_int;
type NrGpfns = unsafe extern "C" fn(*mut c_void, u32, *mut u64) -> c_int;
type ShadowControl = unsafe extern "C" fn(*mut c_void, u32, c_uint, *mut c_void, c_uint) -> c_int;
type LogdirtyControl = unsafe extern "C" fn(
    *mut c_void,
    u32,
    c_uint,
    *mut RawBuffer,
    c_ulong,
    c_uint,
    *mut c_void,
) -> c_longlong;
type AllocatePages = unsafe extern "C" fn(*mut c_void, *mut RawBuffer, c_int) -> *mut c_void;
type FreePages = unsafe extern "C" fn(*mut c_void, *mut RawBuffer, c_int);

/// `xc_hypercall_buffer_t`.
#[repr(C)]
#[derive(Debug)]
struct RawBuffer {
    hbuf: *mut c_void,
    param_shadow: *mut RawBuffer,
    dir: c_int,
    ubuf: *mut c_void,
    sz: usize,
}

const _: () = assert!(size_of::<RawBuffer>() == 40);

/// Memory that the hypervisor may write to, page by page.
#[derive(Debug)]
pub struct HypercallBuffer {
    control: Arc<Control>,
    raw: RawBuffer,
    pages: c_int,
}

// SAFETY: the memory is owned, and reached through `&mut self` alone; the handle may be used by several threads.
unsafe impl Send for HypercallBuffer {}

impl HypercallBuffer {
    /// Memory for so many bytes; `None` when there is none.
    pub fn new(control: &Arc<Control>, bytes: usize) -> Option<Self> {
        let pages = c_int::try_from(bytes.div_ceil(PAGE_SIZE).max(1)).ok()?;
        // As HYPERCALL_BUFFER_INIT_NO_BOUNCE has it.
        let ubuf = std::ptr::without_provenance_mut(usize::MAX);
        let mut raw =
            RawBuffer { hbuf: std::ptr::null_mut(), param_shadow: std::ptr::null_mut(), dir: 0, ubuf, sz: 0 };
        // SAFETY: the handle is open, and the structure is as the macro of xenctrl.h initialises it.
        let memory = unsafe { (control.allocate_pages)(control.as_ptr(), &raw mut raw, pages) };
        (!memory.is_null()).then(|| Self { control: Arc::clone(control), raw, pages })
    }

    fn bytes(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }
}

impl Drop for HypercallBuffer {
    fn drop(&mut self) {
        // SAFETY: this is what was allocated, and nothing refers to it any more.
        unsafe { (self.control.free_pages)(self.control.as_ptr(), &raw mut self.raw, self.pages) };
    }
}

/// An open `xc_interface`.
#[derive(Debug)]
pub struct Control {
    handle: NonNull<c_void>,
    close: Close,
    nr_gpfns: NrGpfns,
    shadow_control: ShadowControl,
    logdirty_control: LogdirtyControl,
    allocate_pages: AllocatePages,
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
        // SAFETY: the signatures are those of xenctrl.h in 4.17 to 4.22 (xen_pfn_t is 64 bits wide on x86-64; the fourth argument of
        // xc_shadow_control, a pointer to an integer whose width changed, is always null here, and so is the last one of
        // xc_logdirty_control).
        let (open, close, nr_gpfns, shadow_control) = unsafe {
            (
                library.function::<Open>("xc_interface_open")?,
                library.function::<Close>("xc_interface_close")?,
                library.function::<NrGpfns>("xc_domain_nr_gpfns")?,
                library.function::<ShadowControl>("xc_shadow_control")?,
            )
        };
        // SAFETY: as above.
        let (logdirty_control, allocate_pages, free_pages) = unsafe {
            (
                library.function::<LogdirtyControl>("xc_logdirty_control")?,
                library.function::<AllocatePages>("xc__hypercall_buffer_alloc_pages")?,
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
            allocate_pages,
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

    /// Copies the log of dirty pages of a domain's first `frames` frames, 64 of them a word, and does not clear it. The domain stands still meanwhile.
    ///
    /// # Errors
    /// [`CallError`]: `EBUSY` while another operation on the log is under way, `EINVAL` for a domain that is going.
    pub fn logdirty_peek(
        &self,
        domain: DomainId,
        frames: u64,
        buffer: &mut HypercallBuffer,
        bits: &mut Vec<u64>,
    ) -> Result<(), CallError> {
        let frames = frames.min(buffer.bytes() as u64 * 8);
        // SAFETY: the handle is open; the buffer has room for so many bits, and nobody else uses it.
        let done = unsafe {
            (self.logdirty_control)(
                self.as_ptr(),
                domain.0,
                SHADOW_OP_PEEK,
                &raw mut buffer.raw,
                frames as c_ulong,
                0,
                std::ptr::null_mut(),
            )
        };
        let Ok(copied) = u64::try_from(done) else {
            return Err(CallError::last("xc_logdirty_control(peek)", domain));
        };
        // Whole words that the hypervisor has written, and no more.
        let words = (copied.min(frames) / 64) as usize;
        // SAFETY: the buffer is aligned to pages and so long, and the hypervisor has written to it before it came back.
        let copied = unsafe { std::slice::from_raw_parts(buffer.raw.hbuf.cast::<u64>(), words) };
        bits.clear();
        bits.extend_from_slice(copied);
        Ok(())
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
