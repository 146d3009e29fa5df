//! The frozen lab: both hosts as they were when the guest's buffer pool had just been warmed. Built once for everything that goes into
//! it, then only resumed.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::dom0::Images;
use super::prune::prune;
use super::qemu::{Config, version};
use super::raised::{Lab, copy};
use super::{Flavour, GuestSize, Host, debian, guest_disk};
use crate::cache::{self, Key};
use crate::step::step;

/// The disks that belong to the state.
pub(super) const DISKS: [&str; 3] = ["source.qcow2", "target.qcow2", "shared.raw"];

/// How long the guest may take to a shell; with a service manager it takes minutes.
const GUEST_BOOT: Duration = Duration::from_secs(900);

/// How long mysqld may take to start under emulation.
const SERVER_START: Duration = Duration::from_secs(600);

/// How long one table may take to be read into the pool.
const SCAN: Duration = Duration::from_secs(600);

/// How often a guest may end by a triple fault before that is no chance any more.
const MOST_FAULTS: u32 = 4;

/// How often it is looked whether it has.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How the guest's root reaches its server.
const MYSQL: &str = "mysql -uroot -S /run/mysqld/mysqld.sock -sN";

/// A frozen lab in the cache.
pub(super) struct Frozen {
    dir: PathBuf,
    images: Images,
    flavour: Flavour,
}

impl Frozen {
    /// Where its files are: states and disks, to be copied.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// What its hosts booted from.
    pub(super) fn images(&self) -> &Images {
        &self.images
    }

    /// What kind of lab it is.
    pub(super) fn flavour(&self) -> Flavour {
        self.flavour
    }
}

/// What the hosts boot from, and the guest's disk; made if the cache has none.
///
/// # Errors
/// When they cannot be made.
pub(super) fn images(flavour: Flavour, size: GuestSize) -> Result<(Images, PathBuf)> {
    let images = Images::get(flavour)?;
    let disk = if flavour.is_whole() { debian::guest_disk(flavour, size)? } else { guest_disk::get(size)? };
    Ok((images, disk))
}

/// The frozen lab of everything as it is now, built if the cache has none.
///
/// # Errors
/// When it cannot be built.
pub(super) fn get(rebuild: bool, flavour: Flavour, size: GuestSize) -> Result<Frozen> {
    let version = version()?;
    let (images, disk) = images(flavour, size)?;
    let key = || -> Result<Key> {
        let mut key = Key::new("lab-warm-1")
            .with(version.as_bytes())
            .with(images.identity().as_bytes())
            .with(disk.parent().and_then(Path::file_name).unwrap_or_default().as_encoded_bytes())
            .with(warming().as_bytes());
        // Nothing is added for the small PV guest: what its labs were kept under stays as it was.
        for overrides in [&size.overrides(), flavour.overrides()] {
            if !overrides.is_empty() {
                key = key.with(overrides.as_bytes());
            }
        }
        for host in Host::BOTH {
            for argument in Config::of_no_run(host, &images).arguments() {
                key = key.with(argument.as_bytes());
            }
        }
        Ok(key)
    };
    let warm = cache::dir()?.join(format!("lab-warm-{}", key()?.hex()));
    if rebuild && warm.exists() {
        fs::remove_dir_all(&warm).with_context(|| format!("cannot remove {}", warm.display()))?;
    }
    let disk_dir = disk.parent().context("the guest's disk lies nowhere")?;
    let mut in_use = vec![images.dir(), disk_dir];
    in_use.extend(warm.exists().then_some(warm.as_path()));
    prune(&in_use)?;
    let dir = cache::get_or_make("lab-warm", key()?, |dir| build(&images, &disk, flavour, size, dir))?;
    prune(&[&dir])?;
    Ok(Frozen { dir, images, flavour })
}

/// Under emulation a guest with hardware-assisted paging may end by a triple fault while its pool is warmed, too. Then, and only then, all
/// begins again.
fn build(images: &Images, disk: &Path, flavour: Flavour, size: GuestSize, dir: &Path) -> Result<()> {
    let mut faults = 0;
    let lab = loop {
        let lab = step("booting two Xen hosts", || Lab::boot(images, flavour, disk))?;
        match warm(&lab, flavour, size) {
            Ok(()) => break lab,
            Err(error) if lab.guest_faulted() => {
                faults += 1;
                if faults == MOST_FAULTS {
                    return Err(
                        error.context(format!("{faults} triple faults of the guest are no chance any more"))
                    );
                }
                eprintln!("  again: triple fault of the emulated guest, {faults} so far");
            }
            Err(error) => return Err(error),
        }
    };
    step("freezing", || freeze(lab, dir))
}

