//! The whole disks under a file system's device, and which byte of them each of its bytes is: partitions, and volumes of the device
//! mapper as far as they are linear (LVM).

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use enlightenment::Vdev;
use serde::Serialize;
use thiserror::Error;

use crate::dm::{DmError, KernelTables, Tables, TargetKind};
use crate::left_out::LeftOut;

/// Bytes in the sectors that sysfs and the device mapper count in.
const SECTOR_BYTES: u64 = 512;
/// Devices on top of each other at most: the kernel allows some more, administrators use two or three.
const DEEPEST: u32 = 8;
/// Pieces of one device at most; a volume of LVM has one for each time that it was extended or moved.
const MOST_SEGMENTS: usize = 65_536;

/// A device, as `st_dev` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct DeviceNumber {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

impl DeviceNumber {
    /// From `st_dev`.
    pub fn from_st_dev(device: u64) -> Self {
        Self { major: libc::major(device), minor: libc::minor(device) }
    }
}

impl FromStr for DeviceNumber {
    type Err = ();

    /// `MAJOR:MINOR`, as sysfs and the device mapper write it.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.trim().split_once(':').ok_or(())?;
        Ok(Self { major: major.parse().map_err(|_| ())?, minor: minor.parse().map_err(|_| ())? })
    }
}

/// A place on a disk where a device, or a piece of one, begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskPlace {
    /// The disk's name in the guest, as `xvda`.
    pub name: String,
    /// The disk's device number.
    pub device: DeviceNumber,
    /// Where the piece begins on it, in bytes.
    pub start: u64,
    /// Bytes in the disk.
    pub bytes: u64,
    /// Its number as a Xen virtual block device; `None` for any other disk.
    #[serde(skip)]
    pub vdev: Option<Vdev>,
}

/// A piece of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    /// Where it begins on the device, in bytes.
    start: u64,
    /// Bytes.
    bytes: u64,
    /// Where it lies, or why that cannot be said.
    to: Result<DiskPlace, LeftOut>,
}

/// Where the bytes of a device lie on whole disks: pieces in order, without gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceMap {
    segments: Vec<Segment>,
}

/// A piece of a range of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DevicePiece<'a> {
    /// The disk.
    pub place: &'a DiskPlace,
    /// Offset on the whole disk, in bytes.
    pub disk_offset: u64,
    /// Offset in the range, in bytes.
    pub into: u64,
    /// Bytes.
    pub length: u64,
}

impl DeviceMap {
    /// Hands out the pieces of whole disks that a range of the device lies in.
    ///
    /// # Errors
    /// [`LeftOut`] with the reason when not all of it can be said; some pieces may have been handed out.
    pub fn pieces<'s>(
        &'s self,
        offset: u64,
        length: u64,
        mut each: impl FnMut(DevicePiece<'s>),
    ) -> Result<(), LeftOut> {
        let end = offset.checked_add(length).ok_or(LeftOut::BeyondDisk)?;
        let mut at = offset;
        let first = self.segments.partition_point(|segment| segment.end() <= offset);
        for segment in self.segments.get(first..).unwrap_or_default() {
            if at >= end || segment.start > at {
                break;
            }
            let place = segment.to.as_ref().map_err(|reason| *reason)?;
            let piece_end = end.min(segment.end());
            let disk_offset = place.start.checked_add(at - segment.start).ok_or(LeftOut::BeyondDisk)?;
            let length = piece_end - at;
            if disk_offset.checked_add(length).is_none_or(|end| end > place.bytes) {
                return Err(LeftOut::BeyondDisk);
            }
            each(DevicePiece { place, disk_offset, into: at - offset, length });
            at = piece_end;
        }
        if at >= end { Ok(()) } else { Err(LeftOut::BeyondDisk) }
    }

    /// Where its first piece lies; `None` where that cannot be said.
    pub fn first(&self) -> Option<&DiskPlace> {
        self.segments.first()?.to.as_ref().ok()
    }

