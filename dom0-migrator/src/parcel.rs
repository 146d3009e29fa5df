//! Messages that are too long for a packet, in a sealed file without a name whose descriptor travels in the packet.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Longest message in a file, in bytes.
pub const LENGTH_MAX: u64 = 8 << 20;

/// Puts a message into a file of its own.
///
/// # Errors
/// What the system says; `InvalidInput` for a message of more than [`LENGTH_MAX`] bytes.
pub fn pack(message: &[u8]) -> io::Result<OwnedFd> {
    if message.len() as u64 > LENGTH_MAX {
        let text = format!("a message of {} bytes, {LENGTH_MAX} at most are handed over", message.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = File::from(memfd_create(c"poolskip-message", flags)?);
    file.write_all(message)?;
    let seals =
        SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// Takes the message out again.
///
/// # Errors
/// What the system says; `InvalidData` for a file that is none of ours, or longer than [`LENGTH_MAX`].
pub fn unpack(file: OwnedFd) -> io::Result<Vec<u8>> {
    let file = File::from(file);
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > LENGTH_MAX {
        let text = format!("a message of {} bytes, {LENGTH_MAX} at most are taken", metadata.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut message = vec![0; metadata.len() as usize];
    file.read_exact_at(&mut message, 0)?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked() {
        let message: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
        assert!(unpack(pack(&message).unwrap()).unwrap() == message);
        assert_eq!(unpack(pack(b"").unwrap()).unwrap(), b"");
    }

    #[test]
    fn what_is_too_long_or_no_file_is_refused() {
        assert!(pack(&vec![0; LENGTH_MAX as usize + 1]).is_err());
        let long = tempfile::tempfile().unwrap();
        long.set_len(1 << 40).unwrap();
        assert_eq!(unpack(long.into()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(unpack(File::open("/dev/zero").unwrap().into()).is_err());
        assert!(unpack(io::pipe().unwrap().0.into()).is_err());
    }
}
