//! The device mapper's tables: what a volume of LVM is made of.
//!
//! A table is asked for with the `DM_TABLE_STATUS` ioctl (linux/dm-ioctl.h), which needs CAP_SYS_ADMIN. A `linear` target is a
//! piece of another device as it is; every other kind changes bytes, moves them, or has them in several places.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use thiserror::Error;

use crate::bytes::{u32_le, u64_le};
use crate::disk::DeviceNumber;
use crate::left_out::LeftOut;

/// Where tables are asked for.
const CONTROL: &str = "/dev/mapper/control";
/// `_IOWR(0xfd, 12, struct dm_ioctl)`.
const DM_TABLE_STATUS: libc::c_ulong = 0xC138_FD0C;
/// Version 4.0.0 of the interface, which every kernel since 2.6 accepts.
const VERSION: [u32; 3] = [4, 0, 0];
/// `DM_STATUS_TABLE_FLAG`: the table, not how its targets do.
const TABLE_FLAG: u32 = 1 << 4;
/// `DM_BUFFER_FULL_FLAG`: the answer did not fit.
const BUFFER_FULL_FLAG: u32 = 1 << 8;
/// `struct dm_ioctl`: three words of version, then these.
const HEADER_BYTES: usize = 312;
const AT_DATA_SIZE: usize = 12;
const AT_DATA_START: usize = 16;
const AT_TARGET_COUNT: usize = 20;
const AT_FLAGS: usize = 28;
const AT_DEVICE: usize = 40;
/// `struct dm_target_spec`: start, length, status, next, type; the parameters follow it.
const TARGET_BYTES: usize = 40;
const TYPE_BYTES: usize = 16;
/// The room for an answer begins with this and is doubled up to [`LARGEST_ANSWER`].
const FIRST_ANSWER: usize = 16 << 10;
/// Room for about 60,000 targets: volumes have tens.
const LARGEST_ANSWER: usize = 4 << 20;

/// A piece of a mapped device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// First sector of 512 bytes on the mapped device.
    pub start: u64,
    /// Sectors.
    pub sectors: u64,
    /// What it is made of.
    pub kind: TargetKind,
}

/// What a piece of a mapped device is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetKind {
    /// A piece of another device, as it is.
    Linear {
        /// The other device.
        device: DeviceNumber,
        /// First sector there.
        start: u64,
    },
    /// Anything else, by the name of the target.
    Other(String),
}

impl TargetKind {
    /// Why pages on such a piece are left out; `None` for a linear one.
    pub fn unfit(&self) -> Option<LeftOut> {
        let Self::Other(name) = self else { return None };
        Some(match name.as_str() {
            "crypt" => LeftOut::DmCrypt,
            "thin" | "thin-pool" => LeftOut::DmThin,
            "striped" | "raid" | "raid45" | "mirror" => LeftOut::DmStriped,
            "snapshot" | "snapshot-origin" | "snapshot-merge" => LeftOut::DmSnapshot,
            "multipath" => LeftOut::DmMultipath,
            _ => LeftOut::DmOther,
        })
    }
}

/// Why a table cannot be had.
#[derive(Debug, Error)]
pub enum DmError {
    /// The device mapper cannot be asked.
    #[error("cannot open {CONTROL}: {0} (reading a volume's table needs root)")]
    Control(io::Error),
    /// It refuses.
    #[error("the device mapper does not tell the table of {}:{}: {source}", device.major, device.minor)]
    Ioctl {
        /// The volume.
        device: DeviceNumber,
        /// Why.
        source: io::Error,
    },
    /// Its answer cannot be right.
    #[error("the device mapper's answer about {}:{} is cut short or contradicts itself", device.major, device.minor)]
    Answer {
        /// The volume.
        device: DeviceNumber,
    },
    /// The table is larger than any volume's.
    #[error("the table of {}:{} has more than {LARGEST_ANSWER} bytes", device.major, device.minor)]
    TooLarge {
        /// The volume.
        device: DeviceNumber,
    },
}