    /// Pieces in all, in words: where each begins on its disk, or why that cannot be said.
    pub fn words(&self) -> impl Iterator<Item = String> + '_ {
        self.segments.iter().map(|Segment { start, bytes, to }| match to {
            Ok(place) => {
                format!("bytes {start}..{} on {} from byte {}", start + bytes, place.name, place.start)
            }
            Err(reason) => format!("bytes {start}..{}: {}", start + bytes, reason.words()),
        })
    }

    /// Appends a piece; one that continues the last becomes part of it.
    fn push(&mut self, segment: Segment) -> Result<(), DiskError> {
        if let Some(last) = self.segments.last_mut() {
            let joins = match (&last.to, &segment.to) {
                (Ok(before), Ok(next)) => {
                    before.device == next.device && before.start.checked_add(last.bytes) == Some(next.start)
                }
                (Err(before), Err(next)) => before == next,
                _ => false,
            };
            if joins {
                last.bytes += segment.bytes;
                return Ok(());
            }
        }
        if self.segments.len() == MOST_SEGMENTS {
            return Err(DiskError::TooManyPieces);
        }
        self.segments.push(segment);
        Ok(())
    }
}

impl Segment {
    /// Behind its last byte on the device.
    const fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes)
    }
}

/// Why a device leads to no disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The file system has no block device of its own: tmpfs, overlayfs, btrfs, NFS.
    #[error("{}:{} is no block device: the file system lies on none, or on several", .0.major, .0.minor)]
    NotBlock(DeviceNumber),
    /// It is made of others by md or another driver.
    #[error("{0} is made of other devices by md or another driver than the device mapper")]
    Stacked(String),
    /// It is a volume whose table cannot be had.
    #[error(transparent)]
    Table(#[from] DmError),
    /// Devices lie on top of each other without end.
    #[error("more than {DEEPEST} devices lie on top of each other")]
    TooDeep,
    /// A volume in too many pieces.
    #[error("a volume lies in more than {MOST_SEGMENTS} pieces")]
    TooManyPieces,
    /// sysfs cannot be read.
    #[error("cannot read {path}: {source}")]
    Sysfs {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// sysfs says something else than expected.
    #[error("{path} says {text:?}, which is no number of sectors")]
    Number {
        /// The file.
        path: PathBuf,
        /// What it says.
        text: String,
    },
}

impl DiskError {
    /// The reason for the pages on such a device.
    pub const fn left_out(&self) -> LeftOut {
        match self {
            Self::NotBlock(_) | Self::Sysfs { .. } | Self::Number { .. } => LeftOut::NoDisk,
            Self::Stacked(_) => LeftOut::Raid,
            Self::Table(_) => LeftOut::DmUnreadable,
            Self::TooDeep | Self::TooManyPieces => LeftOut::DmOther,
        }
    }
}

/// Devices, each looked up once until [`Disks::forget`].
#[derive(Default)]
pub struct Disks {
    found: HashMap<DeviceNumber, Result<DeviceMap, LeftOut>>,
    /// Of these it was said why they lead to no disk.
    told: HashSet<DeviceNumber>,
}

impl Disks {
    /// Where the bytes of a device lie. Why one leads to no disk is logged once.
    ///
    /// # Errors
    /// The reason why nothing on it can be named.
    pub fn map(&mut self, device: DeviceNumber) -> Result<&DeviceMap, LeftOut> {
        let told = &mut self.told;
        let map = self.found.entry(device).or_insert_with(|| {
            find(Path::new("/sys"), &KernelTables, device).map_err(|error| {
                if told.insert(device) {
                    tracing::warn!(%error, "pages of files there are not listed");
                }
                error.left_out()
            })
        });
        map.as_ref().map_err(|reason| *reason)
    }

    /// Where a device begins; `None` when it leads to no disk.
    pub fn get(&mut self, device: DeviceNumber) -> Option<&DiskPlace> {
        self.map(device).ok()?.first()
    }

    /// Forgets what was found: a volume may be extended or moved (`lvextend`, `pvmove`) under a running mysqld.
    pub fn forget(&mut self) {
        self.found.clear();
    }
}

/// Finds the disks of a device in a sysfs.
///
/// # Errors
/// [`DiskError`].
pub fn find(sysfs: &Path, tables: &impl Tables, device: DeviceNumber) -> Result<DeviceMap, DiskError> {
    let mut map = DeviceMap::default();
    let bytes = block_device(sysfs, device)?.1;
    resolve(sysfs, tables, device, 0, bytes, &mut map, DEEPEST)?;
    Ok(map)
}

/// The directory of a block device in sysfs, and its bytes.
fn block_device(sysfs: &Path, device: DeviceNumber) -> Result<(PathBuf, u64), DiskError> {
    let link = sysfs.join(format!("dev/block/{}:{}", device.major, device.minor));
    let own = fs::canonicalize(&link).map_err(|_| DiskError::NotBlock(device))?;
    let bytes = sectors(&own.join("size"))?;
    Ok((own, bytes))
}

/// Appends to `map` where `bytes` bytes of a device lie, from its byte `from` on. What lies behind the device's end is told so.
fn resolve(
    sysfs: &Path,
    tables: &impl Tables,
    device: DeviceNumber,
    from: u64,
    bytes: u64,
    map: &mut DeviceMap,
    deeper: u32,
) -> Result<(), DiskError> {
    let deeper = deeper.checked_sub(1).ok_or(DiskError::TooDeep)?;
    let (own, own_bytes) = block_device(sysfs, device)?;
    let begins = map.segments.last().map_or(0, Segment::end);
    if from.checked_add(bytes).is_none_or(|end| end > own_bytes) {
        return map.push(Segment { start: begins, bytes, to: Err(LeftOut::BeyondDisk) });
    }
    if own.join("partition").exists() {
        let start = sectors(&own.join("start"))?;
        let disk = own.parent().unwrap_or(&own).join("dev");
        let whole = read(&disk)?;
        let whole = whole.parse().map_err(|()| DiskError::Number { path: disk, text: whole })?;
        // A partition of a mapped device (kpartx makes those mapped too) is followed as well.
        return resolve(sysfs, tables, whole, start.saturating_add(from), bytes, map, deeper);
    }
    if own.join("dm").is_dir() {
        return resolve_mapped(sysfs, tables, device, from, bytes, map, deeper);
    }
    let name = own.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let slaves = own.join("slaves");
    if own.join("md").is_dir() || fs::read_dir(&slaves).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(DiskError::Stacked(name));
    }
    let vdev = fs::read_link(own.join("device")).ok().and_then(|link| parse_vdev(&link));
    map.push(Segment {
        start: begins,
        bytes,
        to: Ok(DiskPlace { name, device, start: from, bytes: own_bytes, vdev }),
    })
}

