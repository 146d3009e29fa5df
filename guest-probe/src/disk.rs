//! The whole disk under a file system, and where on it the file system's device begins.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use enlightenment::Vdev;
use serde::Serialize;
use thiserror::Error;

/// Bytes in the sectors that sysfs counts in.
const SECTOR_BYTES: u64 = 512;

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

/// A place where a file system begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskPlace {
    /// The disk's name in the guest, as `xvda`.
    pub name: String,
    /// The disk's device number.
    pub device: DeviceNumber,
    /// Where the file system's device begins on it, in bytes.
    pub start: u64,
    /// Bytes in the disk.
    pub bytes: u64,
    /// Its number as a Xen virtual block device; `None` for any other disk.
    #[serde(skip)]
    pub vdev: Option<Vdev>,
}

/// Why a device leads to no disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The file system has no block device of its own: tmpfs, overlayfs, btrfs, NFS.
    #[error("{}:{} is no block device: the file system lies on none, or on several", .0.major, .0.minor)]
    NotBlock(DeviceNumber),
    /// It is made of others by the device mapper, md, …
    #[error("{0} is made of other devices (LVM, md, …), which guest-probe does not take apart yet")]
    Stacked(String),
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

/// Disks by the devices on them, each looked up once.
#[derive(Default)]
pub struct Disks {
    found: HashMap<DeviceNumber, Option<DiskPlace>>,
}

impl Disks {
    /// The place of a device; `None` when it leads to no disk, and the reason is logged once.
    pub fn get(&mut self, device: DeviceNumber) -> Option<&DiskPlace> {
        let place = self.found.entry(device).or_insert_with(|| match find(Path::new("/sys"), device) {
            Ok(place) => Some(place),
            Err(error) => {
                tracing::warn!(%error, "pages of files there are not listed");
                None
            }
        });
        place.as_ref()
    }
}

/// Finds the disk of a device in a sysfs.
///
/// # Errors
/// [`DiskError`].
pub fn find(sysfs: &Path, device: DeviceNumber) -> Result<DiskPlace, DiskError> {
    let link = sysfs.join(format!("dev/block/{}:{}", device.major, device.minor));
    let own = fs::canonicalize(&link).map_err(|_| DiskError::NotBlock(device))?;
    let is_partition = own.join("partition").exists();
    let start = if is_partition { number(&own.join("start"))? } else { 0 };
    let disk = if is_partition { own.parent().unwrap_or(&own).to_path_buf() } else { own };
    let name = disk.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let slaves = disk.join("slaves");
    if fs::read_dir(&slaves).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(DiskError::Stacked(name));
    }
    let numbers = read(&disk.join("dev"))?;
    let device = parse_device(&numbers).ok_or(DiskError::Number { path: disk.join("dev"), text: numbers })?;
    let vdev = fs::read_link(disk.join("device")).ok().and_then(|link| parse_vdev(&link));
    let overflow = |sectors: u64, path: PathBuf| {
        sectors.checked_mul(SECTOR_BYTES).ok_or(DiskError::Number { path, text: sectors.to_string() })
    };
    let bytes = overflow(number(&disk.join("size"))?, disk.join("size"))?;
    Ok(DiskPlace { start: overflow(start, disk.join("start"))?, name, device, bytes, vdev })
}

fn read(path: &Path) -> Result<String, DiskError> {
    let text = fs::read_to_string(path);
    text.map_err(|source| DiskError::Sysfs { path: path.to_path_buf(), source })
}

fn number(path: &Path) -> Result<u64, DiskError> {
    let text = read(path)?;
    text.trim().parse().map_err(|_| DiskError::Number { path: path.to_path_buf(), text })
}

fn parse_device(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
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
        let place = find(sysfs.path(), DeviceNumber { major: 202, minor: 1 }).unwrap();
        assert_eq!(place.name, "xvda");
        assert_eq!((place.start, place.bytes), (1 << 20, 64 << 20));
        assert_eq!(place.vdev, Some(Vdev(51712)));
        assert_eq!(place.device, DeviceNumber { major: 202, minor: 0 });
        assert_eq!(find(sysfs.path(), DeviceNumber { major: 202, minor: 0 }).unwrap().start, 0);
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let sysfs = sysfs();
        let error = find(sysfs.path(), DeviceNumber { major: 0, minor: 40 }).unwrap_err();
        assert!(matches!(error, DiskError::NotBlock(_)));
        let disk = sysfs.path().join("devices/vbd-51712/block/xvda");
        fs::create_dir_all(disk.join("slaves/sda")).unwrap();
        let error = find(sysfs.path(), DeviceNumber { major: 202, minor: 1 }).unwrap_err();
        assert!(matches!(error, DiskError::Stacked(name) if name == "xvda"));
    }

    #[test]
    fn only_xen_s_disks_have_a_vdev() {
        assert_eq!(parse_vdev(Path::new("../../../vbd-768")), Some(Vdev(768)));
        assert_eq!(parse_vdev(Path::new("../../../virtio0")), None);
        assert_eq!(parse_vdev(Path::new("vbd-")), None);
    }
}
