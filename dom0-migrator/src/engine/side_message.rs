//! What the two filters say to each other beside the stream.
//!
//! ```text
//!     source                                   target
//!       | -- HELLO: key, window, disks ----------> |  opens the disks
//!       | <- ANSWER: outstanding, disks ---------- |
//!       |        (from here on the stream may carry memory records)
//!       | <- VERDICTS: accepted, refused --------- |  as reads complete, many at once
//!       | <- SYNCED: number ---------------------- |  when a sync record has come through the stream
//!       | -- closes ----------------------------> |
//! ```
//!
//! Every message has a header of 16 octets, then its body; integers are little-endian.
//!
//! ```text
//!  header    0 magic "PsSc" | 4 kind u16 | 6 version u16 | 8 length of the body u32 | 12 zero
//!  HELLO     0 key, 32 octets | 32 window in pages u32 | 36 disks u32
//!            then per disk: vdev u32 | path length u16 | path
//!  ANSWER    0 references outstanding at most u32 | 4 disks u32
//!            then per disk: vdev u32 | size in bytes u64 (0: not opened) | length u16 | why not, UTF-8
//!  VERDICTS  0 ranges (A) u32 | 4 refusals (B) u32
//!            A × { first number u64, count u32, zero u32 }: accepted
//!            B × { number u64, reason u8, 7 zeros }: refused
//!  SYNCED    0 number u64
//! ```

use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use enlightenment::Vdev;

use super::config::DiskName;
use super::error::SideError;
use super::summary::DiskSummary;
use super::xen_stream::{u32_at, u64_at};

const MAGIC: u32 = u32::from_le_bytes(*b"PsSc");
/// Version of the protocol, the memory record's layout and the hash included. In version 1 pages were hashed by BLAKE3.
pub const VERSION: u16 = 2;
const HEADER: usize = 16;
/// Longest body: 255 disks with the longest of paths.
const MAX_BODY: usize = 2 << 20;
/// Disks in a hello at most: a reference names one by a byte.
pub const MAX_DISKS: usize = 255;
/// Longest path (`PATH_MAX`).
const MAX_PATH: usize = 4096;
/// Longest reason why a disk was not opened.
const MAX_PROBLEM: usize = 512;
/// Ranges, and refusals, in one message at most.
pub const MAX_VERDICTS: usize = 4096;

/// The source's first message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The key of all hashes.
    pub key: [u8; 32],
    /// References that the source will have outstanding at most.
    pub window_pages: u32,
    /// The domain's disks; references name them by their place here.
    pub disks: Vec<DiskName>,
}

/// The target's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// References that the target takes at once.
    pub max_outstanding: u32,
    /// The disks, in the hello's order.
    pub disks: Vec<DiskSummary>,
}

/// Why a reference was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Refusal {
    /// The bytes on the disk are others.
    Hash = 1,
    /// The disk could not be read.
    IoError = 2,
    /// The place is not on the disk, or not a multiple of 512.
    OutOfBounds = 3,
    /// There is no such disk.
    UnknownDisk = 4,
}

impl Refusal {
    fn from_u8(value: u8) -> Option<Self> {
        [Self::Hash, Self::IoError, Self::OutOfBounds, Self::UnknownDisk]
            .into_iter()
            .find(|&reason| reason as u8 == value)
    }
}

/// What became of references.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdicts {
    /// Numbers accepted: first and count.
    pub accepted: Vec<(u64, u32)>,
    /// Numbers refused, with the reason.
    pub refused: Vec<(u64, Refusal)>,
}

impl Verdicts {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.accepted.is_empty() && self.refused.is_empty()
    }
}

/// What the target says after its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// Verdicts.
    Verdicts(Verdicts),
    /// Everything before the sync record with this number is in libxenguest's hands.
    Synced(u64),
}

/// One of the four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Kind {
    Hello = 1,
    Answer = 2,
    Verdicts = 3,
    Synced = 4,
}

