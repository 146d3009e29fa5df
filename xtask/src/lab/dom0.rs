//! What both hosts boot: hypervisor, kernel, initramfs, and the disk of dom0 with Xen's tools and everything that the guest boots from.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::kernel::release_of;
use super::modules::{GUEST_BOOT, HOST, HOST_BOOT, Modules};
use super::{Flavour, debian};
use crate::apt::{Area, Package, unpack};
use crate::cache::{self, Key};
use crate::step::run;

/// What dom0 is made of, beside the packages that have the release of Xen in their names. No maintainer script runs, and there is no
/// service manager.
const PACKAGES: &[&str] = &[
    "base-files",
    "bash",
    "busybox-static",
    "coreutils",
    "ethtool",
    "grep",
    "iproute2",
    "kmod",
    "libc-bin",
    "linux-image-amd64",
    "mount",
    "procps",
    "sed",
    "socat",
    "util-linux",
    "xen-utils-common",
    "xenstore-utils",
];

/// What dom0 never reads, relative to its root; beside it, what has a release in its name.
const UNREAD: &[&str] = &[
    "boot",
    "usr/include",
    "usr/lib/modules",
    "usr/lib/python3",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/lib/x86_64-linux-gnu/perl-base",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/iso-codes",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/perl",
    "usr/share/perl5",
    "usr/share/python3",
];

/// Files of ours: path, mode, content.
const FILES: &[(&str, u32, &str)] = &[
    ("lab/init", 0o755, include_str!("files/dom0-init")),
    ("lab/block-phy", 0o755, include_str!("files/block-phy")),
    ("lab/vif-bridge", 0o755, include_str!("files/vif-bridge")),
    ("lab/db1.cfg", 0o644, include_str!("files/db1.cfg")),
    ("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/bash\n"),
    ("etc/group", 0o644, "root:x:0:\n"),
    ("etc/hosts", 0o644, "127.0.0.1 localhost\n10.9.0.1 source\n10.9.0.2 target\n"),
];

/// What a host boots from.
#[derive(Clone, Debug)]
pub(super) struct Images {
    dir: PathBuf,
}

impl Images {
    /// The images of the packages that the mirror has now, made if the cache has none.
    ///
    /// # Errors
    /// When the mirror cannot be reached, or this is not run by root.
    pub(super) fn get(flavour: Flavour) -> Result<Self> {
        if flavour.is_whole() {
            return debian::host_images(flavour).map(|dir| Self { dir });
        }
        let area = Area::open(flavour.suite())?;
        let xen = flavour.xen();
        let xen = [format!("xen-hypervisor-{xen}-amd64"), format!("xen-utils-{xen}")];
        let packages =
            area.resolve(&[PACKAGES, &xen.each_ref().map(String::as_str), flavour.packages()].concat())?;
        let files = FILES.iter().map(|&(path, mode, content)| (path, mode, flavour.adapted(content)));
        let files: Vec<_> = files.collect();
        let mut key = Key::new("lab-host-2").with(include_bytes!("files/initramfs-init"));
        for package in &packages {
            key = key.with(package.to_string().as_bytes());
        }
        for (path, _, content) in &files {
            key = key.with(path.as_bytes()).with(content.as_bytes());
        }
        for module in [HOST_BOOT, HOST, GUEST_BOOT].concat() {
            key = key.with(module.as_bytes());
        }
        let dir = cache::get_or_make("lab-host", key, |dir| make(flavour, &area, &packages, &files, dir))?;
        Ok(Self { dir })
    }

