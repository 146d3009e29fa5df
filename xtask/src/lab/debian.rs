//! The lab of whole Debian systems: both hosts and the guest have a service manager, dpkg's database and sshd, as an operator's have. Nothing
//! of Poolskip is in them.
//!
//! What is not as elsewhere, and why: no device manager and no timers run, and Xen's daemons are started by one script of ours (starting
//! processes is what is slow under emulation); the guest has no kernel package, for its host boots it from a file; and its server
//! comes from Debian sid and lies in a root of its own, for Debian 12 has no MySQL.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::dom0::{boot_files, install};
use super::guest_disk::{PARTITION_OFFSET, TABLES, contained, write_disk};
use super::modules::{GUEST_BOOT, HOST, HOST_BOOT};
use super::{Flavour, GuestSize, Host};
use crate::apt::{Area, Package};
use crate::cache::{self, Key};
use crate::step::{run, step};
use crate::{debian_root, mysql};

/// What every machine has beside what every Debian has.
const EVERYWHERE: &[&str] =
    &["iproute2", "kmod", "openssh-client", "openssh-server", "procps", "socat", "systemd", "systemd-sysv"];

/// What a host has besides, and Xen of its release.
const OF_HOSTS: &[&str] =
    &["busybox-static", "ethtool", "linux-image-amd64", "xen-utils-common", "xenstore-utils"];

/// What the guest has besides: all that the probe's package needs, for there is no mirror to be reached from inside.
const OF_GUEST: &[&str] = &["dkms", "libelf1", "linux-headers-amd64", "zlib1g"];

/// Where the guest's server has its root.
const SERVER: &str = "srv/mysql";

/// Units that would only cost time here, or want what is not here: network, consoles, devices' properties.
const MASKED: &[&str] = &[
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "logrotate.timer",
    "systemd-tmpfiles-clean.timer",
    "systemd-udev-settle.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "xendomains.service",
];

/// Files of ours: path, mode, content.
type Files = &'static [(&'static str, u32, &'static str)];

const FILES: Files = &[
    ("lab/init", 0o755, include_str!("files/debian/init")),
    ("etc/systemd/system/lab-network.service", 0o644, include_str!("files/debian/network.service")),
    ("etc/systemd/system/lab-shell.service", 0o644, include_str!("files/debian/shell.service")),
    // There is nobody to be asked for names.
    ("etc/resolv.conf", 0o644, ""),
    // A system without a number is one that starts for the first time: all units would get their presets.
    ("etc/machine-id", 0o444, "706f6f6c736b69706c6162706f6f6c73\n"),
];

const HOST_FILES: Files = &[
    ("lab/network", 0o755, include_str!("files/debian/host-network")),
    ("lab/xen", 0o755, include_str!("files/debian/xen")),
    ("lab/block-phy", 0o755, include_str!("files/block-phy")),
    ("lab/vif-bridge", 0o755, include_str!("files/vif-bridge")),
    ("lab/db1.cfg", 0o644, include_str!("files/db1.cfg")),
    ("etc/systemd/system/xen.service", 0o644, include_str!("files/debian/xen.service")),
    ("etc/systemd/system/lab-ready.service", 0o644, include_str!("files/debian/ready.service")),
];

const GUEST_FILES: Files = &[
    ("lab/network", 0o755, include_str!("files/debian/guest-network")),
    ("etc/systemd/system/mysql.service", 0o644, include_str!("files/debian/mysql.service")),
    ("etc/hostname", 0o644, "db1\n"),
    ("etc/hosts", 0o644, "127.0.0.1 localhost\n10.3.0.16 db1\n"),
    ("usr/local/bin/mysql", 0o755, include_str!("files/debian/client")),
    ("usr/local/bin/sysbench", 0o755, include_str!("files/debian/client")),
];

/// What `dpkg --verify` says of a system before anything was deployed, in each of them.
const VERIFIED: &str = "lab/dpkg-verify";

/// Where a machine's disk is looked at: in a mount namespace that ends with the look.
const LOOK: &str = "place=$(mktemp -d); trap 'umount \"$place\"; rmdir \"$place\"' EXIT
mount -o \"loop,offset=$2\" \"$1\" \"$place\"
chroot \"$place\" dpkg --verify >\"$3\" || true
diff \"$place/lab/dpkg-verify\" \"$3\" || true";

/// How root gets into the machines.
#[derive(Clone, Debug)]
pub(super) struct Login {
    /// The private key.
    pub(super) key: PathBuf,
    /// ssh's known hosts, by the alias `lab`, and by the hosts' names.
    pub(super) known_hosts: PathBuf,
    host_key: PathBuf,
}