/// The fields of a body, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], SideError> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(SideError::Malformed("message is cut short"))?;
        self.0 = rest;
        Ok(taken)
    }
    fn u8(&mut self) -> Result<u8, SideError> {
        Ok(self.take(1)?.first().copied().unwrap_or(0))
    }
    fn u16(&mut self) -> Result<u16, SideError> {
        let bytes = self.take(2)?;
        Ok(u16::from_le_bytes(bytes.try_into().unwrap_or([0; 2])))
    }
    fn u32(&mut self) -> Result<u32, SideError> {
        Ok(u32_at(self.take(4)?, 0).unwrap_or(0))
    }
    fn u64(&mut self) -> Result<u64, SideError> {
        Ok(u64_at(self.take(8)?, 0).unwrap_or(0))
    }
    fn count(&mut self, most: usize) -> Result<usize, SideError> {
        let count = self.u32()? as usize;
        if count > most {
            return Err(SideError::Malformed("a count is out of bounds"));
        }
        Ok(count)
    }
    fn end(&self) -> Result<(), SideError> {
        if self.0.is_empty() { Ok(()) } else { Err(SideError::Malformed("bytes follow the message")) }
    }
}

fn write_message(to: &mut impl Write, kind: Kind, body: &[u8], what: &'static str) -> Result<(), SideError> {
    if body.len() > MAX_BODY {
        return Err(SideError::Malformed("message is too long"));
    }
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend_from_slice(&MAGIC.to_le_bytes());
    message.extend_from_slice(&(kind as u16).to_le_bytes());
    message.extend_from_slice(&VERSION.to_le_bytes());
    message.extend_from_slice(&(body.len() as u32).to_le_bytes());
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(body);
    to.write_all(&message).map_err(|source| SideError::Io { what, source })
}

fn read_message(from: &mut impl Read, kind: Kind, what: &'static str) -> Result<Vec<u8>, SideError> {
    read_message_of(from, &[kind], what).map(|(_, body)| body)
}

/// Reads a message of one of these kinds.
fn read_message_of(
    from: &mut impl Read,
    kinds: &[Kind],
    what: &'static str,
) -> Result<(Kind, Vec<u8>), SideError> {
    let failed = |source: io::Error| SideError::Io { what, source };
    let mut header = [0; HEADER];
    from.read_exact(&mut header).map_err(failed)?;
    let mut fields = Fields(&header);
    let (magic, found, version, length) =
        (fields.u32()?, fields.u16()?, fields.u16()?, fields.count(MAX_BODY)?);
    let kind = kinds.iter().copied().find(|&kind| magic == MAGIC && found == kind as u16);
    let Some(kind) = kind else {
        let expected = kinds.first().map_or(0, |&kind| kind as u16);
        return Err(SideError::Unexpected { magic, kind: found, expected });
    };
    if version != VERSION {
        return Err(SideError::Version { found: version, expected: VERSION });
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body).map_err(failed)?;
    Ok((kind, body))
}

impl Hello {
    /// Sends it.
    pub fn write(&self, to: &mut impl Write) -> Result<(), SideError> {
        if self.disks.len() > MAX_DISKS {
            return Err(SideError::Malformed("too many disks"));
        }
        let mut body = Vec::new();
        body.extend_from_slice(&self.key);
        body.extend_from_slice(&self.window_pages.to_le_bytes());
        body.extend_from_slice(&(self.disks.len() as u32).to_le_bytes());
        for disk in &self.disks {
            let path = disk.path.as_os_str().as_bytes();
            if path.len() > MAX_PATH {
                return Err(SideError::Malformed("a disk's path is too long"));
            }
            body.extend_from_slice(&disk.vdev.0.to_le_bytes());
            body.extend_from_slice(&(path.len() as u16).to_le_bytes());
            body.extend_from_slice(path);
        }
        write_message(to, Kind::Hello, &body, "sending the hello")
    }

    /// Receives it.
    pub fn read(from: &mut impl Read) -> Result<Self, SideError> {
        let body = read_message(from, Kind::Hello, "waiting for the hello")?;
        let mut fields = Fields(&body);
        let mut key = [0; 32];
        key.copy_from_slice(fields.take(32)?);
        let window_pages = fields.u32()?;
        let count = fields.count(MAX_DISKS)?;
        let mut disks = Vec::with_capacity(count);
        for _ in 0..count {
            let vdev = Vdev(fields.u32()?);
            let length = fields.u16()? as usize;
            if length > MAX_PATH {
                return Err(SideError::Malformed("a disk's path is too long"));
            }
            let path = fields.take(length)?.to_vec();
            disks.push(DiskName { vdev, path: PathBuf::from(std::ffi::OsString::from_vec(path)) });
        }
        fields.end()?;
        Ok(Self { key, window_pages, disks })
    }
}

