//! What the probe and the kernel module say to each other over `/dev/poolskip`.
//!
//! The probe publishes whole generations: [`BEGIN`], any number of [`ADD`]s, [`PUBLISH`]. A generation that is begun again or
//! whose file is closed before it is published is dropped. `read(2)` on the device returns one [`Request`] of dom0 (it
//! blocks until there is one, or fails with `EAGAIN` under `O_NONBLOCK`); `poll(2)` reports `POLLIN` when there is one.
//! Only one process at a time may hold the device open (`EBUSY`), and it needs `CAP_SYS_ADMIN` (`EPERM`), since it may name
//! any process's memory.

/// Path of the misc device.
pub const DEVICE_PATH: &str = "/dev/poolskip";

/// Frames handed to the module in one [`Add`] at most.
pub const MAX_ADD: u32 = 65_536;

/// A run of user pages with their place on disk, 24 bytes; the module turns it into one or more [`crate::Run`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct UserRun {
    /// Virtual address of the first page in the process, a multiple of 4096.
    pub address: u64,
    /// Where its bytes lie on the whole disk, in bytes; a multiple of 512.
    pub disk_offset: u64,
    /// The disk ([`crate::Vdev`]).
    pub vdev: u32,
    /// Pages of 4096 bytes, at least 1.
    pub pages: u16,
    /// The list ([`crate::ListKind`]).
    pub list: u8,
    /// Zero.
    pub reserved: u8,
}

/// Argument of [`BEGIN`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Begin {
    /// In: [`crate::ABI_VERSION`]; any other is refused with `EPROTONOSUPPORT`.
    pub version: u32,
    /// In: zero.
    pub flags: u32,
    /// Out: the generation's number.
    pub generation: u64,
}

/// Argument of [`ADD`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Add {
    /// In: what [`BEGIN`] returned; `ESTALE` when it is not the open one.
    pub generation: u64,
    /// In: address of an array of [`UserRun`].
    pub runs: u64,
    /// In: its length, at most [`MAX_ADD`] (`E2BIG`).
    pub count: u32,
    /// In: the process whose addresses these are, as the caller's PID namespace numbers it (`ESRCH`).
    pub pid: i32,
    /// Out: pages translated and listed.
    pub pages_listed: u64,
    /// Out: pages left out because no page was mapped there.
    pub pages_unmapped: u64,
}

/// Argument of [`PUBLISH`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Publish {
    /// In: what [`BEGIN`] returned.
    pub generation: u64,
    /// In: [`Request::sequence`] of the request that this answers, 0 for none.
    pub answers: u64,
    /// In: frames in the read list.
    pub frames_read: u64,
    /// In: frames in the written list.
    pub frames_written: u64,
    /// In: clean frames of the pool, listed or not.
    pub pool_frames_clean: u64,
    /// In: frames of the pool.
    pub pool_frames: u64,
}

/// Answer of [`STATS`]. It only ever grows at its end, and the number of the call grows with it: a module knows the numbers of older
/// programs ([`STATS_FIRST`]) and gives them the fields that they know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Stats {
    /// Generations published since the module was loaded.
    pub generations: u64,
    /// Pages translated since then.
    pub pages_translated: u64,
    /// Pages that were not mapped.
    pub pages_unmapped: u64,
    /// Requests that came from dom0.
    pub requests: u64,
    /// Event-channel signals sent to dom0.
    pub signals: u64,
    /// Guest pages that hold lists now.
    pub list_pages: u64,
    /// PFN of the root page.
    pub root_pfn: u64,
    /// 1 when the guest runs on Xen and dom0 can find the lists, else 0.
    pub xen: u64,
    /// Calls of [`BEGIN`], [`ADD`], [`PUBLISH`] and [`WITHDRAW`] that were carried out: what the probe has cost.
    pub calls: u64,
    /// 1 between dom0's "begun" and "ended" ([`crate::xenstore::RequestKind`]), else 0.
    pub migrating: u64,
    /// Publications and withdrawals that dom0 was not told of, since they came between the two and answered no request.
    pub untold: u64,
    /// Requests that were forgotten because the probe did not read them.
    pub requests_forgotten: u64,
}

impl Stats {
    /// Bytes up to and with [`Self::xen`], which the first release had.
    pub const FIRST_SIZE: usize = 64;
}

/// One request of dom0, as `read(2)` returns it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Request {
    /// dom0's number of it.
    pub sequence: u64,
    /// What it wants ([`crate::xenstore::RequestKind`] as a number).
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = {
    assert!(size_of::<UserRun>() == 24);
    assert!(size_of::<Begin>() == 16);
    assert!(size_of::<Add>() == 40);
    assert!(size_of::<Publish>() == 48);
    assert!(size_of::<Stats>() == 96);
    assert!(core::mem::offset_of!(Stats, calls) == Stats::FIRST_SIZE);
    assert!(size_of::<Request>() == 16);
};

const fn ioc(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (0xB7 << 8) | number
}

/// Starts a new generation: `_IOWR(0xB7, 1, Begin)`.
pub const BEGIN: u32 = ioc(3, 1, size_of::<Begin>());
/// Adds runs to it: `_IOWR(0xB7, 2, Add)`.
pub const ADD: u32 = ioc(3, 2, size_of::<Add>());
/// Publishes it: `_IOW(0xB7, 3, Publish)`.
pub const PUBLISH: u32 = ioc(1, 3, size_of::<Publish>());
/// Publishes that there is nothing, and frees all lists: `_IO(0xB7, 4)`.
pub const WITHDRAW: u32 = ioc(0, 4, 0);
/// Reads the module's counters: `_IOR(0xB7, 5, Stats)`.
pub const STATS: u32 = ioc(2, 5, size_of::<Stats>());
/// The same of the first release, without the fields behind [`Stats::xen`].
pub const STATS_FIRST: u32 = ioc(2, 5, Stats::FIRST_SIZE);
