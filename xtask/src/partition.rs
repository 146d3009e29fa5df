//! Partitioning a disk image.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Bytes in a sector, as partition tables count.
const SECTOR: u64 = 512;

/// Gives an image its one partition, from this byte to its end, of an MBR type (`83`: Linux, `8e`: LVM).
///
/// # Errors
/// When the partition would not begin where a sector does, or sfdisk fails.
pub fn partition(image: &Path, begins_at: u64, kind: &str) -> Result<()> {
    if !begins_at.is_multiple_of(SECTOR) {
        bail!("no sector of {} begins at byte {begins_at}", image.display());
    }
    let mut sfdisk = Command::new("sfdisk")
        .args(["--quiet", "--no-reread", "--no-tell-kernel"])
        .arg(image)
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start sfdisk (package fdisk)")?;
    let table = format!("label: dos\nstart={}, type={kind}\n", begins_at / SECTOR);
    sfdisk.stdin.take().context("sfdisk has no input")?.write_all(table.as_bytes())?;
    let status = sfdisk.wait()?;
    if !status.success() {
        bail!("sfdisk cannot partition {}: {status}", image.display());
    }
    Ok(())
}