/// [`resolve`] for a device of the device mapper.
fn resolve_mapped(
    sysfs: &Path,
    tables: &impl Tables,
    device: DeviceNumber,
    from: u64,
    bytes: u64,
    map: &mut DeviceMap,
    deeper: u32,
) -> Result<(), DiskError> {
    let mut at = from;
    let end = from.saturating_add(bytes);
    for target in tables.table(device)? {
        let wrong = || DmError::Answer { device };
        let start = target.start.checked_mul(SECTOR_BYTES).ok_or_else(wrong)?;
        let length = target.sectors.checked_mul(SECTOR_BYTES).ok_or_else(wrong)?;
        let target_end = start.checked_add(length).ok_or_else(wrong)?;
        if target_end <= at || at >= end {
            continue;
        }
        let now = end.min(target_end) - at;
        match &target.kind {
            TargetKind::Linear { device: under, start: sector } => {
                let under_from = sector
                    .checked_mul(SECTOR_BYTES)
                    .and_then(|under| under.checked_add(at - start))
                    .ok_or_else(wrong)?;
                resolve(sysfs, tables, *under, under_from, now, map, deeper)?;
            }
            other => {
                let begins = map.segments.last().map_or(0, Segment::end);
                let reason = other.unfit().unwrap_or(LeftOut::DmOther);
                map.push(Segment { start: begins, bytes: now, to: Err(reason) })?;
            }
        }
        at += now;
    }
    if at < end {
        let begins = map.segments.last().map_or(0, Segment::end);
        map.push(Segment { start: begins, bytes: end - at, to: Err(LeftOut::BeyondDisk) })?;
    }
    Ok(())
}

/// A number of sectors, in bytes.
fn sectors(path: &Path) -> Result<u64, DiskError> {
    let sectors = number(path)?;
    let bytes = sectors.checked_mul(SECTOR_BYTES);
    bytes.ok_or_else(|| DiskError::Number { path: path.to_path_buf(), text: sectors.to_string() })
}

fn read(path: &Path) -> Result<String, DiskError> {
    let text = fs::read_to_string(path);
    text.map_err(|source| DiskError::Sysfs { path: path.to_path_buf(), source })
}