/// The keys of all machines: they are reached from this machine's loopback alone, and are the same as long as the cache has them.
///
/// # Errors
/// When they cannot be made.
pub(super) fn login() -> Result<Login> {
    let dir = cache::get_or_make("lab-login", Key::new("lab-login-1"), |dir| {
        for name in ["key", "host_key"] {
            let key = dir.join(name);
            run(Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"])
                .arg(key))?;
        }
        let host_key = fs::read_to_string(dir.join("host_key.pub"))?;
        let names: Vec<&str> =
            Host::BOTH.iter().flat_map(|host| [host.alias(), host.address()]).chain(["lab"]).collect();
        Ok(fs::write(dir.join("known_hosts"), format!("{} {host_key}", names.join(",")))?)
    })?;
    let file = |name| dir.join(name);
    Ok(Login { key: file("key"), known_hosts: file("known_hosts"), host_key: file("host_key") })
}

/// A directory with all that a host boots from, made if the cache has none.
///
/// # Errors
/// When the mirror cannot be reached, or this is not run by root.
pub(super) fn host_images(flavour: Flavour) -> Result<PathBuf> {
    let area = Area::open(flavour.suite())?;
    let xen = flavour.xen();
    let of_release = [format!("xen-hypervisor-{xen}-amd64"), format!("xen-utils-{xen}")];
    let names = [EVERYWHERE, OF_HOSTS, &of_release.each_ref().map(String::as_str)].concat();
    let packages = area.resolve(&names)?;
    let hosts = hosts();
    let files = [HOST_FILES, &[("etc/hosts", 0o644, hosts.as_str())]].concat();
    let mut key = key("lab-debian-host-1", &packages, &files)?.with(include_bytes!("files/initramfs-init"));
    for module in [HOST_BOOT, HOST, GUEST_BOOT].concat() {
        key = key.with(module.as_bytes());
    }
    cache::get_or_make("lab-host", key, |dir| {
        let root = dir.join("root");
        system(flavour, &names, &root)?;
        boot_files(flavour, &packages, &root, dir)?;
        finish(&root, &files, &["lab-network", "lab-shell", "lab-ready", "xen"])?;
        let disk = dir.join("dom0.raw");
        let size = "3G";
        run(Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-L", "dom0", "-d"])
            .arg(&root)
            .arg(&disk)
            .arg(size))?;
        Ok(fs::remove_dir_all(&root)?)
    })
}

/// The guest's disk, raw, made if the cache has none.
///
/// # Errors
/// When the mirror cannot be reached, this is not run by root, or the server does not take the data.
pub(super) fn guest_disk(flavour: Flavour, size: GuestSize) -> Result<PathBuf> {
    let server = mysql::root()?;
    let area = Area::open(flavour.suite())?;
    let names = [EVERYWHERE, OF_GUEST].concat();
    let packages = area.resolve(&names)?;
    drop(area);
    let configuration = size.configuration(include_str!("files/my.cnf"));
    let rows = size.rows();
    // Both suites, and twice what the small guest's disk has.
    let disk_bytes = 2 * size.disk_bytes();
    let key = key("lab-debian-guest-1", &packages, GUEST_FILES)?
        .with(server.file_name().unwrap_or_default().as_encoded_bytes())
        .with(configuration.as_bytes())
        .with(include_bytes!("files/prepare-data"))
        .with(include_bytes!("files/debian/fill-disk"))
        .with(format!("{disk_bytes} {PARTITION_OFFSET} {TABLES} {rows}").as_bytes());
    let dir = cache::get_or_make("lab-disk", key, |dir| {
        let root = dir.join("root");
        system(flavour, &names, &root)?;
        finish(&root, GUEST_FILES, &["lab-network", "lab-shell", "mysql"])?;
        let own = root.join(SERVER);
        fs::create_dir_all(own.parent().context("a root in a directory")?)?;
        run(Command::new("cp").arg("-a").arg(&server).arg(&own))?;
        install(&own, "lab/prepare-data", 0o755, include_str!("files/prepare-data"))?;
        install(&own, "etc/mysql/my.cnf", 0o644, &configuration)?;
        install(&own, "etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/bash\n")?;
        install(&own, "etc/group", 0o644, "root:x:0:\n")?;
        super::dom0::finish_root(&own)?;
        fs::create_dir_all(own.join("run/mysqld"))?;
        step("loading sysbench's tables into a MySQL data directory", || {
            run(contained()
                .arg("chroot")
                .arg(&own)
                .arg("/lab/prepare-data")
                .args([TABLES.to_string(), rows.to_string()]))
        })?;
        fs::remove_dir_all(own.join("run/mysqld"))?;
        symlink(format!("/{SERVER}/var/lib/lab-checksums"), root.join("var/lib/lab-checksums"))?;
        let image = dir.join("shared.raw");
        let fill = include_str!("files/debian/fill-disk");
        step("writing the guest's disk", || write_disk(&root, &image, disk_bytes, fill))?;
        Ok(fs::remove_dir_all(&root)?)
    })?;
    Ok(dir.join("shared.raw"))
}

