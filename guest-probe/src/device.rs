//! `/dev/poolskip`: lists go to the kernel module, dom0's requests come from it ([`enlightenment::device`] is the contract).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use enlightenment::ABI_VERSION;
use enlightenment::device::{
    ADD, Add, BEGIN, Begin, MAX_ADD, PUBLISH, Publish, Request, STATS, Stats, UserRun, WITHDRAW,
};
use thiserror::Error;

use crate::bytes::{u32_le, u64_le};

const REQUEST_BYTES: usize = size_of::<Request>();

/// Why the module does not do what is asked.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// It cannot be opened.
    #[error("cannot open {path}: {source}{}", advice(source))]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A call failed.
    #[error("the kernel module refuses to {what}: {source}")]
    Call {
        /// What was asked.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A request is cut short.
    #[error("the kernel module handed out {0} bytes of a request")]
    Short(usize),
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => {
            " (load the kernel module first: insmod poolskip.ko)"
        }
        Some(libc::EBUSY) => " (another guest-probe runs: see `guest-probe status`)",
        Some(libc::EPERM | libc::EACCES) => " (guest-probe needs to run as root)",
        _ => "",
    }
}

/// Pages that the module could and could not list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Translated {
    /// Listed.
    pub listed: u64,
    /// Left out, because no page was mapped there.
    pub unmapped: u64,
}

/// Who takes lists and has requests: the kernel module, or a test in its place.
pub trait Device {
    /// Starts a generation and returns its number.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn begin(&mut self) -> Result<u64, DeviceError>;

    /// Adds runs of a process to it, any number.
    ///
    /// # Errors
    /// [`DeviceError`]; the generation is then to be begun anew.
    fn add(&mut self, generation: u64, pid: i32, runs: &[UserRun]) -> Result<Translated, DeviceError>;

    /// Publishes it.
    ///
    /// # Errors
    /// [`DeviceError`]; then what was published before stays.
    fn publish(&mut self, publish: &Publish) -> Result<(), DeviceError>;

    /// Publishes that there is nothing.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn withdraw(&mut self) -> Result<(), DeviceError>;

    /// The module's counters.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn stats(&mut self) -> Result<Stats, DeviceError>;

    /// The next request, if there is one; does not wait.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn next_request(&mut self) -> Result<Option<Request>, DeviceError>;
}

/// The kernel module.
#[derive(Debug)]
pub struct ModuleDevice {
    file: File,
}

impl ModuleDevice {
    /// Opens the device; one process at a time can.
    ///
    /// # Errors
    /// [`DeviceError::Open`] with what to do.
    pub fn open(path: &Path) -> Result<Self, DeviceError> {
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
        Ok(Self { file: file.map_err(|source| DeviceError::Open { path: path.to_path_buf(), source })? })
    }

    fn call<T>(&self, what: &'static str, number: u32, argument: &mut T) -> Result<(), DeviceError> {
        // SAFETY: each caller passes the structure that the number names, which lives through the call; pointers in it are
        // those of slices that live as long.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::c_ulong::from(number), argument) };
        if result < 0 { Err(DeviceError::Call { what, source: io::Error::last_os_error() }) } else { Ok(()) }
    }
}

impl AsFd for ModuleDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Device for ModuleDevice {
    fn begin(&mut self) -> Result<u64, DeviceError> {
        let mut begin = Begin { version: ABI_VERSION, ..Begin::default() };
        self.call("begin a generation", BEGIN, &mut begin)?;
        Ok(begin.generation)
    }

    fn add(&mut self, generation: u64, pid: i32, runs: &[UserRun]) -> Result<Translated, DeviceError> {
        let mut translated = Translated::default();
        for piece in runs.chunks(MAX_ADD as usize) {
            let mut add = Add {
                generation,
                runs: piece.as_ptr() as u64,
                count: piece.len() as u32,
                pid,
                ..Add::default()
            };
            self.call("add runs", ADD, &mut add)?;
            translated.listed += add.pages_listed;
            translated.unmapped += add.pages_unmapped;
        }
        Ok(translated)
    }

    fn publish(&mut self, publish: &Publish) -> Result<(), DeviceError> {
        self.call("publish", PUBLISH, &mut publish.clone())
    }

    fn withdraw(&mut self) -> Result<(), DeviceError> {
        self.call("withdraw the lists", WITHDRAW, &mut 0_u64)
    }

    fn stats(&mut self) -> Result<Stats, DeviceError> {
        let mut stats = Stats::default();
        self.call("tell its counters", STATS, &mut stats)?;
        Ok(stats)
    }

    fn next_request(&mut self) -> Result<Option<Request>, DeviceError> {
        let mut bytes = [0; REQUEST_BYTES];
        match self.file.read(&mut bytes) {
            Ok(REQUEST_BYTES) => Ok(parse_request(&bytes)),
            Ok(short) => Err(DeviceError::Short(short)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(source) => Err(DeviceError::Call { what: "hand out a request", source }),
        }
    }
}

fn parse_request(bytes: &[u8]) -> Option<Request> {
    Some(Request { sequence: u64_le(bytes, 0)?, kind: u32_le(bytes, 8)?, reserved: u32_le(bytes, 12)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_module_is_named() {
        let error = ModuleDevice::open(Path::new("/dev/no-such-device")).unwrap_err().to_string();
        assert!(error.contains("insmod"), "{error}");
    }

    #[test]
    fn a_request_is_parsed() {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0] = 9;
        bytes[8] = 1;
        assert_eq!(parse_request(&bytes), Some(Request { sequence: 9, kind: 1, reserved: 0 }));
    }
}
