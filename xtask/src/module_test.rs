//! The kernel module in real kernels: Debian's, under plain QEMU, with a test program in place of everything else; and in the lab's guests,
//! with the same program beside the database.

pub mod machine;
mod package;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::build::{Suite, module};
use crate::cpio::Archive;
use crate::deployment::MODULE;
use crate::lab::{Kernel, Lab};
use crate::step::{run, step};

/// The target that the test program is built for; naming it keeps `+crt-static` away from build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where the program lies in a guest of the lab.
const IN_GUEST: &str = "/root/boot-test";

/// How long it may take there.
const GUEST_LIMIT: Duration = Duration::from_secs(900);

/// For each of the three kernels: links the module as DKMS does, looks at what is in the file, boots the kernel with the test program,
/// and prints a line a case. One after the other, all of them even when one fails.
///
/// # Errors
/// When a case fails, or a machine does not come to the end of the test; after all have run.
pub fn boot_test() -> Result<()> {
    let program = step("boot test's program", build_program)?;
    let mut failed = Vec::new();
    for suite in Suite::ALL.map(Suite::name) {
        if let Err(error) = step(&format!("kernel of Debian {suite}"), || on(suite, &program)) {
            eprintln!("FAILED on Debian {suite}: {error:?}");
            failed.push(suite);
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("failed on Debian's kernels of {}", failed.join(", ")) }
}

fn on(suite: &'static str, program: &Path) -> Result<()> {
    let kernel = Kernel::of(suite)?;
    let module = module::link(&kernel)?;
    package::check(&kernel, &module)?;
    let lines = boot(&kernel, &module, program, "")?;
    judge("boot test", &lines)
}

/// What a machine's console says of the test in it, by its last line: `boot test: 19 passed, 0 failed`.
///
/// # Errors
/// When a case failed, or the machine ended before the test did.
pub fn judge(test: &str, console: &[String]) -> Result<()> {
    match console.iter().rev().find_map(|line| parse_summary(test, line)) {
        Some((passed, 0)) if passed > 0 => Ok(()),
        Some((passed, failed)) => bail!("{failed} of {} cases failed", passed + failed),
        None => bail!("the machine ended before the test did; its console is above"),
    }
}

/// Runs the cases in the guest of a lab, in which the module lies and is not loaded.
///
/// # Errors
/// When a case fails, or the program does not come to the end of the test.
pub fn in_guest(lab: &Lab) -> Result<()> {
    judge("boot test", &run_in_guest(lab, "")?)
}

/// Lets the program measure in the guest of a lab; what it printed.
///
/// # Errors
/// When it does not come to its end.
pub fn measure_in_guest(lab: &Lab) -> Result<Vec<String>> {
    run_in_guest(lab, "bench")
}

fn run_in_guest(lab: &Lab, words: &str) -> Result<Vec<String>> {
    let program = step("boot test's program", build_program)?;
    let work = tempfile::tempdir().context("cannot make a temporary directory")?;
    let lean = stripped(&program, work.path())?;
    let guest = lab.guest();
    guest.push(&lean, IN_GUEST, 0o755)?;
    let output = guest.run(&format!("{IN_GUEST} {words} guest {MODULE}"), GUEST_LIMIT)?;
    let lines: Vec<String> = [output.stdout, output.stderr].concat().lines().map(str::to_owned).collect();
    lines.iter().for_each(|line| eprintln!("  {line}"));
    Ok(lines)
}

fn stripped(program: &Path, to: &Path) -> Result<PathBuf> {
    let lean = to.join("init");
    run(Command::new("strip").arg("-o").arg(&lean).arg(program))?;
    Ok(lean)
}

/// Boots a suite's kernel, lets the program there measure, and returns the lines of the console.
///
/// # Errors
/// When the machine cannot be made, or does not end.
pub fn measure(suite: &'static str) -> Result<Vec<String>> {
    let program = step("boot test's program", build_program)?;
    let kernel = Kernel::of(suite)?;
    boot(&kernel, &module::link(&kernel)?, &program, "bench")
}

/// Boots a kernel with the program and the module, and returns the lines of its console, which are printed too.
fn boot(kernel: &Kernel, module: &Path, program: &Path, words: &str) -> Result<Vec<String>> {
    let image = kernel.image()?;
    let work = tempfile::tempdir().context("cannot make a temporary directory")?;
    let initrd = initramfs(work.path(), program, module)?;
    step(&format!("poolskip.ko on Linux {}", kernel.release), || {
        machine::run(&image, &initrd, words, &[], |line| eprintln!("  {line}"))
    })
}

/// The test program, linked statically: nothing else is in the machine.
fn build_program() -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no workspace")?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    let target = target.join("boot-test");
    run(Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(workspace)
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            "kernel-module",
            "--example",
            "boot_test",
            "--target",
            TARGET,
        ])
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .env("CARGO_TARGET_DIR", &target))?;
    Ok(target.join(TARGET).join("release/examples/boot_test"))
}

fn initramfs(work: &Path, program: &Path, module: &Path) -> Result<PathBuf> {
    let lean = stripped(program, work)?;
    let mut archive = Archive::default();
    // The kernel opens it for the first program's output before that program runs.
    archive.directory("dev");
    archive.device("dev/console", 5, 1);
    archive.file("poolskip.ko", 0o644, &fs::read(module)?);
    archive.file("init", 0o755, &fs::read(&lean)?);
    let initrd = work.join("initrd.img");
    fs::write(&initrd, archive.finish())?;
    Ok(initrd)
}

fn parse_summary(test: &str, line: &str) -> Option<(u32, u32)> {
    let rest = line.strip_prefix(test)?.strip_prefix(": ")?;
    let (passed, failed) = rest.split_once(" passed, ")?;
    Some((passed.parse().ok()?, failed.strip_suffix(" failed")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_summary_counts() {
        assert_eq!(parse_summary("boot test", "boot test: 19 passed, 0 failed"), Some((19, 0)));
        assert_eq!(parse_summary("boot test", "boot test: cannot begin: no module"), None);
        assert_eq!(parse_summary("boot test", "boot test: 19 passed, 0 fai"), None);
    }
}
