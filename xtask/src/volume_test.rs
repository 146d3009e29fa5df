//! The storage map on volumes of the device mapper: in Debian's kernel under plain QEMU, since not every machine's own kernel has one.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::deployment::{cargo, target_directory};
use crate::lab::{Flavour, Kernel};
use crate::module_test::{judge, machine};
use crate::partition::partition;
use crate::step::{run as run_program, step};

/// The program (`tests/src/bin`).
const PROGRAM: &str = "volume-test";
/// Programs of this machine that it starts, and where it finds them.
const TOOLS: [(&str, &str); 3] =
    [("dmsetup", "sbin/dmsetup"), ("mke2fs", "sbin/mke2fs"), ("resize2fs", "sbin/resize2fs")];
/// The loader that all of them name.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
/// Bytes in each disk; it is sparse.
const DISK_BYTES: u64 = 128 << 20;
/// Where the first disk's partition begins: at an odd multiple of 4 KiB, so that an offset that is forgotten is noticed.
const PARTITION_OFFSET: u64 = 4104 * 512;

/// Boots the lab's kernel with the test program and two disks, and prints a line a case.
///
/// # Errors
/// When a case fails, or the machine does not come to the end of the test.
pub fn run() -> Result<()> {
    let program = step("volume test's program", build_program)?;
    let kernel = Kernel::of(Flavour::default().suite())?;
    let (image, modules) = (kernel.image()?, kernel.modules()?);
    let work = tempfile::tempdir().context("cannot make a temporary directory")?;
    let disks = [work.path().join("one.img"), work.path().join("two.img")];
    for disk in &disks {
        File::create(disk)?.set_len(DISK_BYTES)?;
    }
    partition(&disks[0], PARTITION_OFFSET, "8e")?;
    let initrd = work.path().join("initrd.img");
    fs::write(&initrd, initramfs(work.path(), &program, &modules)?)?;
    let lines = step(&format!("volumes on Linux {}", kernel.release), || {
        machine::run(&image, &initrd, "", &disks, |line| eprintln!("  {line}"))
    })?;
    judge("volume test", &lines)
}

/// Built as the tests are, so that most of it is there already.
fn build_program() -> Result<PathBuf> {
    let bin = format!("--bin={PROGRAM}");
    run_program(cargo().args(["build", "--quiet", "--locked", "--package=tests", &bin]))?;
    Ok(target_directory()?.join("debug").join(PROGRAM))
}

fn initramfs(work: &Path, program: &Path, modules: &Path) -> Result<Vec<u8>> {
    let lean = work.join("init");
    run_program(Command::new("strip").arg("-o").arg(&lean).arg(program))?;
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "run", "etc", "modules", "sbin", "lib", "lib64"] {
        archive.directory(directory);
    }
    // The kernel opens it for the first program's output before that program runs.
    archive.device("dev/console", 5, 1);
    let mut programs = vec![(lean, "init".to_owned())];
    for (tool, place) in TOOLS {
        programs.push((find(tool)?, place.to_owned()));
    }
    let mut libraries: Vec<PathBuf> = Vec::new();
    for (path, place) in &programs {
        archive.file(place, 0o755, &fs::read(path)?);
        libraries.extend(libraries_of(path)?);
    }
    libraries.sort();
    libraries.dedup();
    archive.file(LOADER.trim_start_matches('/'), 0o755, &fs::read(LOADER)?);
    for library in libraries {
        let name = library.file_name().context("a library without a name")?.to_string_lossy();
        archive.file(&format!("lib/{name}"), 0o755, &fs::read(&library)?);
    }
    for entry in fs::read_dir(modules)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        archive.file(&format!("modules/{name}"), 0o644, &fs::read(entry.path())?);
    }
    Ok(archive.finish())
}

/// A program of this machine, wherever administrators' programs are.
fn find(program: &str) -> Result<PathBuf> {
    let places = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(|dir| Path::new(dir).join(program));
    let found = places.into_iter().find(|path| path.exists());
    found.with_context(|| format!("there is no {program}: `cargo xtask setup` installs it"))
}

/// The libraries that a program is loaded with, as the loader itself lists them: `NAME => PATH (ADDRESS)`.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let words = run_program(Command::new(LOADER).arg("--list").arg(program))?;
    let paths = String::from_utf8_lossy(&words)
        .lines()
        .filter_map(|line| Some(PathBuf::from(line.split_once("=> ")?.1.split(" (").next()?)))
        .collect();
    Ok(paths)
}
