//! `/dev/poolskip`, call by call.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use enlightenment::ABI_VERSION;
use enlightenment::device::{
    ADD, Add, BEGIN, Begin, DEVICE_PATH, PUBLISH, Publish, STATS, Stats, UserRun, WITHDRAW,
};
use nix::errno::Errno;

/// The open device.
pub struct Device(File);

impl Device {
    /// Opens it.
    pub fn open() -> Result<Self, Errno> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
            .open(DEVICE_PATH)
            .map(Self)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
    }

    /// Any request with any argument.
    pub fn call(&self, request: u32, argument: u64) -> Result<(), Errno> {
        // SAFETY: the module writes only to arguments that are its own structures, whose addresses come from the callers below,
        // or are meant to be refused.
        let result = unsafe { nix::libc::ioctl(self.0.as_raw_fd(), u64::from(request), argument) };
        Errno::result(result).map(|_| ())
    }

    fn with<T>(&self, request: u32, argument: &mut T) -> Result<(), Errno> {
        self.call(request, std::ptr::from_mut(argument).addr() as u64)
    }

    /// Begins a generation with these fields.
    pub fn begin_as(&self, version: u32, flags: u32) -> Result<u64, Errno> {
        let mut begin = Begin { version, flags, generation: 0 };
        self.with(BEGIN, &mut begin)?;
        Ok(begin.generation)
    }

    /// Begins a generation.
    pub fn begin(&self) -> Result<u64, Errno> {
        self.begin_as(ABI_VERSION, 0)
    }

    /// Adds with these fields; pages listed and not mapped.
    pub fn add_as(&self, generation: u64, pid: i32, runs: u64, count: u32) -> Result<(u64, u64), Errno> {
        let mut add = Add { generation, runs, count, pid, pages_listed: 0, pages_unmapped: 0 };
        self.with(ADD, &mut add)?;
        Ok((add.pages_listed, add.pages_unmapped))
    }

    /// Adds runs of a process.
    pub fn add(&self, generation: u64, pid: u32, runs: &[UserRun]) -> Result<(u64, u64), Errno> {
        self.add_as(generation, pid as i32, runs.as_ptr().addr() as u64, runs.len() as u32)
    }

    /// Publishes.
    pub fn publish(&self, publish: Publish) -> Result<(), Errno> {
        self.with(PUBLISH, &mut publish.clone())
    }

    /// Withdraws.
    pub fn withdraw(&self) -> Result<(), Errno> {
        self.call(WITHDRAW, 0)
    }

    /// The counters.
    pub fn stats(&self) -> Result<Stats, Errno> {
        let mut stats = Stats::default();
        self.with(STATS, &mut stats)?;
        Ok(stats)
    }

    /// Reads with this much room.
    pub fn read(&mut self, room: usize) -> Result<usize, Errno> {
        let mut bytes = vec![0; room];
        self.0.read(&mut bytes).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
    }

    /// Whether `poll(2)` says at once that a request waits.
    pub fn is_readable(&self) -> Result<bool, Errno> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;

        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).map(|count| count > 0)
    }
}
