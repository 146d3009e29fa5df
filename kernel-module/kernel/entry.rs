//! The root of the object that goes into the kernel: joins the core with the C shim, both ways.
//!
//! `cargo` does not see this file: `cargo xtask build module` compiles it by a bare rustc, with `core` built from its sources
//! for `target.json`. The functions that the shim calls are listed in [`crate`]'s caller, `xtask/src/build/module.rs`.
#![no_std]
#![deny(missing_docs, unsafe_op_in_unsafe_fn, warnings)]

use core::cell::UnsafeCell;
use core::ffi::{c_char, c_int, c_long, c_void};

use enlightenment::{PAGE_SIZE, Pfn};
use kernel_module::{Errno, Module, Shim};

/// `kernel/shim.c` and `kernel/walk.c`; each function is described there.
mod c {
    use super::{c_char, c_int, c_long, c_void};

    unsafe extern "C" {
        pub fn shim_page_allocate() -> u64;
        pub fn shim_page_free(pfn: u64);
        pub fn shim_page_address(pfn: u64) -> *mut c_void;
        pub fn shim_store_release(to: *mut u64, value: u64);
        pub fn shim_copy_from_user(to: *mut c_void, from: u64, length: usize) -> c_int;
        pub fn shim_copy_to_user(to: u64, from: *const c_void, length: usize) -> c_int;
        pub fn shim_mm_get(pid: c_int) -> *mut c_void;
        pub fn shim_translate(mm: *mut c_void, address: u64, pfns: *mut u64, count: usize) -> c_long;
        pub fn shim_xenstore_write(node: *const c_char, value: *const c_char) -> c_int;
        pub fn shim_xenstore_read(node: *const c_char, to: *mut c_char, room: usize) -> c_long;
        pub fn shim_xenstore_remove() -> c_int;
        pub fn shim_event_channel_op(operation: c_int, argument: *mut c_void) -> c_int;

        // Functions of the kernel itself, the same in all kernels.
        pub fn mmput(mm: *mut c_void);
        pub fn get_random_u64() -> u64;
    }
}

/// The kernel that this module runs in.
struct Linux;

/// A process's memory, held by a reference.
struct Memory(*mut c_void);

/// `text` with a NUL behind it; cut short where it does not fit.
fn c_string(text: &str) -> [u8; 64] {
    let mut out = [0; 64];
    for (to, from) in out.iter_mut().take(63).zip(text.bytes()) {
        *to = from;
    }
    out
}

fn check(result: c_int) -> Result<(), Errno> {
    if result < 0 { Err(Errno(-result)) } else { Ok(()) }
}

impl Shim for Linux {
    type Process = Memory;

    fn allocate(&mut self) -> Option<Pfn> {
        // SAFETY: may be called wherever one may sleep.
        let pfn = unsafe { c::shim_page_allocate() };
        (pfn != 0).then_some(Pfn(pfn))
    }

    fn free(&mut self, page: Pfn) {
        // SAFETY: by the trait's contract the page came from `allocate`, and nobody in this kernel uses it any more.
        unsafe { c::shim_page_free(page.0) }
    }

    fn page(&mut self, page: Pfn) -> &mut [u8; PAGE_SIZE] {
        // SAFETY: by the trait's contract the page came from `allocate`, so it is mapped and ours; the borrow of `self`
        // keeps a second reference away. dom0 only reads it, through a mapping of its own.
        unsafe { &mut *c::shim_page_address(page.0).cast() }
    }

    fn store_release(&mut self, page: Pfn, offset: usize, value: u64) {
        let bytes = self.page(page);
        if let Some(place) = bytes.get_mut(offset..).and_then(|rest| rest.first_chunk_mut::<8>()) {
            // SAFETY: eight bytes of a page, aligned since pages are and the offset is a multiple of 8.
            unsafe { c::shim_store_release(place.as_mut_ptr().cast(), value) }
        }
    }

    fn copy_from_user(&mut self, to: &mut [u8], address: u64) -> Result<(), Errno> {
        // SAFETY: `to` is writable for its length; the kernel checks the other side.
        check(unsafe { c::shim_copy_from_user(to.as_mut_ptr().cast(), address, to.len()) })
    }

    fn copy_to_user(&mut self, address: u64, from: &[u8]) -> Result<(), Errno> {
        // SAFETY: `from` is readable for its length; the kernel checks the other side.
        check(unsafe { c::shim_copy_to_user(address, from.as_ptr().cast(), from.len()) })
    }

    fn hold(&mut self, pid: i32) -> Result<Memory, Errno> {
        // SAFETY: takes any number.
        let mm = unsafe { c::shim_mm_get(pid) };
        if mm.is_null() { Err(Errno::ESRCH) } else { Ok(Memory(mm)) }
    }

    fn release(&mut self, process: Memory) {
        // SAFETY: `hold` took this reference, and it is given back once, since `process` is consumed.
        unsafe { c::mmput(process.0) }
    }

    fn translate(&mut self, process: &Memory, address: u64, pfns: &mut [u64]) -> Result<usize, Errno> {
        // SAFETY: the reference is held, and `pfns` is writable for its length.
        let got = unsafe { c::shim_translate(process.0, address, pfns.as_mut_ptr(), pfns.len()) };
        usize::try_from(got).map_err(|_| Errno::EINTR)
    }

