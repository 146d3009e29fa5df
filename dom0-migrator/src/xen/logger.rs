//! A logger for Xen's libraries (`struct xentoollog_logger`) that hands each message to a [`Sink`].

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use std::sync::Arc;

/// How bad a message is, with xentoollog's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(pub u32);

impl Level {
    /// `XTL_DEBUG`.
    pub const DEBUG: Self = Self(1);
    /// `XTL_INFO`.
    pub const INFO: Self = Self(5);
    /// `XTL_WARN`.
    pub const WARN: Self = Self(7);
    /// `XTL_ERROR`.
    pub const ERROR: Self = Self(8);
}

/// Where messages go. Called from whatever thread the library runs on.
pub trait Sink: Send + Sync + 'static {
    /// One message; `errno` is -1 or the error that it is about.
    fn message(&self, level: Level, errno: i32, context: &str, text: &str);
    /// Progress of a step: `done` of `total`.
    fn progress(&self, context: &str, doing: &str, done: u64, total: u64);
}

/// The C structure, with our data behind it (`xentoollog.h` leaves that place to the logger).
#[repr(C)]
struct Vtable {
    vmessage: unsafe extern "C" fn(*mut Vtable, c_uint, c_int, *const c_char, *const c_char, *mut c_void),
    progress: unsafe extern "C" fn(*mut Vtable, *const c_char, *const c_char, c_int, c_ulong, c_ulong),
    destroy: unsafe extern "C" fn(*mut Vtable),
    sink: Arc<dyn Sink>,
}

/// A logger that a library can be given. It must outlive every handle opened with it.
pub struct Logger(Box<Vtable>);

impl Logger {
    /// A logger that hands everything to `sink`.
    pub fn new(sink: Arc<dyn Sink>) -> Self {
        Self(Box::new(Vtable { vmessage, progress, destroy, sink }))
    }

    /// The pointer that libraries take.
    pub(crate) fn as_ptr(&self) -> *mut c_void {
        std::ptr::from_ref(&*self.0).cast_mut().cast()
    }
}

impl std::fmt::Debug for Logger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Logger")
    }
}

/// Longest message that is kept, in bytes; libxenctrl's own buffer has 1,024.
const MESSAGE_MAX: usize = 4096;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("the way a va_list is passed on is written for x86-64 Linux: add the target's own");

unsafe extern "C" {
    // `va_list` is an array of one structure on x86-64, so a parameter of that type is a pointer (System V ABI, 3.5.7).
    fn vsnprintf(buffer: *mut c_char, size: usize, format: *const c_char, arguments: *mut c_void) -> c_int;
}

/// Text of a C string that may be null.
///
/// # Safety
/// `text` must be null or a NUL-terminated string that lives as long as the result is used.
unsafe fn text<'a>(text: *const c_char) -> std::borrow::Cow<'a, str> {
    if text.is_null() {
        return std::borrow::Cow::Borrowed("");
    }
    // SAFETY: not null, and the caller vouches for the rest.
    unsafe { CStr::from_ptr(text) }.to_string_lossy()
}

unsafe extern "C" fn vmessage(
    logger: *mut Vtable,
    level: c_uint,
    errno: c_int,
    context: *const c_char,
    format: *const c_char,
    arguments: *mut c_void,
) {
    let mut buffer = [0_u8; MESSAGE_MAX];
    // SAFETY: the buffer has the size that is given; format and arguments belong together, the library says.
    let length = unsafe { vsnprintf(buffer.as_mut_ptr().cast(), buffer.len(), format, arguments) };
    let length = usize::try_from(length).unwrap_or(0).min(MESSAGE_MAX - 1);
    let message = String::from_utf8_lossy(&buffer[..length]);
    // SAFETY: the library passes the logger that it was given, and a string or null.
    let (logger, context) = unsafe { (&*logger, text(context)) };
    logger.sink.message(Level(level), errno, &context, message.trim_end_matches('\n'));
}

unsafe extern "C" fn progress(
    logger: *mut Vtable,
    context: *const c_char,
    doing: *const c_char,
    _percent: c_int,
    done: c_ulong,
    total: c_ulong,
) {
    // SAFETY: the library passes the logger that it was given, and strings or null.
    let (logger, context, doing) = unsafe { (&*logger, text(context), text(doing)) };
    logger.sink.progress(&context, &doing, done, total);
}

/// Called by nothing here: the logger is dropped by its owner, after all handles.
unsafe extern "C" fn destroy(_logger: *mut Vtable) {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xen::library::Library;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Kept(Mutex<Vec<String>>);

    impl Sink for Kept {
        fn message(&self, level: Level, errno: i32, context: &str, text: &str) {
            self.0.lock().unwrap().push(format!("{} {errno} {context}: {text}", level.0));
        }
        fn progress(&self, context: &str, doing: &str, done: u64, total: u64) {
            self.0.lock().unwrap().push(format!("{context}: {doing} {done}/{total}"));
        }
    }

    /// The real libxentoollog formats and calls; needs `libxentoollog1`, which libxen-dev brings.
    #[test]
    fn messages_of_the_real_library_arrive() {
        let library = Library::load("libxentoollog.so.1")
            .expect("this test needs libxentoollog.so.1 (package libxentoollog1)");
        type Log = unsafe extern "C" fn(*mut c_void, c_uint, c_int, *const c_char, *const c_char, ...);
        type Progress = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char, c_ulong, c_ulong);
        // SAFETY: the signatures are those of xentoollog.h.
        let (log, step) = unsafe {
            (
                library.function::<Log>("xtl_log").unwrap(),
                library.function::<Progress>("xtl_progress").unwrap(),
            )
        };
        let kept = Arc::new(Kept::default());
        let logger = Logger::new(kept.clone());
        let format = c"verify pfn %#lx failed (type %#x)";
        // SAFETY: the arguments fit the format, and the logger lives until after the calls.
        unsafe {
            log(logger.as_ptr(), 8, -1, c"xc".as_ptr(), format.as_ptr(), 0x1234_u64, 0_u32);
            step(logger.as_ptr(), c"xc".as_ptr(), c"Frames iteration 1".as_ptr(), 512, 1024);
        }
        let seen = kept.0.lock().unwrap();
        assert_eq!(seen[0], "8 -1 xc: verify pfn 0x1234 failed (type 0)");
        assert_eq!(seen[1], "xc: Frames iteration 1 512/1024");
    }
}
