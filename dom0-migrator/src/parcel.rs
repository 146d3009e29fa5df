//! What is too long for a packet, in a sealed file without a name whose descriptor travels in the packet.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Puts bytes into a file of their own, piece after piece.
///
/// # Errors
/// What the system says.
pub fn pack<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = File::from(memfd_create(c"poolskip-message", flags)?);
    for piece in pieces {
        file.write_all(piece)?;
    }
    let seals =
        SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// Takes them out again, `most` bytes at most.
///
/// # Errors
/// What the system says; `InvalidData` for a file that is none of ours, or longer.
pub fn unpack(file: OwnedFd, most: u64) -> io::Result<Vec<u8>> {
    let file = File::from(file);
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > most {
        let text = format!("a parcel of {} bytes, {most} at most are taken", metadata.len());
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
        assert!(unpack(pack(message.chunks(777)).unwrap(), 300_000).unwrap() == message);
        assert_eq!(unpack(pack([]).unwrap(), 9).unwrap(), b"");
    }

    #[test]
    fn what_is_too_long_or_no_file_is_refused() {
        assert!(unpack(pack([&b"long"[..]]).unwrap(), 3).is_err());
        let long = tempfile::tempfile().unwrap();
        long.set_len(1 << 40).unwrap();
        assert_eq!(unpack(long.into(), 1 << 20).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(unpack(File::open("/dev/zero").unwrap().into(), 9).is_err());
        assert!(unpack(io::pipe().unwrap().0.into(), 9).is_err());
    }
}