    fn random(&mut self) -> u64 {
        // SAFETY: no condition.
        unsafe { c::get_random_u64() }
    }

    fn xenstore_write(&mut self, node: &str, value: &str) -> bool {
        let (node, value) = (c_string(node), c_string(value));
        // SAFETY: both end with NUL.
        unsafe { c::shim_xenstore_write(node.as_ptr().cast(), value.as_ptr().cast()) == 0 }
    }

    fn xenstore_read(&mut self, node: &str, to: &mut [u8]) -> Option<usize> {
        let node = c_string(node);
        // SAFETY: the node ends with NUL, and `to` is writable for its length.
        let length = unsafe { c::shim_xenstore_read(node.as_ptr().cast(), to.as_mut_ptr().cast(), to.len()) };
        usize::try_from(length).ok()
    }

    fn xenstore_remove(&mut self) {
        // SAFETY: no condition.
        unsafe { c::shim_xenstore_remove() };
    }

    fn event_channel_allocate(&mut self) -> Option<u32> {
        let mut unbound = AllocateUnbound { domain: DOMID_SELF, remote: 0, port: 0 };
        event_channel_op(EVTCHNOP_ALLOC_UNBOUND, &mut unbound).then_some(unbound.port)
    }

    fn event_channel_signal(&mut self, mut port: u32) -> bool {
        event_channel_op(EVTCHNOP_SEND, &mut port)
    }

    fn event_channel_close(&mut self, mut port: u32) {
        // By the contract of `Announcement` the port is known to be ours, so this cannot fail.
        event_channel_op(EVTCHNOP_CLOSE, &mut port);
    }
}

// Xen's public/event_channel.h and public/xen.h.
const EVTCHNOP_CLOSE: c_int = 3;
const EVTCHNOP_SEND: c_int = 4;
const EVTCHNOP_ALLOC_UNBOUND: c_int = 6;
const DOMID_SELF: u16 = 0x7ff0;

/// `struct evtchn_alloc_unbound`; those of send and close are a port alone.
#[repr(C)]
struct AllocateUnbound {
    domain: u16,
    remote: u16,
    port: u32,
}

/// A type that is an argument of an event-channel operation.
trait Operand {}
impl Operand for AllocateUnbound {}
impl Operand for u32 {}

fn event_channel_op(operation: c_int, argument: &mut impl Operand) -> bool {
    // SAFETY: the argument is one of the structures that the operations take; Xen checks what is in it.
    unsafe { c::shim_event_channel_op(operation, core::ptr::from_mut(argument).cast()) == 0 }
}

struct State(UnsafeCell<Module>);

// SAFETY: the shim holds its mutex around every call.
unsafe impl Sync for State {}

static STATE: State = State(UnsafeCell::new(Module::new()));

/// The module's state.
///
/// # Safety
/// The shim's mutex is held, or no other call can come yet or any more.
#[allow(clippy::mut_from_ref)]
unsafe fn state() -> &'static mut Module {
    // SAFETY: by this function's contract there is no other reference.
    unsafe { &mut *STATE.0.get() }
}

fn to_return(result: Result<(), Errno>) -> c_long {
    result.map_or_else(Errno::to_return, |()| 0)
}

/// The module is being loaded: 0, or a negative error number.
///
/// # Safety
/// As for [`state`], and so for all that follow.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poolskip_start(on_xen: bool) -> c_long {
    // SAFETY: by contract.
    to_return(unsafe { state() }.start(&mut Linux, on_xen))
}

/// The module is being unloaded, or could not be loaded after all.
///
/// # Safety
/// As for [`state`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poolskip_stop() {
    // SAFETY: by contract.
    unsafe { state() }.stop(&mut Linux);
}

/// Whether dom0 can find the lists.
///
/// # Safety
/// As for [`state`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poolskip_is_announced() -> bool {
    // SAFETY: by contract.
    unsafe { state() }.is_announced()
}

/// The xenstore watch fired; returns whether a request waits.
///
/// # Safety
/// As for [`state`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poolskip_watch_fired() -> bool {
    // SAFETY: by contract.
    let state = unsafe { state() };
    state.watch_fired(&mut Linux);
    state.has_request()
}

/// `read(2)`: bytes written, or a negative error number; and whether a request still waits.
///
/// # Safety
/// As for [`state`], and `more` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poolskip_read(to: u64, room: usize, more: *mut bool) -> c_long {
    // SAFETY: by contract.
    let state = unsafe { state() };
    let result = state.read(&mut Linux, to, room);
    // SAFETY: by contract.
    unsafe { more.write(state.has_request()) };
    match result {
        Ok(length) => length as c_long,
        Err(errno) => errno.to_return(),
    }
}

/// The device was closed.
///
/// # Safety
/// As for [`state`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poolskip_close() {
    // SAFETY: by contract.
    unsafe { state() }.close(&mut Linux);
}

/// `ioctl(2)`: 0, or a negative error number.
///
/// # Safety
/// As for [`state`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poolskip_ioctl(command: u32, argument: u64) -> c_long {
    // SAFETY: by contract.
    to_return(unsafe { state() }.ioctl(&mut Linux, command, argument))
}

/// A panic is a bug. An invalid instruction gives a backtrace of it, and ends only the thread that ran into it.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: raises an exception that the kernel handles, and does not come back.
    unsafe { core::arch::asm!("ud2", options(noreturn, nomem, nostack)) }
}