fn number(path: &Path) -> Result<u64, DiskError> {
    let text = read(path)?;
    text.trim().parse().map_err(|_| DiskError::Number { path: path.to_path_buf(), text })
}

/// The number in `../../../vbd-51712`, where `/sys/block/xvda/device` leads.
fn parse_vdev(device_link: &Path) -> Option<Vdev> {
    let name = device_link.file_name()?.to_str()?;
    Some(Vdev(name.strip_prefix("vbd-")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::dm::Target;
    use crate::dm::tests::FakeTables;

    const fn number_of(major: u32, minor: u32) -> DeviceNumber {
        DeviceNumber { major, minor }
    }

    fn find_in(
        sysfs: &tempfile::TempDir,
        tables: &FakeTables,
        device: DeviceNumber,
    ) -> Result<DeviceMap, DiskError> {
        find(sysfs.path(), tables, device)
    }

    fn pieces(map: &DeviceMap, offset: u64, length: u64) -> Result<Vec<(String, u64, u64, u64)>, LeftOut> {
        let mut found = Vec::new();
        map.pieces(offset, length, |piece| {
            found.push((piece.place.name.clone(), piece.disk_offset, piece.into, piece.length));
        })?;
        Ok(found)
    }

    /// A sysfs with one Xen disk of 64 MiB and a partition on it at 1 MiB.
    fn sysfs() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("devices/vbd-51712/block/xvda");
        let partition = disk.join("xvda1");
        fs::create_dir_all(&partition).unwrap();
        fs::create_dir_all(dir.path().join("dev/block")).unwrap();
        for (path, text) in [
            (disk.join("dev"), "202:0\n"),
            (disk.join("size"), "131072\n"),
            (partition.join("dev"), "202:1\n"),
            (partition.join("partition"), "1\n"),
            (partition.join("start"), "2048\n"),
            (partition.join("size"), "100000\n"),
        ] {
            fs::write(path, text).unwrap();
        }
        symlink("../../../vbd-51712", disk.join("device")).unwrap();
        symlink("../../devices/vbd-51712/block/xvda", dir.path().join("dev/block/202:0")).unwrap();
        symlink("../../devices/vbd-51712/block/xvda/xvda1", dir.path().join("dev/block/202:1")).unwrap();
        dir
    }

    #[test]
    fn a_partition_leads_to_its_disk() {
        let sysfs = sysfs();
        let map = find_in(&sysfs, &FakeTables::default(), number_of(202, 1)).unwrap();
        let place = map.first().unwrap();
        assert_eq!(place.name, "xvda");
        assert_eq!((place.start, place.bytes), (1 << 20, 64 << 20));
        assert_eq!(place.vdev, Some(Vdev(51712)));
        assert_eq!(place.device, DeviceNumber { major: 202, minor: 0 });
        let whole = find_in(&sysfs, &FakeTables::default(), number_of(202, 0)).unwrap();
        assert_eq!(whole.first().unwrap().start, 0);
        assert_eq!(pieces(&map, 4096, 8192), Ok(vec![("xvda".into(), (1 << 20) + 4096, 0, 8192)]));
        // The partition ends before its disk does.
        assert_eq!(pieces(&map, 100_000 * 512 - 4096, 8192), Err(LeftOut::BeyondDisk));
        assert_eq!(pieces(&map, u64::MAX, 8192), Err(LeftOut::BeyondDisk));
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let sysfs = sysfs();
        let error = find_in(&sysfs, &FakeTables::default(), number_of(0, 40)).unwrap_err();
        assert!(matches!(error, DiskError::NotBlock(_)));
        assert_eq!(error.left_out(), LeftOut::NoDisk);
        let disk = sysfs.path().join("devices/vbd-51712/block/xvda");
        fs::create_dir_all(disk.join("slaves/sda")).unwrap();
        let error = find_in(&sysfs, &FakeTables::default(), number_of(202, 1)).unwrap_err();
        assert_eq!(error.left_out(), LeftOut::Raid);
        assert!(matches!(error, DiskError::Stacked(name) if name == "xvda"));
    }

    /// Adds a mapped device of this many sectors to a sysfs.
    fn add_mapped(sysfs: &tempfile::TempDir, minor: u32, sectors: u64) {
        let own = sysfs.path().join(format!("devices/virtual/block/dm-{minor}"));
        fs::create_dir_all(own.join("dm")).unwrap();
        fs::create_dir_all(own.join("slaves/xvda1")).unwrap();
        fs::write(own.join("size"), format!("{sectors}\n")).unwrap();
        symlink(
            format!("../../devices/virtual/block/dm-{minor}"),
            sysfs.path().join(format!("dev/block/253:{minor}")),
        )
        .unwrap();
    }

    fn linear(start: u64, sectors: u64, device: DeviceNumber, under: u64) -> Target {
        Target { start, sectors, kind: TargetKind::Linear { device, start: under } }
    }

    #[test]
    fn a_volume_s_pieces_lead_to_their_places() {
        let sysfs = sysfs();
        add_mapped(&sysfs, 0, 300);
        add_mapped(&sysfs, 1, 120);
        let partition = number_of(202, 1);
        let tables = FakeTables(
            [
                (
                    number_of(253, 0),
                    vec![
                        linear(0, 100, partition, 5000),
                        linear(100, 100, partition, 9000),
                        Target { start: 200, sectors: 100, kind: TargetKind::Other("crypt".into()) },
                    ],
                ),
                // A volume on a volume, across its seam.
                (number_of(253, 1), vec![linear(0, 120, number_of(253, 0), 40)]),
            ]
            .into(),
        );
        let at = |sector: u64| (2048 + sector) * 512;
        let lower = find_in(&sysfs, &tables, number_of(253, 0)).unwrap();
        let seam =
            vec![("xvda".to_owned(), at(5096), 0, 4 * 512), ("xvda".to_owned(), at(9000), 4 * 512, 4 * 512)];
        assert_eq!(pieces(&lower, 96 * 512, 8 * 512), Ok(seam));
        assert_eq!(pieces(&lower, 196 * 512, 8 * 512), Err(LeftOut::DmCrypt), "half of it is encrypted");
        assert_eq!(lower.words().count(), 3);
        let upper = find_in(&sysfs, &tables, number_of(253, 1)).unwrap();
        let seam =
            vec![("xvda".to_owned(), at(5096), 0, 4 * 512), ("xvda".to_owned(), at(9000), 4 * 512, 4 * 512)];
        assert_eq!(pieces(&upper, 56 * 512, 8 * 512), Ok(seam));
        assert_eq!(pieces(&upper, 119 * 512, 1024), Err(LeftOut::BeyondDisk));
        assert_eq!(upper.first().unwrap().vdev, Some(Vdev(51712)));
    }

    #[test]
    fn a_table_that_lies_leads_nowhere() {
        let sysfs = sysfs();
        for minor in 0..4 {
            add_mapped(&sysfs, minor, 100);
        }
        let loops = |minor| (number_of(253, minor), vec![linear(0, 100, number_of(253, minor), 0)]);
        let tables = FakeTables(
            [
                loops(0),
                (number_of(253, 1), vec![linear(0, 100, number_of(202, 1), 99_950)]),
                (number_of(253, 2), vec![linear(0, 60, number_of(202, 1), 0)]),
            ]
            .into(),
        );
        assert!(matches!(find_in(&sysfs, &tables, number_of(253, 0)), Err(DiskError::TooDeep)));
        let beyond = find_in(&sysfs, &tables, number_of(253, 1)).unwrap();
        assert_eq!(pieces(&beyond, 0, 512), Err(LeftOut::BeyondDisk), "behind the partition's end");
        let short = find_in(&sysfs, &tables, number_of(253, 2)).unwrap();
        assert!(pieces(&short, 59 * 512, 512).is_ok());
        assert_eq!(pieces(&short, 60 * 512, 512), Err(LeftOut::BeyondDisk));
        let none = find_in(&sysfs, &tables, number_of(253, 3)).unwrap_err();
        assert_eq!(none.left_out(), LeftOut::DmUnreadable);
    }

    #[test]
    fn only_xen_s_disks_have_a_vdev() {
        assert_eq!(parse_vdev(Path::new("../../../vbd-768")), Some(Vdev(768)));
        assert_eq!(parse_vdev(Path::new("../../../virtio0")), None);
        assert_eq!(parse_vdev(Path::new("vbd-")), None);
    }
}