impl Answer {
    /// Sends it.
    pub fn write(&self, to: &mut impl Write) -> Result<(), SideError> {
        let mut body = Vec::new();
        body.extend_from_slice(&self.max_outstanding.to_le_bytes());
        body.extend_from_slice(&(self.disks.len() as u32).to_le_bytes());
        for disk in &self.disks {
            let problem = disk.problem.as_deref().unwrap_or("");
            let end = problem.floor_char_boundary(MAX_PROBLEM.min(problem.len()));
            let problem = problem.get(..end).unwrap_or("");
            body.extend_from_slice(&disk.vdev.to_le_bytes());
            body.extend_from_slice(&disk.size_bytes.to_le_bytes());
            body.extend_from_slice(&(problem.len() as u16).to_le_bytes());
            body.extend_from_slice(problem.as_bytes());
        }
        write_message(to, Kind::Answer, &body, "answering the hello")
    }

    /// Receives it.
    pub fn read(from: &mut impl Read) -> Result<Self, SideError> {
        let body = read_message(from, Kind::Answer, "waiting for the answer to the hello")?;
        let mut fields = Fields(&body);
        let max_outstanding = fields.u32()?;
        let count = fields.count(MAX_DISKS)?;
        let mut disks = Vec::with_capacity(count);
        for _ in 0..count {
            let (vdev, size_bytes, length) = (fields.u32()?, fields.u64()?, fields.u16()? as usize);
            if length > MAX_PROBLEM {
                return Err(SideError::Malformed("a reason is too long"));
            }
            let problem = String::from_utf8_lossy(fields.take(length)?).into_owned();
            let problem = (!problem.is_empty()).then_some(problem);
            disks.push(DiskSummary { vdev, size_bytes, problem });
        }
        fields.end()?;
        Ok(Self { max_outstanding, disks })
    }
}

impl Verdicts {
    /// Sends them, in as many messages as they take.
    pub fn write(&self, to: &mut impl Write) -> Result<(), SideError> {
        let (mut accepted, mut refused) = (self.accepted.as_slice(), self.refused.as_slice());
        while !(accepted.is_empty() && refused.is_empty()) {
            let (ranges, more_ranges) = accepted.split_at(accepted.len().min(MAX_VERDICTS));
            let (refusals, more_refusals) = refused.split_at(refused.len().min(MAX_VERDICTS));
            (accepted, refused) = (more_ranges, more_refusals);
            let mut body = Vec::with_capacity(8 + 16 * (ranges.len() + refusals.len()));
            body.extend_from_slice(&(ranges.len() as u32).to_le_bytes());
            body.extend_from_slice(&(refusals.len() as u32).to_le_bytes());
            for (first, count) in ranges {
                body.extend_from_slice(&first.to_le_bytes());
                body.extend_from_slice(&u64::from(*count).to_le_bytes());
            }
            for (number, reason) in refusals {
                body.extend_from_slice(&number.to_le_bytes());
                body.extend_from_slice(&u64::from(*reason as u8).to_le_bytes());
            }
            write_message(to, Kind::Verdicts, &body, "sending verdicts")?;
        }
        Ok(())
    }

    fn parse(mut fields: Fields<'_>) -> Result<Self, SideError> {
        let (ranges, refusals) = (fields.count(MAX_VERDICTS)?, fields.count(MAX_VERDICTS)?);
        let mut verdicts =
            Self { accepted: Vec::with_capacity(ranges), refused: Vec::with_capacity(refusals) };
        for _ in 0..ranges {
            let (first, count, _) = (fields.u64()?, fields.u32()?, fields.u32()?);
            if first.checked_add(u64::from(count)).is_none() {
                return Err(SideError::Malformed("a range of references overflows"));
            }
            verdicts.accepted.push((first, count));
        }
        for _ in 0..refusals {
            let (number, reason) = (fields.u64()?, fields.u8()?);
            fields.take(7)?;
            let reason =
                Refusal::from_u8(reason).ok_or(SideError::Malformed("unknown reason of a refusal"))?;
            verdicts.refused.push((number, reason));
        }
        fields.end()?;
        Ok(verdicts)
    }
}

