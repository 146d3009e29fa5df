//! Kernel modules of the lab's machines, in the order in which they can be loaded.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::step::run;

/// What both kinds of machine need to mount a root.
const ROOT: &[&str] = &["crc32c_generic", "ext4"];

/// What a host needs before its root is mounted.
pub(super) const HOST_BOOT: &[&str] = &["virtio_pci", "virtio_blk"];

/// What a host needs besides.
pub(super) const HOST: &[&str] = &[
    "virtio_net",
    "xenfs",
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-privcmd",
    "xen-netback",
    "xen-blkback",
    "bridge",
    "sch_tbf",
    "sch_netem",
];

/// What the guest needs.
pub(super) const GUEST_BOOT: &[&str] = &["xen-blkfront", "xen-netfront"];

/// The modules of one kernel in an unpacked root.
pub(super) struct Modules<'a> {
    dir: &'a Path,
    /// Of the root; none where only the modules were unpacked.
    busybox: Option<PathBuf>,
    dependencies: HashMap<String, (String, Vec<String>)>,
    /// Part of the kernel itself: nothing is to be loaded.
    built_in: HashSet<String>,
}

impl<'a> Modules<'a> {
    /// Reads the dependencies of all modules in `dir` (`lib/modules/RELEASE` in `root`).
    ///
    /// # Errors
    /// When depmod fails.
    pub(super) fn read(root: &Path, release: &str, dir: &'a Path) -> Result<Self> {
        run(Command::new("chroot").arg(root).args(["depmod", release]))?;
        Ok(Self { busybox: Some(root.join("usr/bin/busybox")), ..Self::known(dir)? })
    }

    /// Those that depmod has seen already.
    ///
    /// # Errors
    /// When it has not.
    pub(super) fn known(dir: &'a Path) -> Result<Self> {
        let text = fs::read_to_string(dir.join("modules.dep")).context("depmod left no modules.dep")?;
        let built_in =
            fs::read_to_string(dir.join("modules.builtin")).context("the kernel has no modules.builtin")?;
        Ok(Self {
            dir,
            busybox: None,
            dependencies: parse_dependencies(&text),
            built_in: built_in.lines().map(name_of).collect(),
        })
    }

    /// Paths of `wanted` and all that they need, each after what it needs.
    ///
    /// # Errors
    /// When there is no such module.
    pub(super) fn in_order(&self, wanted: &[&str]) -> Result<Vec<String>> {
        let mut order: Vec<String> = Vec::new();
        for name in wanted.iter().filter(|name| !self.built_in.contains(&canonical(name))) {
            let (path, needed) = self
                .dependencies
                .get(&canonical(name))
                .with_context(|| format!("the kernel has no module {name} in {}", self.dir.display()))?;
            for path in needed.iter().rev().chain([path]) {
                if !order.contains(path) {
                    order.push(path.clone());
                }
            }
        }
        Ok(order)
    }

    /// An initramfs that loads `wanted` and the root's file system, and goes on from the root.
    ///
    /// # Errors
    /// When a module or busybox is missing.
    pub(super) fn initramfs(&self, wanted: &[&str]) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for directory in ["bin", "dev", "proc", "root", "modules"] {
            archive.directory(directory);
        }
        archive.device("dev/console", 5, 1);
        archive.file("init", 0o755, include_bytes!("files/initramfs-init"));
        let busybox = self.busybox()?;
        let bytes = fs::read(busybox).with_context(|| format!("no busybox at {}", busybox.display()))?;
        archive.file("bin/busybox", 0o755, &bytes);
        let mut names = String::new();
        for path in self.in_order(&[wanted, ROOT].concat())? {
            let name = file_name(&path);
            names.push_str(name);
            names.push('\n');
            archive.file(&format!("modules/{name}"), 0o644, &self.unpacked(&path)?);
        }
        archive.file("modules/order", 0o644, names.as_bytes());
        Ok(archive.finish())
    }

    /// Copies `wanted` and what they need into `to`, with a file `order` that names them in order; not what `before` has loaded already.
    ///
    /// # Errors
    /// When one is missing or cannot be copied.
    pub(super) fn copy(&self, wanted: &[&str], before: &[&str], to: &Path) -> Result<()> {
        let loaded = self.in_order(&[before, ROOT].concat())?;
        self.copy_but(wanted, &loaded, to)
    }

    /// The same where nothing is loaded yet.
    ///
    /// # Errors
    /// Those of [`Self::copy`].
    pub(super) fn copy_all(&self, wanted: &[&str], to: &Path) -> Result<()> {
        self.copy_but(wanted, &[], to)
    }

    fn copy_but(&self, wanted: &[&str], loaded: &[String], to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        let mut names = String::new();
        for path in self.in_order(wanted)?.iter().filter(|path| !loaded.contains(path)) {
            let name = file_name(path);
            names.push_str(name);
            names.push('\n');
            fs::write(to.join(name), self.unpacked(path)?)?;
        }
        fs::write(to.join("order"), names)?;
        Ok(())
    }

    /// A module's bytes: newer suites have them compressed.
    fn unpacked(&self, path: &str) -> Result<Vec<u8>> {
        let path = self.dir.join(path);
        if path.extension().is_some_and(|extension| extension == "xz") {
            return run(Command::new(self.busybox()?).args(["xz", "-dc"]).arg(&path));
        }
        fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    fn busybox(&self) -> Result<&Path> {
        self.busybox.as_deref().context("the modules lie in no root that has a busybox")
    }
}

/// `modules.dep`: `PATH: PATH…`, what a module needs, nearest first. By name.
fn parse_dependencies(text: &str) -> HashMap<String, (String, Vec<String>)> {
    text.lines()
        .filter_map(|line| {
            let (path, needed) = line.split_once(':')?;
            let needed = needed.split_whitespace().map(str::to_owned).collect();
            Some((name_of(path), (path.to_owned(), needed)))
        })
        .collect()
}

/// The name of the module in a file.
fn name_of(path: &str) -> String {
    canonical(file_name(path).trim_end_matches(".ko"))
}

/// The kernel takes `-` and `_` in a module's name for the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The name of a module's file, as it is when it is unpacked.
fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path).trim_end_matches(".xz")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let text = "kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/fs/mbcache.ko kernel/lib/crc16.ko\n\
                    kernel/lib/crc16.ko:\nkernel/fs/mbcache.ko:\nkernel/fs/jbd2/jbd2.ko: kernel/lib/crc16.ko\n\
                    kernel/drivers/block/xen-blkfront.ko:\n";
        let modules = Modules {
            dir: Path::new("/nowhere"),
            busybox: None,
            dependencies: parse_dependencies(text),
            built_in: HashSet::from(["virtio_pci".to_owned()]),
        };
        assert_eq!(
            modules.in_order(&["virtio-pci", "jbd2", "ext4", "xen_blkfront"]).unwrap(),
            [
                "kernel/lib/crc16.ko",
                "kernel/fs/jbd2/jbd2.ko",
                "kernel/fs/mbcache.ko",
                "kernel/fs/ext4/ext4.ko",
                "kernel/drivers/block/xen-blkfront.ko"
            ]
        );
        assert!(modules.in_order(&["no_such"]).is_err());
    }

    #[test]
    fn a_compressed_module_has_the_name_that_it_has_unpacked() {
        let found = parse_dependencies("kernel/fs/ext4/ext4.ko.xz: kernel/fs/mbcache.ko.xz\n");
        assert_eq!(found["ext4"].0, "kernel/fs/ext4/ext4.ko.xz");
        assert_eq!(file_name("kernel/fs/ext4/ext4.ko.xz"), "ext4.ko");
    }
}