    /// Those that are in a directory, if they are.
    #[cfg(test)]
    pub(super) fn in_directory(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Where they are.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The hypervisor.
    pub(super) fn hypervisor(&self) -> PathBuf {
        self.dir.join("xen.elf")
    }

    /// dom0's kernel.
    pub(super) fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// dom0's initramfs.
    pub(super) fn initramfs(&self) -> PathBuf {
        self.dir.join("initrd")
    }

    /// dom0's disk, raw, which never changes: hosts write to an overlay of their own.
    pub(super) fn disk(&self) -> PathBuf {
        self.dir.join("dom0.raw")
    }

    /// What tells these images from others: their name in the cache.
    pub(super) fn identity(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

fn make(
    flavour: Flavour,
    area: &Area,
    packages: &[Package],
    files: &[(&str, u32, String)],
    dir: &Path,
) -> Result<()> {
    let xen = flavour.xen();
    let root = dir.join("root");
    unpack(&area.download(packages)?, &root)?;
    boot_files(flavour, packages, &root, dir)?;

    let (firmware, hvmloader) = (format!("usr/lib/xen-{xen}/boot"), root.join("lab/hvmloader"));
    if flavour.has_firmware() {
        fs::rename(root.join(&firmware).join("hvmloader"), &hvmloader)
            .context("Xen's packages have no hvmloader")?;
    }
    let of_releases = [format!("usr/lib/python{}", flavour.python()), firmware.clone()];
    for path in UNREAD.iter().copied().chain(of_releases.iter().map(String::as_str)) {
        match fs::remove_dir_all(root.join(path)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {path} from dom0's root"));
            }
            _ => {}
        }
    }
    if flavour.has_firmware() {
        fs::create_dir_all(root.join(&firmware))?;
        fs::rename(hvmloader, root.join(&firmware).join("hvmloader"))?;
    }
    for (path, mode, content) in files {
        install(&root, path, *mode, content)?;
    }
    // Debian starts each Xen tool through a shell script that finds the running version's: a process more, every time.
    let tools = format!("usr/lib/xen-{xen}/bin");
    for entry in fs::read_dir(root.join(&tools))? {
        let name = entry?.file_name();
        for place in ["usr/sbin", "usr/bin"] {
            let link = root.join(place).join(&name);
            if fs::symlink_metadata(&link).is_ok_and(|meta| meta.is_symlink()) {
                fs::remove_file(&link)?;
                symlink(Path::new("/").join(&tools).join(&name), &link)?;
            }
        }
    }
    finish_root(&root)?;
    let disk = dir.join("dom0.raw");
    run(Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-L", "dom0", "-d"])
        .arg(&root)
        .arg(&disk)
        .arg("1500M"))?;
    fs::remove_dir_all(&root)?;
    Ok(())
}

/// Takes hypervisor and kernel out of a host's root, and makes what is loaded before it: for the host, and in its root for the guest.
///
/// # Errors
/// When the root lacks one of these.
pub(super) fn boot_files(flavour: Flavour, packages: &[Package], root: &Path, dir: &Path) -> Result<()> {
    let release = packages
        .iter()
        .find_map(|package| release_of(&package.name))
        .context("linux-image-amd64 depends on no kernel")?;
    fs::copy(root.join(format!("boot/vmlinuz-{release}")), dir.join("vmlinuz"))?;
    gunzip(&root.join(format!("boot/xen-{}-amd64.gz", flavour.xen())), &dir.join("xen.elf"))?;
    let module_dir = root.join("lib/modules").join(&release);
    let modules = Modules::read(root, &release, &module_dir)?;
    fs::write(dir.join("initrd"), modules.initramfs(HOST_BOOT)?)?;
    fs::create_dir_all(root.join("lab"))?;
    fs::write(root.join("lab/guest-initrd"), modules.initramfs(GUEST_BOOT)?)?;
    fs::copy(dir.join("vmlinuz"), root.join("lab/vmlinuz"))?;
    modules.copy(HOST, HOST_BOOT, &root.join("lab/modules"))
}

/// What maintainer scripts would have left behind and a machine needs: a shell, mount points, the loader's cache.
///
/// # Errors
/// When the root cannot be written or its `ldconfig` does not run.
pub(super) fn finish_root(root: &Path) -> Result<()> {
    if fs::symlink_metadata(root.join("usr/bin/sh")).is_err() {
        symlink("bash", root.join("usr/bin/sh"))?;
    }
    for directory in ["dev", "proc", "sys", "run", "tmp", "root", "var/log", "var/tmp"] {
        fs::create_dir_all(root.join(directory))?;
    }
    // Packages bring directories here; what their programs make at run time belongs to /run.
    for (path, to) in [("var/run", "/run"), ("var/lock", "/run/lock")] {
        let path = root.join(path);
        if fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
            fs::remove_dir_all(&path)?;
        }
        if fs::symlink_metadata(&path).is_err() {
            symlink(to, &path)?;
        }
    }
    // Programs that no package here brings, from busybox.
    let applets = run(Command::new("chroot").arg(root).args(["/usr/bin/busybox", "--list"]))?;
    for applet in String::from_utf8_lossy(&applets).lines() {
        let there = ["usr/bin", "usr/sbin"]
            .iter()
            .any(|dir| fs::symlink_metadata(root.join(dir).join(applet)).is_ok());
        if !there {
            symlink("busybox", root.join("usr/bin").join(applet))?;
        }
    }
    run(Command::new("chroot").arg(root).arg("/usr/sbin/ldconfig"))?;
    Ok(())
}

/// Writes one of our files into a root.
///
/// # Errors
/// When it cannot be written.
pub(super) fn install(root: &Path, path: &str, mode: u32, content: &str) -> Result<()> {
    let full = root.join(path);
    if let Some(parent) = full.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(&full, content).with_context(|| format!("cannot write {}", full.display()))?;
    fs::set_permissions(&full, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn gunzip(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("gzip")
        .arg("-dc")
        .stdin(File::open(from).with_context(|| format!("no hypervisor at {}", from.display()))?)
        .stdout(Stdio::from(File::create(to)?))
        .status()
        .context("cannot start gzip")?;
    if !status.success() {
        bail!("gzip cannot unpack {}", from.display());
    }
    Ok(())
}
