//! What becomes of the disk that both hosts see, as one of them sees it, and while that one runs: slow, or failing.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::machine::Machine;
use super::qmp::Monitor;

/// The disk's name in QEMU, and in dom0.
const BACKEND: &str = "d1";
const DEVICE: &str = "/dev/vdb";

/// The layer that fails, in QEMU.
const FAILING: &str = "failing";

/// MiB that are read to measure.
const MEASURED_MIB: u64 = 96;

/// How long measuring may take.
const LIMIT: Duration = Duration::from_secs(300);

/// A disk that fails.
#[derive(Debug)]
pub struct FailingDisk {
    /// The virtual device, in QEMU's tree of objects.
    device: String,
    /// What it read from before.
    node: String,
}

/// Limits what a host reads from the disk in a second, or lets it read as fast as emulation does.
///
/// # Errors
/// When QEMU refuses.
pub(super) fn set_rate(monitor: &mut Monitor, bytes_per_second: Option<u64>) -> Result<()> {
    let unlimited = 0;
    monitor
        .execute(
            "block_set_io_throttle",
            &json!({
                "device": BACKEND, "bps_rd": bytes_per_second.unwrap_or(unlimited),
                "bps": unlimited, "bps_wr": unlimited, "iops": unlimited, "iops_rd": unlimited, "iops_wr": unlimited,
            }),
        )
        .map(drop)
}

/// From now on every read of the disk fails with EIO, in this host alone; writes still go through.
///
/// # Errors
/// When QEMU refuses.
pub(super) fn fail_reads(monitor: &mut Monitor) -> Result<FailingDisk> {
    let blocks = monitor.execute("query-block", &json!({}))?;
    let disk = disk_of(&blocks)?;
    monitor.execute(
        "blockdev-add",
        &json!({
            "driver": "blkdebug", "node-name": FAILING, "image": disk.node,
            "inject-error": [{
                "event": "none", "iotype": "read", "errno": nix::libc::EIO, "once": false, "immediately": false,
            }],
        }),
    )?;
    set_drive(monitor, &disk, FAILING)?;
    Ok(disk)
}

/// The disk is what it was.
///
/// # Errors
/// When QEMU refuses.
pub(super) fn heal(monitor: &mut Monitor, disk: &FailingDisk) -> Result<()> {
    set_drive(monitor, disk, &disk.node)?;
    monitor.execute("blockdev-del", &json!({ "node-name": FAILING })).map(drop)
}

fn set_drive(monitor: &mut Monitor, disk: &FailingDisk, node: &str) -> Result<()> {
    let arguments = json!({ "path": disk.device, "property": "drive", "value": node });
    monitor.execute("qom-set", &arguments).map(drop)
}

/// The disk in what QEMU says of its block devices.
fn disk_of(blocks: &Value) -> Result<FailingDisk> {
    let disk = blocks.as_array().into_iter().flatten().find(|block| block["device"] == BACKEND);
    let disk = disk.with_context(|| format!("QEMU knows no {BACKEND}: {blocks}"))?;
    let word = |value: &Value| value.as_str().map(str::to_owned);
    let backend = word(&disk["qdev"]).context("nothing is attached to the disk")?;
    Ok(FailingDisk {
        device: backend.trim_end_matches("/virtio-backend").to_owned(),
        node: word(&disk["inserted"]["node-name"]).context("the disk has no name in QEMU")?,
    })
}

/// What a host reads from the disk, in bytes per second, past its page cache.
///
/// # Errors
/// When it cannot be read.
pub(super) fn read_rate(dom0: &Machine) -> Result<u64> {
    let words = dom0.must(
        &format!(
            "begin=$EPOCHREALTIME; dd if={DEVICE} of=/dev/null iflag=direct bs=1M count={MEASURED_MIB} 2>/dev/null \
             && echo $begin $EPOCHREALTIME"
        ),
        LIMIT,
    )?;
    rate_of(&words)
}

fn rate_of(words: &str) -> Result<u64> {
    let mut moments = words.split_whitespace().map(str::parse::<f64>);
    let (Some(Ok(begin)), Some(Ok(end))) = (moments.next(), moments.next()) else {
        anyhow::bail!("not two moments: {words:?}");
    };
    ensure!(end > begin, "reading took no time: {words:?}");
    Ok(((MEASURED_MIB << 20) as f64 / (end - begin)) as u64)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;

    use super::*;
    use crate::lab::qemu;

    struct Ended(Child);

    impl Drop for Ended {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    /// A machine that does nothing, with such a disk as the lab's hosts have.
    #[test]
    fn a_running_qemu_makes_its_disk_slow_and_failing_and_well_again() {
        let directory = tempfile::tempdir().unwrap();
        let (disk, socket) = (directory.path().join("disk"), directory.path().join("monitor"));
        std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let machine = Command::new(qemu::PROGRAM)
            .args([
                "-machine",
                "q35",
                "-accel",
                "tcg",
                "-m",
                "32M",
                "-display",
                "none",
                "-nodefaults",
                "-S",
                "-drive",
            ])
            .arg(format!("file={},format=raw,if=none,id=d1,file.locking=off", disk.display()))
            .args(["-device", "virtio-blk-pci,drive=d1", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(Stdio::null())
            .spawn();
        let _machine = Ended(machine.unwrap());
        let began = Instant::now();
        let mut monitor = loop {
            match Monitor::connect(&socket) {
                Ok(monitor) => break monitor,
                Err(error) => assert!(began.elapsed() < LIMIT, "{error:#}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        fn inserted(monitor: &mut Monitor) -> Value {
            monitor.execute("query-block", &json!({})).unwrap()[0]["inserted"].clone()
        }
        fn read(monitor: &mut Monitor) -> Value {
            let node = inserted(monitor)["node-name"].as_str().unwrap().to_owned();
            let command = json!({ "command-line": format!("qemu-io {node} \"read 0 4k\"") });
            monitor.execute("human-monitor-command", &command).unwrap();
            inserted(monitor)["drv"].clone()
        }
        set_rate(&mut monitor, Some(5_000_000)).unwrap();
        assert_eq!(inserted(&mut monitor)["bps_rd"], 5_000_000);
        let failing = fail_reads(&mut monitor).unwrap();
        assert_eq!(read(&mut monitor), "blkdebug");
        heal(&mut monitor, &failing).unwrap();
        assert_eq!(read(&mut monitor), "raw");
        set_rate(&mut monitor, None).unwrap();
        assert_eq!(inserted(&mut monitor)["bps_rd"], 0);
        // As often as one likes.
        let failing = fail_reads(&mut monitor).unwrap();
        heal(&mut monitor, &failing).unwrap();
    }

    #[test]
    fn the_rate_is_what_was_read_in_the_time_that_it_took() {
        assert_eq!(rate_of("100.5 102.5\n").unwrap(), MEASURED_MIB << 19);
        assert!(rate_of("100.5\n").is_err());
        assert!(rate_of("100.5 100.5\n").is_err());
    }
}
