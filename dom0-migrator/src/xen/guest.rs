//! libxenguest: saving and restoring a domain, and a PV domain's table of machine frames.
//!
//! The structures are those of `xenguest.h`, which are the same in all known releases ([`super::release`]); the one
//! difference is the number of arguments of `xc_domain_restore`.

use std::ffi::{c_int, c_long, c_uint, c_ulong, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};

use enlightenment::{PAGE_SIZE, Pfn};

use super::control::{Control, OpenError};
use super::library::Library;
use super::release::{Release, RestoreAbi};
use super::{CallError, DomainId};

/// Where a pre-copy stands, as libxenguest tells its policy.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrecopyStats {
    /// Rounds that are done.
    pub iteration: c_uint,
    /// Pages written in all of them.
    pub total_written: c_ulong,
    /// Pages to be written in the next one; negative while that is not known.
    pub dirty_count: c_long,
}

const _: () = assert!(size_of::<PrecopyStats>() == 24);

/// What a policy answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Precopy {
    /// Give up; the domain runs on here.
    Abort = -1,
    /// One more round.
    Continue = 0,
    /// Suspend the domain and send the rest.
    StopAndCopy = 1,
}

/// What `xc_domain_save` asks while it runs. The value of an answer is the callback's own return value.
pub trait SaveCallbacks {
    /// Suspend the domain: 0 when that failed.
    fn suspend(&mut self) -> i32;
    /// Whether to go on with the pre-copy.
    fn precopy_policy(&mut self, stats: PrecopyStats) -> Precopy;
    /// Have the device model log its writes, or no longer: 0 when that was done.
    fn switch_qemu_logdirty(&mut self, domain: DomainId, enable: bool) -> i32;
}

/// What `xc_domain_restore` asks while it runs.
pub trait RestoreCallbacks {
    /// All static data has come, but what `missing` names (bit 0 CPUID, bit 1 MSR): 0 when that is well.
    fn static_data_done(&mut self, missing: u32) -> i32;
}

/// Event channels and domains of the restored domain's xenstore and console, as libxl gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channels {
    /// Event channel of xenstore.
    pub store_evtchn: u32,
    /// Domain that serves xenstore.
    pub store_domain: DomainId,
    /// Event channel of the console.
    pub console_evtchn: u32,
    /// Domain that serves the console.
    pub console_domain: DomainId,
}

/// What a restore found out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Guest frame of xenstore's ring.
    pub store_gfn: u64,
    /// Guest frame of the console's ring.
    pub console_gfn: u64,
}

#[repr(C)]
struct RawSaveCallbacks {
    suspend: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    precopy_policy: Option<unsafe extern "C" fn(PrecopyStats, *mut c_void) -> c_int>,
    postcopy: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    checkpoint: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    wait_checkpoint: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    switch_qemu_logdirty: Option<unsafe extern "C" fn(u32, c_uint, *mut c_void) -> c_int>,
    data: *mut c_void,
}

#[repr(C)]
struct RawRestoreCallbacks {
    static_data_done: Option<unsafe extern "C" fn(c_uint, *mut c_void) -> c_int>,
    suspend: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    postcopy: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    checkpoint: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    wait_checkpoint: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    restore_results: Option<unsafe extern "C" fn(u64, u64, *mut c_void)>,
    data: *mut c_void,
}

#[repr(C)]
struct RawMeminfo {
    pt_levels: c_uint,
    guest_width: c_uint,
    pfn_type: *mut u64,
    p2m_table: *mut u64,
    p2m_size: c_ulong,
    p2m_frames: c_uint,
}

const _: () = {
    assert!(size_of::<RawSaveCallbacks>() == 56);
    assert!(size_of::<RawRestoreCallbacks>() == 56);
    assert!(size_of::<RawMeminfo>() == 40);
};

/// `XC_STREAM_PLAIN`: no checkpoints.
const STREAM_PLAIN: c_uint = 0;

type Save = unsafe extern "C" fn(*mut c_void, c_int, u32, u32, *mut RawSaveCallbacks, c_uint, c_int) -> c_int;
type Restore = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    u32,
    c_uint,
    *mut c_ulong,
    u32,
    c_uint,
    *mut c_ulong,
    u32,
    c_uint,
    *mut RawRestoreCallbacks,
    c_int,
) -> c_int;
type RestoreWithMemflags = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    u32,
    c_uint,
    *mut c_ulong,
    u32,
    c_uint,
    *mut c_ulong,
    u32,
    c_uint,
    *mut RawRestoreCallbacks,
    c_int,
    c_uint,
) -> c_int;
type MapMeminfo = unsafe extern "C" fn(*mut c_void, u32, *mut RawMeminfo) -> c_int;
type Resume = unsafe extern "C" fn(*mut c_void, u32, c_int) -> c_int;
type UnmapMeminfo = unsafe extern "C" fn(*mut c_void, *mut RawMeminfo) -> c_int;

