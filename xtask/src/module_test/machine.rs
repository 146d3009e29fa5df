//! A machine with a kernel, an initramfs, a console and perhaps disks, and nothing else.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a machine may take in all; it takes about a minute on two cores without hardware virtualisation.
const LIMIT: Duration = Duration::from_secs(600);

/// The kernel's arguments: complaints are fatal for whoever is in the kernel then, and the machine ends instead of starting again.
const ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 oops=panic transparent_hugepage=always";

/// A machine that ends with its owner.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the machine to its end and returns what came on its console, each line shown to `look` as it comes. `words` are arguments for
/// the first program; `disks`, raw images, are its virtio disks.
///
/// # Errors
/// When QEMU cannot be started, or the machine does not end in time.
pub fn run(
    kernel: &Path,
    initrd: &Path,
    words: &str,
    disks: &[PathBuf],
    mut look: impl FnMut(&str),
) -> Result<Vec<String>> {
    // Always emulated: where /dev/kvm is there but virtualisation is not, a machine under KVM hangs without a word.
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "320"])
        // Two NUMA nodes, so that pages can be told to move; one socket in each, or the kernel warns.
        .args(["-smp", "2,sockets=2,cores=1"])
        .args(["-object", "memory-backend-ram,id=m0,size=160M", "-numa", "node,cpus=0,memdev=m0"])
        .args(["-object", "memory-backend-ram,id=m1,size=160M", "-numa", "node,cpus=1,memdev=m1"])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .arg("-append")
        .arg(format!("{ARGUMENTS} -- {words}"))
        .args(
            disks.iter().flat_map(|disk| {
                ["-drive".to_owned(), format!("file={},format=raw,if=virtio", disk.display())]
            }),
        )
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
    let mut lines = Vec::new();
    loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                look(&line);
                lines.push(line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(lines),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("the machine has not ended after {} s; its console is above", LIMIT.as_secs())
            }
        }
    }
}
