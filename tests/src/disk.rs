//! A disk image on a loop device, with one partition that begins at an odd place.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Bytes in the image; it is sparse.
pub const DISK_BYTES: u64 = 3 << 30;
/// Where the partition begins, in sectors of 512 bytes: at an odd multiple of 4 KiB, so that an offset that is forgotten is noticed.
pub const PARTITION_START: u64 = 4104;
/// Alignment of direct I/O.
const DIRECT_BYTES: usize = 4096;

/// A loop device with a partition.
pub struct Disk {
    /// The whole disk.
    pub device: PathBuf,
    /// The partition.
    pub partition: PathBuf,
    /// Keeps the device while `losetup --detach` is already said: with the last user it goes by itself.
    file: File,
}

impl Disk {
    /// Attaches an image. The kernel need not know partition tables: the partition is told to it.
    ///
    /// # Errors
    /// When there is no free loop device, or this is not root.
    pub fn attach(image: &Path) -> Result<Self> {
        let device = run(Command::new("losetup").args(["--find", "--show"]).arg(image))?;
        let device = PathBuf::from(device.trim());
        let attached = Self::partition(&device);
        // Said now, so that a test that is killed leaves nothing behind; it takes effect when the last user has gone.
        run(Command::new("losetup").arg("--detach").arg(&device))?;
        attached
    }

    fn partition(device: &Path) -> Result<Self> {
        // A killed test's partition may still be known.
        let _ = Command::new("delpart").arg(device).arg("1").output();
        let sectors = DISK_BYTES / 512 - PARTITION_START;
        run(Command::new("addpart").arg(device).args([
            "1",
            &PARTITION_START.to_string(),
            &sectors.to_string(),
        ]))?;
        let mut name = device.as_os_str().to_owned();
        name.push("p1");
        let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(device)?;
        Ok(Self { device: device.to_path_buf(), partition: PathBuf::from(name), file })
    }

    /// The whole disk's device number.
    ///
    /// # Errors
    /// When it is gone.
    pub fn number(&self) -> Result<(u32, u32)> {
        let number = fs::metadata(&self.device)?.rdev();
        Ok((libc::major(number), libc::minor(number)))
    }

    /// Reads past all caches; offset and length are multiples of 4096.
    ///
    /// # Errors
    /// When the device cannot be read there.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut room = vec![0_u8; length + DIRECT_BYTES];
        let skip = room.as_ptr().align_offset(DIRECT_BYTES);
        let aligned = &mut room[skip..skip + length];
        self.file.read_exact_at(aligned, offset).with_context(|| {
            format!("cannot read {length} bytes at {offset} of {}", self.device.display())
        })?;
        Ok(aligned.to_vec())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Busy while a server that was just killed still has it mounted; then the next user of the device deletes it.
        for _ in 0..50 {
            let deleted = Command::new("delpart").arg(&self.device).arg("1").output();
            if deleted.is_ok_and(|output| output.status.success()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        eprintln!("{} stays: something still uses it", self.partition.display());
    }
}

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// With what it said, when it fails.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