#[derive(Clone, Copy, Debug)]
enum RestoreFunction {
    Plain(Restore),
    WithMemflags(RestoreWithMemflags),
}

/// libxenguest of the running release.
#[derive(Debug)]
pub struct Guest {
    save: Save,
    restore: RestoreFunction,
    map_meminfo: MapMeminfo,
    unmap_meminfo: UnmapMeminfo,
    resume: Resume,
}

impl Guest {
    /// Loads the library.
    ///
    /// # Errors
    /// [`OpenError`] when it is missing.
    pub fn load(release: Release, abi: RestoreAbi) -> Result<Self, OpenError> {
        let library = Library::load(&release.library("libxenguest"))?;
        // SAFETY: the signatures are those of xenguest.h in the release that the file name carries.
        unsafe {
            Ok(Self {
                save: library.function("xc_domain_save")?,
                restore: match abi {
                    RestoreAbi::Plain => RestoreFunction::Plain(library.function("xc_domain_restore")?),
                    RestoreAbi::Memflags => {
                        RestoreFunction::WithMemflags(library.function("xc_domain_restore")?)
                    }
                },
                map_meminfo: library.function("xc_map_domain_meminfo")?,
                unmap_meminfo: library.function("xc_unmap_domain_meminfo")?,
                resume: library.function("xc_domain_resume")?,
            })
        }
    }

    /// Lets a suspended domain run on where it is, as if the suspension had been cancelled. One that is not suspended is left
    /// as it is: the library looks first, and says `EINVAL`.
    ///
    /// # Errors
    /// [`CallError`], with `EINVAL` when the domain is not suspended.
    pub fn resume(&self, control: &Control, domain: DomainId) -> Result<(), CallError> {
        // 1: the guest's own call to suspend returns "cancelled", as for every failed migration of libxl's.
        // SAFETY: the handle is open; nothing else is passed but numbers.
        let done = unsafe { (self.resume)(control.as_ptr(), domain.0, 1) };
        if done == 0 { Ok(()) } else { Err(CallError::last("xc_domain_resume", domain)) }
    }

    /// Saves a domain to `stream`. On success the domain is suspended and everything is written; on failure the log of
    /// dirty pages is off again, and whether the domain is suspended depends on how far it came (libxl resumes it).
    ///
    /// `flags`: bit 0 live, bit 1 debug (send all pages again, to be compared).
    ///
    /// # Errors
    /// [`CallError`] with `errno` as the library left it.
    pub fn save<C: SaveCallbacks>(
        &self,
        control: &Control,
        stream: BorrowedFd<'_>,
        domain: DomainId,
        flags: u32,
        callbacks: &mut C,
    ) -> Result<(), CallError> {
        unsafe extern "C" fn suspend<C: SaveCallbacks>(data: *mut c_void) -> c_int {
            // SAFETY: `data` is the exclusive reference that `save` was given, and the library calls from that call's thread.
            unsafe { &mut *data.cast::<C>() }.suspend()
        }
        unsafe extern "C" fn policy<C: SaveCallbacks>(stats: PrecopyStats, data: *mut c_void) -> c_int {
            // SAFETY: as above.
            unsafe { &mut *data.cast::<C>() }.precopy_policy(stats) as c_int
        }
        unsafe extern "C" fn switch<C: SaveCallbacks>(
            domain: u32,
            enable: c_uint,
            data: *mut c_void,
        ) -> c_int {
            // SAFETY: as above.
            unsafe { &mut *data.cast::<C>() }.switch_qemu_logdirty(DomainId(domain), enable != 0)
        }
        let mut raw = RawSaveCallbacks {
            suspend: Some(suspend::<C>),
            precopy_policy: Some(policy::<C>),
            postcopy: None,
            checkpoint: None,
            wait_checkpoint: None,
            switch_qemu_logdirty: Some(switch::<C>),
            data: std::ptr::from_mut(callbacks).cast(),
        };
        // SAFETY: the handle is open, the callbacks and their data live until the call returns.
        let done = unsafe {
            (self.save)(control.as_ptr(), stream.as_raw_fd(), domain.0, flags, &raw mut raw, STREAM_PLAIN, -1)
        };
        if done == 0 { Ok(()) } else { Err(CallError::last("xc_domain_save", domain)) }
    }