/// Where tables come from: the kernel, or a test.
pub trait Tables {
    /// The table of a mapped device that is in force.
    ///
    /// # Errors
    /// [`DmError`].
    fn table(&self, device: DeviceNumber) -> Result<Vec<Target>, DmError>;
}

/// The running kernel's tables.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelTables;

impl Tables for KernelTables {
    fn table(&self, device: DeviceNumber) -> Result<Vec<Target>, DmError> {
        let control =
            File::options().read(true).write(true).open(Path::new(CONTROL)).map_err(DmError::Control)?;
        let mut room = FIRST_ANSWER;
        while room <= LARGEST_ANSWER {
            let mut words = question(device, room);
            // SAFETY: the buffer is as long as the size that it names, aligned for u64, and lives through the call.
            let result = unsafe { libc::ioctl(control.as_raw_fd(), DM_TABLE_STATUS, words.as_mut_ptr()) };
            if result < 0 {
                return Err(DmError::Ioctl { device, source: io::Error::last_os_error() });
            }
            let answer: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
            match parse_answer(&answer).ok_or(DmError::Answer { device })? {
                Answer::Table(targets) => return Ok(targets),
                Answer::Full => room *= 2,
            }
        }
        Err(DmError::TooLarge { device })
    }
}

/// A `struct dm_ioctl` that asks for a device's table and has `room` bytes in all.
fn question(device: DeviceNumber, room: usize) -> Vec<u64> {
    let mut bytes = vec![0; room.next_multiple_of(8)];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    for (index, number) in VERSION.iter().enumerate() {
        put(index * 4, &number.to_le_bytes());
    }
    put(AT_DATA_SIZE, &(room as u32).to_le_bytes());
    put(AT_DATA_START, &(HEADER_BYTES as u32).to_le_bytes());
    put(AT_FLAGS, &TABLE_FLAG.to_le_bytes());
    put(AT_DEVICE, &encode_device(device).to_le_bytes());
    bytes.chunks_exact(8).map(|word| u64_le(word, 0).unwrap_or_default()).collect()
}

/// A device number as the kernel's `huge_decode_dev` reads it: 8 bits of minor, the major, the rest of the minor.
fn encode_device(device: DeviceNumber) -> u64 {
    let (major, minor) = (u64::from(device.major), u64::from(device.minor));
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// What the kernel answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// The table.
    Table(Vec<Target>),
    /// It did not fit.
    Full,
}

/// Parses the kernel's answer; `None` when it cannot be right. Targets come in order, without gaps or overlaps: the kernel
/// refuses other tables.
pub fn parse_answer(answer: &[u8]) -> Option<Answer> {
    if u32_le(answer, AT_FLAGS)? & BUFFER_FULL_FLAG != 0 {
        return Some(Answer::Full);
    }
    let end = (u32_le(answer, AT_DATA_SIZE)? as usize).min(answer.len());
    let data = answer.get(u32_le(answer, AT_DATA_START)? as usize..end)?;
    let count = u32_le(answer, AT_TARGET_COUNT)? as usize;
    let mut targets = Vec::new();
    let (mut at, mut next_sector) = (0_usize, 0_u64);
    for _ in 0..count {
        let spec = data.get(at..at.checked_add(TARGET_BYTES)?)?;
        let (start, sectors) = (u64_le(spec, 0)?, u64_le(spec, 8)?);
        let name = text(&spec[TARGET_BYTES - TYPE_BYTES..])?;
        let parameters = text(data.get(at + TARGET_BYTES..)?)?;
        if start != next_sector || sectors == 0 {
            return None;
        }
        next_sector = start.checked_add(sectors)?;
        let kind =
            if name == "linear" { parse_linear(parameters)? } else { TargetKind::Other(name.to_owned()) };
        targets.push(Target { start, sectors, kind });
        // From the first target on, not from this one as in a question.
        let next = u32_le(spec, 20)? as usize;
        if next < at + TARGET_BYTES {
            return if targets.len() == count { Some(Answer::Table(targets)) } else { None };
        }
        at = next;
    }
    Some(Answer::Table(targets))
}