/// What goes into every image.
fn key(kind: &str, packages: &[Package], files: &[(&str, u32, &str)]) -> Result<Key> {
    let mut key = Key::new(kind).with(MASKED.join(" ").as_bytes());
    for package in packages {
        key = key.with(package.to_string().as_bytes());
    }
    for (path, _, content) in FILES.iter().chain(files) {
        key = key.with(path.as_bytes()).with(content.as_bytes());
    }
    key.with_file(&login()?.host_key)
}

/// The hosts' names and addresses.
fn hosts() -> String {
    let lines = Host::BOTH.map(|host| format!("{} {} {}\n", host.address(), host.alias(), host.name()));
    format!("127.0.0.1 localhost\n{}", lines.concat())
}

/// A Debian system with these packages.
fn system(flavour: Flavour, packages: &[&str], root: &Path) -> Result<()> {
    step("installing a Debian system", || debian_root::make(flavour.suite(), &packages.join(","), root))
}

/// Adds what is ours: files, units that start at boot and those that don't, keys.
fn finish(root: &Path, files: &[(&str, u32, &str)], units: &[&str]) -> Result<()> {
    let login = login()?;
    // Before anything of ours is there.
    let verified = Command::new("chroot").arg(root).args(["dpkg", "--verify"]).output()?.stdout;
    for (path, mode, content) in FILES.iter().chain(files) {
        install(root, path, *mode, content)?;
    }
    fs::write(root.join(VERIFIED), verified)?;
    let systemd = root.join("etc/systemd/system");
    let wanted = systemd.join("multi-user.target.wants");
    fs::create_dir_all(&wanted)?;
    for unit in units {
        let name = format!("{unit}.service");
        symlink(format!("/etc/systemd/system/{name}"), wanted.join(name))?;
    }
    for unit in MASKED {
        let link = systemd.join(unit);
        if fs::symlink_metadata(&link).is_ok() {
            fs::remove_file(&link)?;
        }
        symlink("/dev/null", link)?;
    }
    // One kind of key is enough, and the same everywhere.
    for entry in fs::read_dir(root.join("etc/ssh"))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ssh_host_")) {
            fs::remove_file(path)?;
        }
    }
    let of_root = root.join("root/.ssh");
    fs::create_dir_all(&of_root)?;
    fs::set_permissions(&of_root, fs::Permissions::from_mode(0o700))?;
    for (from, to, mode) in [
        (login.host_key.clone(), root.join("etc/ssh/ssh_host_ed25519_key"), 0o600),
        (login.key.clone(), of_root.join("id_ed25519"), 0o600),
        (login.key.with_extension("pub"), of_root.join("authorized_keys"), 0o600),
        (login.known_hosts.clone(), of_root.join("known_hosts"), 0o644),
    ] {
        fs::copy(&from, &to)
            .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// What dpkg says of a machine's disk, and did not say of its image.
///
/// # Errors
/// When the disk cannot be mounted.
pub(super) fn verify(disk: &Path, name: &str) -> Result<Vec<String>> {
    // dom0's has no partitions.
    let offset = if name == "guest" { PARTITION_OFFSET } else { 0 };
    let said = tempfile::NamedTempFile::new()?;
    let words = run(contained()
        .args(["/bin/sh", "-ec", LOOK, "sh"])
        .arg(disk)
        .arg(offset.to_string())
        .arg(said.path()))?;
    Ok(String::from_utf8_lossy(&words).lines().map(|line| format!("{name}: {line}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_know_each_other_by_the_names_that_pages_use() {
        assert_eq!(hosts(), "127.0.0.1 localhost\n10.9.0.1 host-a source\n10.9.0.2 host-b target\n");
    }

    #[test]
    fn units_that_are_started_are_there() {
        for unit in ["lab-network", "lab-shell", "lab-ready", "xen", "mysql"] {
            let path = format!("etc/systemd/system/{unit}.service");
            assert!(
                FILES.iter().chain(HOST_FILES).chain(GUEST_FILES).any(|(name, ..)| *name == path),
                "{unit}"
            );
        }
    }
}