    /// Restores a domain from `stream`. On success it is whole and paused; on failure it is of no use (libxl destroys it).
    ///
    /// # Errors
    /// [`CallError`] with `errno` as the library left it.
    pub fn restore<C: RestoreCallbacks>(
        &self,
        control: &Control,
        stream: BorrowedFd<'_>,
        domain: DomainId,
        channels: Channels,
        callbacks: &mut C,
    ) -> Result<Restored, CallError> {
        unsafe extern "C" fn static_data_done<C: RestoreCallbacks>(
            missing: c_uint,
            data: *mut c_void,
        ) -> c_int {
            // SAFETY: `data` is the exclusive reference that `restore` was given, and the library calls from that call's thread.
            unsafe { &mut *data.cast::<C>() }.static_data_done(missing)
        }
        let mut raw = RawRestoreCallbacks {
            static_data_done: Some(static_data_done::<C>),
            suspend: None,
            postcopy: None,
            checkpoint: None,
            wait_checkpoint: None,
            restore_results: None,
            data: std::ptr::from_mut(callbacks).cast(),
        };
        let mut restored = Restored::default();
        let (store, console) = (&raw mut restored.store_gfn, &raw mut restored.console_gfn);
        let Channels { store_evtchn, store_domain, console_evtchn, console_domain } = channels;
        let (handle, fd) = (control.as_ptr(), stream.as_raw_fd());
        // SAFETY: the handle is open; callbacks, their data and both results live until the call returns; the signature is
        // that of the loaded release.
        let done = unsafe {
            match self.restore {
                RestoreFunction::Plain(restore) => restore(
                    handle,
                    fd,
                    domain.0,
                    store_evtchn,
                    store,
                    store_domain.0,
                    console_evtchn,
                    console,
                    console_domain.0,
                    STREAM_PLAIN,
                    &raw mut raw,
                    -1,
                ),
                RestoreFunction::WithMemflags(restore) => restore(
                    handle,
                    fd,
                    domain.0,
                    store_evtchn,
                    store,
                    store_domain.0,
                    console_evtchn,
                    console,
                    console_domain.0,
                    STREAM_PLAIN,
                    &raw mut raw,
                    -1,
                    0,
                ),
            }
        };
        if done == 0 { Ok(restored) } else { Err(CallError::last("xc_domain_restore", domain)) }
    }

    /// A PV domain's table from its own frame numbers to machine frames.
    ///
    /// # Errors
    /// [`CallError`], for instance when the domain is not PV.
    pub fn machine_frames<'a>(
        &'a self,
        control: &'a Control,
        domain: DomainId,
    ) -> Result<MachineFrames<'a>, CallError> {
        let mut raw = RawMeminfo {
            pt_levels: 0,
            guest_width: 0,
            pfn_type: std::ptr::null_mut(),
            p2m_table: std::ptr::null_mut(),
            p2m_size: 0,
            p2m_frames: 0,
        };
        // SAFETY: the handle is open and the structure is zeroed, as the function wants it.
        if unsafe { (self.map_meminfo)(control.as_ptr(), domain.0, &raw mut raw) } != 0 {
            return Err(CallError::last("xc_map_domain_meminfo", domain));
        }
        Ok(MachineFrames { guest: self, control, raw })
    }
}

/// A PV domain's table of machine frames, mapped from the domain itself: the guest may change it at any time.
pub struct MachineFrames<'a> {
    guest: &'a Guest,
    control: &'a Control,
    raw: RawMeminfo,
}

impl MachineFrames<'_> {
    /// Entries that can be looked up.
    pub fn len(&self) -> u64 {
        if self.raw.p2m_table.is_null() || !matches!(self.raw.guest_width, 4 | 8) {
            return 0;
        }
        let mapped = u64::from(self.raw.p2m_frames) * PAGE_SIZE as u64 / u64::from(self.raw.guest_width);
        self.raw.p2m_size.min(mapped)
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Machine frame of a guest frame; `None` beyond the table or where the guest has no memory.
    pub fn lookup(&self, pfn: Pfn) -> Option<u64> {
        let index = usize::try_from(pfn.0).ok().filter(|_| pfn.0 < self.len())?;
        // SAFETY: the table has `len` entries of `guest_width` bytes, and stays mapped as long as `self`; the guest may write
        // to it, hence the volatile read.
        let entry = unsafe {
            if self.raw.guest_width == 8 {
                self.raw.p2m_table.add(index).read_volatile()
            } else {
                match self.raw.p2m_table.cast::<u32>().add(index).read_volatile() {
                    u32::MAX => u64::MAX,
                    frame => u64::from(frame),
                }
            }
        };
        (entry != u64::MAX).then_some(entry)
    }
}

impl Drop for MachineFrames<'_> {
    fn drop(&mut self) {
        // SAFETY: the structure is as `xc_map_domain_meminfo` filled it, and nothing uses it after this.
        unsafe { (self.guest.unmap_meminfo)(self.control.as_ptr(), &raw mut self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every function that is called has to be in the library of the release; needs libxen-dev's 4.17 on this machine.
    #[test]
    fn the_functions_are_in_the_library() {
        let release = Release::new(4, 17);
        let guest = Guest::load(release, release.restore_abi().unwrap());
        guest.expect("this test needs libxenguest.so.4.17 (package libxenmisc4.17, which libxen-dev brings on Debian 12)");
    }
}
