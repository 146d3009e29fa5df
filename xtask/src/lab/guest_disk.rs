//! The guest's disk, which both hosts see: one partition with the root and the data directory of a MySQL server that sysbench has filled.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::GuestSize;
use super::dom0::{finish_root, install};
use crate::apt::{Area, unpack};
use crate::cache::{self, Key};
use crate::mysql;
use crate::partition::partition;
use crate::step::{run, step};

/// Where its partition begins.
pub(super) const PARTITION_OFFSET: u64 = 1 << 20;

/// sysbench's tables.
pub(super) const TABLES: u32 = 4;

/// What the guest needs beside the server.
const EXTRA: &str = "socat";

/// Files of ours: path, mode, content.
const FILES: &[(&str, u32, &str)] = &[
    ("lab/init", 0o755, include_str!("files/guest-init")),
    ("lab/prepare-data", 0o755, include_str!("files/prepare-data")),
    ("etc/mysql/my.cnf", 0o644, include_str!("files/my.cnf")),
    ("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/bash\n"),
    ("etc/group", 0o644, "root:x:0:\n"),
];

/// The disk's image, raw, made if the cache has none. It is to be copied, never written.
///
/// # Errors
/// When the mirror cannot be reached, this is not run by root, or the server does not take the data.
pub fn get(size: GuestSize) -> Result<PathBuf> {
    let (disk_bytes, rows) = (size.disk_bytes(), size.rows());
    let files = FILES.iter().map(|&(path, mode, content)| (path, mode, size.configuration(content)));
    let files: Vec<_> = files.collect();
    let server = mysql::root()?;
    let area = Area::open("sid")?;
    // Only what the server's root does not have already, so that nothing in it changes.
    let there =
        fs::read_to_string(server.join("packages.txt")).context("the MySQL root has no packages.txt")?;
    let mut extra = area.resolve(&[EXTRA])?;
    extra.retain(|package| !there.lines().any(|line| line.split(' ').next() == Some(&package.name)));
    let mut key = Key::new("lab-disk-2")
        .with(server.file_name().unwrap_or_default().as_encoded_bytes())
        .with(format!("{disk_bytes} {PARTITION_OFFSET} {TABLES} {rows}").as_bytes())
        .with(include_bytes!("files/fill-disk"));
    for package in &extra {
        key = key.with(package.to_string().as_bytes());
    }
    for (path, _, content) in &files {
        key = key.with(path.as_bytes()).with(content.as_bytes());
    }
    let dir = cache::get_or_make("lab-disk", key, |dir| {
        let root = dir.join("root");
        run(Command::new("cp").arg("-a").arg(&server).arg(&root))?;
        unpack(&area.download(&extra)?, &root)?;
        drop(area);
        for (path, mode, content) in &files {
            install(&root, path, *mode, content)?;
        }
        finish_root(&root)?;
        fs::create_dir_all(root.join("run/mysqld"))?;
        step("loading sysbench's tables into a MySQL data directory", || {
            run(contained()
                .args(["chroot"])
                .arg(&root)
                .arg("/lab/prepare-data")
                .args([TABLES.to_string(), rows.to_string()]))
        })?;
        for left in ["run/mysqld", "lab/prepare-data"] {
            let left = root.join(left);
            if left.is_dir() { fs::remove_dir_all(left)? } else { fs::remove_file(left)? }
        }
        let (image, fill) = (dir.join("shared.raw"), include_str!("files/fill-disk"));
        step("writing the guest's disk", || write_disk(&root, &image, disk_bytes, fill))?;
        fs::remove_dir_all(&root)?;
        Ok(())
    })?;
    Ok(dir.join("shared.raw"))
}

/// The start of a command line whose program, with all that it starts and mounts, is gone when it ends or this process does.
pub(super) fn contained() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL"]);
    command
}

/// Writes a whole disk with one partition, an ext4 file system that has all of `root`; `fill` is the script that copies it there.
///
/// # Errors
/// When a tool fails.
pub(super) fn write_disk(root: &Path, image: &Path, disk_bytes: u64, fill: &str) -> Result<()> {
    let file = File::create(image).with_context(|| format!("cannot write {}", image.display()))?;
    file.set_len(disk_bytes)?;
    drop(file);
    partition(image, PARTITION_OFFSET, "83")?;
    let blocks_kib = (disk_bytes - PARTITION_OFFSET) >> 10;
    run(Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-L", "db1"])
        .args(["-E", &format!("offset={PARTITION_OFFSET},lazy_itable_init=0,lazy_journal_init=0")])
        .arg(image)
        .arg(format!("{blocks_kib}k")))?;
    let script = image.with_file_name("fill-disk");
    fs::write(&script, fill)?;
    run(contained().arg("bash").arg(&script).arg(image).arg(PARTITION_OFFSET.to_string()).arg(root))?;
    fs::remove_file(&script)?;
    Ok(())
}