/// Bytes up to a NUL, which must be there.
fn text(bytes: &[u8]) -> Option<&str> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    std::str::from_utf8(&bytes[..end]).ok()
}

/// `MAJOR:MINOR SECTOR`
fn parse_linear(parameters: &str) -> Option<TargetKind> {
    let (device, start) = parameters.trim().split_once(' ')?;
    Some(TargetKind::Linear { device: device.parse().ok()?, start: start.trim().parse().ok()? })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// Tables by device; a device without one is refused.
    #[derive(Default)]
    pub struct FakeTables(pub HashMap<DeviceNumber, Vec<Target>>);

    impl Tables for FakeTables {
        fn table(&self, device: DeviceNumber) -> Result<Vec<Target>, DmError> {
            self.0.get(&device).cloned().ok_or(DmError::Control(io::ErrorKind::PermissionDenied.into()))
        }
    }

    /// An answer as `retrieve_status` of drivers/md/dm-ioctl.c lays it out.
    fn answer(targets: &[(u64, u64, &str, &str)]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        for (index, (start, sectors, name, parameters)) in targets.iter().enumerate() {
            let at = bytes.len();
            bytes.extend(start.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(0_i32.to_le_bytes());
            bytes.extend([0; 4]);
            let mut kind = [0; TYPE_BYTES];
            kind[..name.len()].copy_from_slice(name.as_bytes());
            bytes.extend(kind);
            bytes.extend(parameters.as_bytes());
            bytes.push(0);
            while !bytes.len().is_multiple_of(8) {
                bytes.push(0);
            }
            let next = (bytes.len() - HEADER_BYTES) as u32;
            assert!(index < 100);
            bytes[at + 20..at + 24].copy_from_slice(&next.to_le_bytes());
        }
        let size = bytes.len() as u32;
        bytes[AT_DATA_SIZE..AT_DATA_SIZE + 4].copy_from_slice(&size.to_le_bytes());
        bytes[AT_DATA_START..AT_DATA_START + 4].copy_from_slice(&(HEADER_BYTES as u32).to_le_bytes());
        bytes[AT_TARGET_COUNT..AT_TARGET_COUNT + 4].copy_from_slice(&(targets.len() as u32).to_le_bytes());
        bytes
    }

    fn device(major: u32, minor: u32) -> DeviceNumber {
        DeviceNumber { major, minor }
    }

    #[test]
    fn a_volume_of_several_segments_is_read() {
        let bytes = answer(&[
            (0, 8192, "linear", "202:2 2048"),
            (8192, 4096, "linear", "202:17 34816"),
            (12288, 8, "crypt", "x"),
        ]);
        let Some(Answer::Table(targets)) = parse_answer(&bytes) else { panic!("{bytes:?}") };
        let linear = |major, minor, start| TargetKind::Linear { device: device(major, minor), start };
        assert_eq!(targets[0], Target { start: 0, sectors: 8192, kind: linear(202, 2, 2048) });
        assert_eq!(targets[1], Target { start: 8192, sectors: 4096, kind: linear(202, 17, 34816) });
        assert_eq!(targets[2].kind.unfit(), Some(LeftOut::DmCrypt));
        assert_eq!(targets.len(), 3);
    }

    /// What Linux 6.1 answered (under QEMU) about a volume of three pieces on two RAM disks: the first 48 bytes, before the volume's
    /// name, and the targets. With this code a volume like it was mapped there, and 2,187 pages that were written through it were
    /// found on the RAM disks.
    const RECORDED_HEADER: &str =
        "040000002f00000000000000c901000038010000030000000000000030000000000000000000000000fe000000000000";
    const RECORDED_TARGETS: &str = "0000000000000000409c00000000000000000000380000006c696e65617200000000000000000000313a312032303536 \
             0000000000000000409c000000000000307500000000000000000000680000006c696e65617200000000000000000000 \
             313a3020380000007011010000000000e80300000000000000000000980000006572726f720000000000000000000000 \
             00";

    fn from_hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> =
            text.chars().filter_map(|digit| digit.to_digit(16)).map(|digit| digit as u8).collect();
        digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    #[test]
    fn the_kernel_s_own_answer_is_read() {
        let mut bytes = from_hex(RECORDED_HEADER);
        bytes.extend(b"vol");
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend(from_hex(RECORDED_TARGETS));
        assert_eq!(u64_le(&bytes, AT_DEVICE), Some(encode_device(device(254, 0))));
        let linear = |minor, start| TargetKind::Linear { device: device(1, minor), start };
        let expected = vec![
            Target { start: 0, sectors: 40_000, kind: linear(1, 2056) },
            Target { start: 40_000, sectors: 30_000, kind: linear(0, 8) },
            Target { start: 70_000, sectors: 1_000, kind: TargetKind::Other("error".to_owned()) },
        ];
        assert_eq!(parse_answer(&bytes), Some(Answer::Table(expected)));
    }

    #[test]
    fn what_is_not_linear_has_a_reason_of_its_own() {
        for (name, reason) in [
            ("crypt", LeftOut::DmCrypt),
            ("thin", LeftOut::DmThin),
            ("striped", LeftOut::DmStriped),
            ("raid", LeftOut::DmStriped),
            ("snapshot", LeftOut::DmSnapshot),
            ("snapshot-origin", LeftOut::DmSnapshot),
            ("multipath", LeftOut::DmMultipath),
            ("writecache", LeftOut::DmOther),
        ] {
            assert_eq!(TargetKind::Other(name.to_owned()).unfit(), Some(reason), "{name}");
        }
        assert_eq!(TargetKind::Linear { device: device(8, 0), start: 0 }.unfit(), None);
    }

    #[test]
    fn an_answer_that_cannot_be_right_is_refused() {
        let full = answer(&[(0, 8192, "linear", "202:2 2048")]);
        for length in 0..full.len() - 8 {
            assert_eq!(parse_answer(&full[..length]), None, "cut at {length}");
        }
        for wrong in [
            answer(&[(8, 8, "linear", "202:2 0")]),
            answer(&[(0, 0, "linear", "202:2 0")]),
            answer(&[(0, u64::MAX, "linear", "202:2 0"), (u64::MAX, 8, "linear", "202:2 0")]),
            answer(&[(0, 8, "linear", "202:2 0"), (16, 8, "linear", "202:2 0")]),
            answer(&[(0, 8, "linear", "/dev/sda 0")]),
            answer(&[(0, 8, "linear", "202:2")]),
            answer(&[(0, 8, "linear", "202:2 -1")]),
        ] {
            assert_eq!(parse_answer(&wrong), None);
        }
        let mut flagged = full;
        flagged[AT_FLAGS + 1] = 1;
        assert_eq!(parse_answer(&flagged), Some(Answer::Full));
    }

    #[test]
    fn the_unit_lets_tables_be_asked_for() {
        let unit = include_str!("../systemd/guest-probe.service");
        assert!(unit.lines().any(|line| line == format!("DeviceAllow={CONTROL} rw")));
    }

    #[test]
    fn a_question_names_the_device() {
        let words = question(device(253, 0x1_2345), 4096);
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        assert_eq!(u64_le(&bytes, AT_DEVICE), Some(0x1230_fd45));
        assert_eq!((u32_le(&bytes, AT_DATA_SIZE), bytes.len()), (Some(4096), 4096));
    }

    proptest! {
        #[test]
        fn any_answer_is_parsed_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
            count in 0_u32..1000,
        ) {
            let _ = parse_answer(&bytes);
            let mut bytes = bytes;
            bytes.resize(600, 0);
            bytes[AT_FLAGS..AT_FLAGS + 4].fill(0);
            bytes[AT_DATA_SIZE..AT_DATA_SIZE + 4].copy_from_slice(&600_u32.to_le_bytes());
            bytes[AT_DATA_START..AT_DATA_START + 4].copy_from_slice(&312_u32.to_le_bytes());
            bytes[AT_TARGET_COUNT..AT_TARGET_COUNT + 4].copy_from_slice(&count.to_le_bytes());
            let _ = parse_answer(&bytes);
        }
    }
}