/// Boots the guest, and reads its tables into its pool.
fn warm(lab: &Lab, flavour: Flavour, size: GuestSize) -> Result<()> {
    let source = lab.host(Host::Source);
    step("booting the guest", || {
        let create = format!("xl create -q /lab/db1.cfg{}{}", size.overrides(), flavour.overrides());
        source.must(&create, Duration::from_secs(120))?;
        lab.guest().must(":", GUEST_BOOT).map(drop).with_context(|| {
            let log = source.run(
                "tail -n 30 /var/log/xen/guest-db1.log; xl list; xl dmesg | tail -n 20",
                Duration::from_secs(60),
            );
            format!("the guest does not answer: {}", log.map(|output| output.stdout).unwrap_or_default())
        })
    })?;
    step("waiting for mysqld in the guest", || {
        let wait = format!(
            "until {MYSQL} -e 'SELECT 1' >/dev/null 2>&1; do pidof mysqld >/dev/null || \
             {{ tail -n 20 /var/log/mysqld.log >&2; exit 1; }}; sleep 2; done"
        );
        in_guest(lab, &wait, SERVER_START)
    })?;
    for (number, query) in (1..).zip(warming().lines()) {
        step(&format!("warming the buffer pool ({number} of {})", guest_disk::TABLES), || {
            in_guest(lab, &format!("{MYSQL} -e '{query}'"), SCAN)
        })?;
    }
    let pool = in_guest(
        lab,
        &format!("{MYSQL} -e \"SHOW GLOBAL STATUS LIKE 'Innodb_buffer_pool_pages_%'\""),
        Duration::from_secs(60),
    )?;
    check_pool(&pool)?;
    // What is still to be written goes to the disks now, not in the middle of somebody's measurement.
    in_guest(lab, "sync", Duration::from_secs(120))?;
    for host in Host::BOTH {
        lab.host(host).must("sync", Duration::from_secs(120))?;
    }
    if flavour.is_frozen_paused() {
        source.must("xl pause db1", Duration::from_secs(60))?;
    }
    Ok(())
}

/// Runs a command in the guest, which must end with 0 before the guest ends by a triple fault; its output.
fn in_guest(lab: &Lab, command: &str, limit: Duration) -> Result<String> {
    let (started, began) = (lab.guest().spawn(command)?, Instant::now());
    while !started.has_ended() && began.elapsed() < limit {
        if lab.guest_faulted() {
            bail!("the guest ended by a triple fault in `{command}`");
        }
        thread::sleep(LOOK_AGAIN);
    }
    if !started.has_ended() {
        bail!("in the guest: `{command}` has not ended after {} s: {}", limit.as_secs(), started.output());
    }
    let output = started.wait(Duration::ZERO)?;
    ensure!(output.status == 0, "in the guest: `{command}` ended with {}: {}", output.status, output.stdout);
    Ok(output.stdout)
}

/// Stops both hosts, then writes their states, then copies their disks: so that all of it is of one moment.
fn freeze(lab: Lab, dir: &Path) -> Result<()> {
    let mut monitors = Vec::new();
    for host in Host::BOTH {
        let mut monitor = lab.qemu(host).monitor()?;
        monitor.execute("stop", &json!({}))?;
        monitors.push((host, monitor));
    }
    for (host, mut monitor) in monitors {
        monitor.save_state(&dir.join(host.state_file()))?;
    }
    let run_dir = lab.into_disks();
    for name in DISKS {
        copy(&run_dir.disks().join(name), &dir.join(name))?;
    }
    Ok(())
}

/// Queries that read every page of every table, a line a table: the clustered index, then the secondary one.
fn warming() -> String {
    (1..=guest_disk::TABLES)
        .map(|n| {
            format!(
                "SELECT SUM(LENGTH(c)) + SUM(LENGTH(pad)) FROM sbtest.sbtest{n}; \
                 SELECT SUM(k) FROM sbtest.sbtest{n} FORCE INDEX (k_{n})\n"
            )
        })
        .collect()
}

/// The pool must be what the lab promises: nearly full, and clean.
fn check_pool(status: &str) -> Result<()> {
    let pages = |name: &str| -> Result<u64> {
        status
            .lines()
            .find_map(|line| line.strip_prefix(&format!("Innodb_buffer_pool_pages_{name}\t")))
            .with_context(|| format!("the server says nothing of pages_{name}: {status}"))?
            .trim()
            .parse()
            .with_context(|| format!("pages_{name} is no number: {status}"))
    };
    let (data, dirty, total) = (pages("data")?, pages("dirty")?, pages("total")?);
    eprintln!("  buffer pool: {data} of {total} pages hold data, {dirty} are dirty");
    if data * 10 < total * 8 {
        bail!("only {data} of {total} pages of the buffer pool hold data after warming");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cold_pool_is_not_taken_for_a_warm_one() {
        let status = |data: u64| {
            format!(
                "Innodb_buffer_pool_pages_data\t{data}\nInnodb_buffer_pool_pages_dirty\t0\nInnodb_buffer_pool_pages_total\t16000\n"
            )
        };
        assert!(check_pool(&status(15_000)).is_ok());
        assert!(check_pool(&status(9_000)).is_err());
        assert!(check_pool("").is_err());
    }
}
