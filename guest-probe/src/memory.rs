//! Another process's memory, read without stopping it.

use std::io::{self, IoSliceMut};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use thiserror::Error;

use crate::bytes::u64_le;

/// A read that failed.
#[derive(Debug, Error)]
#[error("cannot read {bytes} bytes at {address:#x} of process {pid}: {source}{}", advice(source))]
pub struct MemoryError {
    /// The process.
    pub pid: i32,
    /// Where.
    pub address: u64,
    /// How many bytes.
    pub bytes: usize,
    /// Why.
    pub source: io::Error,
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ESRCH) => " (it has ended while it was read)",
        Some(libc::EPERM) => " (guest-probe needs to run as root)",
        Some(libc::EFAULT) => " (nothing is mapped there: it is starting, resizing its pool or ending)",
        _ => "",
    }
}

/// Memory that can be read by address.
pub trait Memory {
    /// Fills the buffer from `address` on. The process runs meanwhile: a larger piece may be torn.
    ///
    /// # Errors
    /// When any part of it is not mapped, or the process is gone.
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), MemoryError>;

    /// Reads 8 bytes.
    ///
    /// # Errors
    /// Those of [`Memory::read`].
    fn read_u64(&self, address: u64) -> Result<u64, MemoryError> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64_le(&bytes, 0).unwrap_or_default())
    }
}

/// The memory of a process.
#[derive(Clone, Copy, Debug)]
pub struct ProcessMemory {
    /// Its PID.
    pub pid: i32,
}

impl Memory for ProcessMemory {
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), MemoryError> {
        let bytes = buffer.len();
        let failed = |source| MemoryError { pid: self.pid, address, bytes, source };
        let remote = RemoteIoVec { base: address as usize, len: bytes };
        let read = process_vm_readv(Pid::from_raw(self.pid), &mut [IoSliceMut::new(buffer)], &[remote])
            .map_err(|errno| failed(errno.into()))?;
        if read == bytes { Ok(()) } else { Err(failed(io::ErrorKind::UnexpectedEof.into())) }
    }
}

#[cfg(test)]
pub(crate) mod fake {
    //! Memory made of a few pieces.

    use super::*;

    /// Pieces by address.
    #[derive(Default)]
    pub struct FakeMemory(pub Vec<(u64, Vec<u8>)>);

    impl Memory for FakeMemory {
        fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), MemoryError> {
            for (start, piece) in &self.0 {
                let range = address.checked_sub(*start).and_then(|at| {
                    let at = usize::try_from(at).ok()?;
                    piece.get(at..at.checked_add(buffer.len())?)
                });
                if let Some(range) = range {
                    buffer.copy_from_slice(range);
                    return Ok(());
                }
            }
            let source = io::ErrorKind::NotFound.into();
            Err(MemoryError { pid: 0, address, bytes: buffer.len(), source })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_reads_itself() {
        let memory = ProcessMemory { pid: std::process::id() as i32 };
        let value = 0x0123_4567_89ab_cdef_u64;
        assert_eq!(memory.read_u64(std::ptr::from_ref(&value) as u64).unwrap(), value);
        let error = memory.read_u64(8).unwrap_err();
        assert_eq!((error.address, error.bytes), (8, 8));
        assert!(error.to_string().contains("nothing is mapped"), "{error}");
        let error = ProcessMemory { pid: i32::MAX }.read_u64(8).unwrap_err();
        assert!(error.to_string().contains("it has ended"), "{error}");
    }
}
