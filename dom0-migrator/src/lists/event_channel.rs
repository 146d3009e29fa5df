//! The event channel by which the guest signals that it has published. It only wakes: xenstore says what has happened, and is
//! looked at now and then without it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::xen::DomainId;

/// `IOCTL_EVTCHN_BIND_INTERDOMAIN`: `_IOC(_IOC_NONE, 'E', 1, 8)`.
const BIND_INTERDOMAIN: libc::c_ulong = 8 << 16 | (b'E' as libc::c_ulong) << 8 | 1;

/// `struct ioctl_evtchn_bind_interdomain`.
#[repr(C)]
struct BindInterdomain {
    remote_domain: u32,
    remote_port: u32,
}

/// A bound channel; unbound when dropped.
#[derive(Debug)]
pub struct EventChannel(File);

impl EventChannel {
    /// Binds the channel that a domain offers.
    ///
    /// # Errors
    /// What the kernel says, most often that the domain offers no such port.
    pub fn bind(domain: DomainId, port: u32) -> io::Result<Self> {
        let device = File::options().read(true).write(true).open("/dev/xen/evtchn")?;
        let bind = BindInterdomain { remote_domain: domain.0, remote_port: port };
        // SAFETY: the structure is the one that this ioctl reads, and lives until it returns.
        if unsafe { libc::ioctl(device.as_raw_fd(), BIND_INTERDOMAIN, &raw const bind) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(device))
    }

    /// Takes the signals that have come, so that more can come. Blocks when there are none: poll the descriptor first.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn take(&mut self) -> io::Result<()> {
        let mut ports = [0; 64];
        let length = self.0.read(&mut ports)?;
        self.0.write_all(&ports[..length - length % 4])
    }
}

impl AsFd for EventChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