impl Report {
    /// Sends it, verdicts in as many messages as they take.
    pub fn write(&self, to: &mut impl Write) -> Result<(), SideError> {
        match self {
            Self::Verdicts(verdicts) => verdicts.write(to),
            Self::Synced(number) => {
                write_message(to, Kind::Synced, &number.to_le_bytes(), "answering a sync record")
            }
        }
    }

    /// Receives one message.
    pub fn read(from: &mut impl Read) -> Result<Self, SideError> {
        let (kind, body) =
            read_message_of(from, &[Kind::Verdicts, Kind::Synced], "waiting for what the target says")?;
        let mut fields = Fields(&body);
        if kind == Kind::Verdicts {
            return Verdicts::parse(fields).map(Self::Verdicts);
        }
        let number = fields.u64()?;
        fields.end()?;
        Ok(Self::Synced(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_come_back_as_they_went() {
        let hello = Hello {
            key: [7; 32],
            window_pages: 9,
            disks: vec![DiskName { vdev: Vdev(51712), path: "/dev/vdb".into() }],
        };
        let mut bytes = Vec::new();
        hello.write(&mut bytes).unwrap();
        assert_eq!(Hello::read(&mut bytes.as_slice()).unwrap(), hello);
        let answer = Answer {
            max_outstanding: 5,
            disks: vec![
                DiskSummary { vdev: 51712, size_bytes: 1 << 40, problem: None },
                DiskSummary { vdev: 51728, size_bytes: 0, problem: Some("no such file".into()) },
            ],
        };
        bytes.clear();
        answer.write(&mut bytes).unwrap();
        assert_eq!(Answer::read(&mut bytes.as_slice()).unwrap(), answer);
        assert!(matches!(Hello::read(&mut bytes.as_slice()), Err(SideError::Unexpected { kind: 2, .. })));
    }

    #[test]
    fn a_message_of_another_version_is_refused() {
        let mut bytes = Vec::new();
        Verdicts { accepted: vec![(0, 1)], refused: Vec::new() }.write(&mut bytes).unwrap();
        assert!(Report::read(&mut bytes.as_slice()).is_ok());
        for other in [0, VERSION - 1, VERSION + 1, u16::MAX] {
            bytes[6..8].copy_from_slice(&other.to_le_bytes());
            let read = Report::read(&mut bytes.as_slice());
            assert!(
                matches!(read, Err(SideError::Version { found, expected: VERSION }) if found == other),
                "{read:?}"
            );
        }
    }

    #[test]
    fn many_verdicts_take_many_messages() {
        let verdicts = Verdicts {
            accepted: (0..5000).map(|i| (i * 3, 2)).collect(),
            refused: (0..100).map(|i| (i * 3 + 2, Refusal::Hash)).collect(),
        };
        let mut bytes = Vec::new();
        verdicts.write(&mut bytes).unwrap();
        Report::Synced(9).write(&mut bytes).unwrap();
        let mut rest = bytes.as_slice();
        let mut back = Verdicts::default();
        loop {
            let part = match Report::read(&mut rest).unwrap() {
                Report::Verdicts(part) => part,
                Report::Synced(number) => break assert_eq!((number, rest.len()), (9, 0)),
            };
            back.accepted.extend(part.accepted);
            back.refused.extend(part.refused);
        }
        assert_eq!(back, verdicts);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(kind in 1_u16..5, body in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut bytes = Vec::new();
            bytes.extend(MAGIC.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(VERSION.to_le_bytes());
            bytes.extend((body.len() as u32).to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(&body);
            let _ = Hello::read(&mut bytes.as_slice());
            let _ = Answer::read(&mut bytes.as_slice());
            let _ = Report::read(&mut bytes.as_slice());
        }
    }
}
