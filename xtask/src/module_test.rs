//! The kernel module in a real kernel: Debian's, under plain QEMU, with a test program in place of everything else.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::apt::{Area, Package, unpack};
use crate::build::module;
use crate::cache::{self, Key};
use crate::cpio::Archive;
use crate::lab;
use crate::step::{run, step};

/// The Debian release whose kernel the lab's guest runs.
const SUITE: &str = "bookworm";

/// The target that the test program is built for; naming it keeps `+crt-static` away from build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// How long the machine may take in all; it takes about a minute on two cores without hardware virtualisation.
const LIMIT: Duration = Duration::from_secs(600);

/// Links the module for the lab's guest kernel, boots that kernel with the test program, and prints a line a case.
///
/// # Errors
/// When a case fails, or the machine does not come to the end of the test.
pub fn boot_test() -> Result<()> {
    let release = lab::guest_kernel_release()?;
    let module = module::link(&lab::kernel_headers()?, &release)?;
    let kernel = kernel_image(&release)?;
    let program = step("boot test's program", build_program)?;
    let work = tempfile::tempdir().context("cannot make a temporary directory")?;
    let initrd = initramfs(work.path(), &program, &module)?;
    step(&format!("boot test of poolskip.ko on {release}"), || boot(&kernel, &initrd))
}

/// The kernel that Debian's package has.
fn kernel_image(release: &str) -> Result<PathBuf> {
    let area = Area::open(SUITE)?;
    let name = format!("linux-image-{release}");
    let packages: Vec<Package> =
        area.resolve(&[&name])?.into_iter().filter(|package| package.name == name).collect();
    let package = packages.first().with_context(|| format!("apt does not resolve {name} to itself"))?;
    let key = Key::new("kernel-image-1").with(package.to_string().as_bytes());
    let image = format!("vmlinuz-{release}");
    let made = cache::get_or_make("kernel-image", key, |dir| {
        let root = dir.join("root");
        unpack(&area.download(&packages)?, &root)?;
        fs::rename(root.join("boot").join(&image), dir.join(&image))
            .with_context(|| format!("{name} has no boot/{image}"))?;
        Ok(fs::remove_dir_all(&root)?)
    })?;
    Ok(made.join(image))
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
            "--package",
            "kernel-module",
            "--example",
            "boot_test",
            "--target",
            TARGET,
        ])
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .env("CARGO_TARGET_DIR", &target))?;
    Ok(target.join(TARGET).join("debug/examples/boot_test"))
}

fn initramfs(work: &Path, program: &Path, module: &Path) -> Result<PathBuf> {
    let lean = work.join("init");
    run(Command::new("strip").arg("-o").arg(&lean).arg(program))?;
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

/// A machine that ends with its owner.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn boot(kernel: &Path, initrd: &Path) -> Result<()> {
    // Always emulated: where /dev/kvm is there but virtualisation is not, a machine under KVM hangs without a word.
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-machine", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "320"])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", "console=ttyS0 quiet panic=-1 oops=panic transparent_hugepage=always"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let mut machine = Machine(
        qemu.spawn()
            .context("cannot start qemu-system-x86_64: is it installed? `cargo xtask setup` does it")?,
    );
    let console = machine.0.stdout.take().context("the machine has no console")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        while console.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + LIMIT;
    let mut last = None;
    loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                eprintln!("  {line}");
                if line.starts_with("boot test: ") {
                    last = Some(line);
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("the machine has not ended after {} s; its console is above", LIMIT.as_secs())
            }
        }
    }
    match last.as_deref().and_then(parse_summary) {
        Some((passed, 0)) if passed > 0 => Ok(()),
        Some((passed, failed)) => bail!("{failed} of {} cases failed", passed + failed),
        None => bail!("the machine ended before the test did; its console is above"),
    }
}

/// `boot test: 19 passed, 0 failed`.
fn parse_summary(line: &str) -> Option<(u32, u32)> {
    let (passed, failed) = line.strip_prefix("boot test: ")?.split_once(" passed, ")?;
    Some((passed.parse().ok()?, failed.strip_suffix(" failed")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_summary_counts() {
        assert_eq!(parse_summary("boot test: 19 passed, 0 failed"), Some((19, 0)));
        assert_eq!(parse_summary("boot test: cannot begin: no module"), None);
        assert_eq!(parse_summary("boot test: 19 passed, 0 fai"), None);
    }
}
