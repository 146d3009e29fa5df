//! Debian's kernels: the one that the guest and both dom0s run, and those of other suites that the module must work on. Each comes
//! with a root of its own suite, in which a module for it can be built with that suite's compiler.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::Flavour;
use super::modules::Modules;
use crate::apt::{Area, Package, unpack};
use crate::cache::{self, Key};
use crate::step::{line_of, run};

/// What a guest needs to build a module, beside its kernel's headers (which depend on the compiler that built the kernel): DKMS with
/// all that it calls, and what dpkg takes for granted.
const PACKAGES: &[&str] = &[
    "base-files",
    "bash",
    "coreutils",
    "dash",
    "diffutils",
    "dkms",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "kmod",
    "make",
    "mawk",
    "patch",
    "sed",
    "tar",
    "util-linux",
    "xz-utils",
];

/// Modules that are kept beside the image of the lab's kernel: disks under plain QEMU, volumes of the device mapper, ext4.
const KEPT_MODULES: &[&str] = &["virtio_pci", "virtio_blk", "dm_mod", "crc32c_generic", "ext4"];

/// Directory of a root over which each run has a directory of its own.
pub const WORK: &str = "mnt";

/// Where modules are kept beside an image.
const MODULES: &str = "modules";

/// Debian's kernel of one suite.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The suite.
    pub suite: &'static str,
    /// Its `uname -r`.
    pub release: String,
    /// Unpacked packages: `lib/modules/RELEASE/build` is there, a compiler, make and DKMS; no Rust. Not written to.
    root: PathBuf,
}

impl Kernel {
    /// The newest kernel of a suite, with its root; fetched on first use and kept in the cache under the versions of all packages.
    ///
    /// # Errors
    /// When the mirror cannot be reached and nothing was fetched before.
    pub fn of(suite: &'static str) -> Result<Self> {
        let area = Area::open(suite)?;
        Self::in_area(&area, suite).or_else(|_| {
            // The archive keeps only the newest version of each package.
            area.refresh()?;
            Self::in_area(&area, suite)
        })
    }

    fn in_area(area: &Area, suite: &'static str) -> Result<Self> {
        let release = release(area, suite)?;
        let headers = format!("linux-headers-{release}");
        let wanted = [PACKAGES, &[&headers]].concat();
        // Some suites' DKMS wants a kernel as well.
        let packages: Vec<Package> =
            area.resolve(&wanted)?.into_iter().filter(|package| !is_kernel(&package.name)).collect();
        let list = packages.iter().map(Package::to_string).collect::<Vec<_>>().join("\n");
        let root =
            cache::get_or_make("kernel-root", Key::new("kernel-root-2").with(list.as_bytes()), |root| {
                unpack(&area.download(&packages)?, root)?;
                complete(root)
            })?;
        Ok(Self { suite, release, root })
    }

    /// What tells this kernel and its tools from others: the root's name in the cache.
    pub fn identity(&self) -> String {
        self.root.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// `lib/modules/RELEASE/build` as a path inside the root.
    pub fn build_directory(&self) -> String {
        format!("/lib/modules/{}/build", self.release)
    }

    /// The kernel's image, as Debian's packages have it.
    ///
    /// # Errors
    /// When the mirror cannot be reached and it was not fetched before.
    pub fn image(&self) -> Result<PathBuf> {
        Ok(self.image_directory()?.join("vmlinuz"))
    }

    /// A directory with modules for disks and volumes, and a file `order` that names them in the order in which they can be loaded; of the
    /// lab's own suite only, whose modules are not compressed.
    ///
    /// # Errors
    /// Those of [`Self::image`], and when this is another suite's kernel.
    pub fn modules(&self) -> Result<PathBuf> {
        let kept = Flavour::default().suite();
        ensure!(self.suite == kept, "modules are kept of Debian {kept}'s kernel alone");
        Ok(self.image_directory()?.join(MODULES))
    }

    fn image_directory(&self) -> Result<PathBuf> {
        let area = Area::open(self.suite)?;
        let name = format!("linux-image-{}", self.release);
        let packages: Vec<Package> =
            area.resolve(&[&name])?.into_iter().filter(|package| is_kernel(&package.name)).collect();
        let mut key = Key::new("kernel-image-3").with(KEPT_MODULES.join(" ").as_bytes());
        for package in &packages {
            key = key.with(package.to_string().as_bytes());
        }
        cache::get_or_make("kernel-image", key, |dir| {
            let root = dir.join("root");
            unpack(&area.download(&packages)?, &root)?;
            if self.suite == Flavour::default().suite() {
                // Of this kernel's own suite, and with nothing of what it looks at unpacked elsewhere.
                self.run_inside(&root, &["depmod", "-b", &format!("/{WORK}"), &self.release])?;
                let from = root.join("lib/modules").join(&self.release);
                Modules::known(&from)?.copy_all(KEPT_MODULES, &dir.join(MODULES))?;
            }
            // Debian moved it from the one place to the other.
            let places = [
                format!("boot/vmlinuz-{}", self.release),
                format!("usr/lib/modules/{}/vmlinuz", self.release),
            ];
            let place = places.iter().map(|place| root.join(place)).find(|place| place.exists());
            let place =
                place.with_context(|| format!("no image in {name}, looked for {}", places.join(", ")))?;
            fs::rename(place, dir.join("vmlinuz"))?;
            Ok(fs::remove_dir_all(&root)?)
        })
    }

    /// Runs a program in the root, with `work` as [`WORK`], its only writable place, and without anything of this machine's
    /// environment; returns what it printed, on both outputs.
    ///
    /// # Errors
    /// When this is not run by root, or the program does not exit with 0; the message has all that it printed.
    pub fn run_inside(&self, work: &Path, program: &[&str]) -> Result<String> {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "/bin/sh", "-ec", INSIDE, "sh"])
            .arg(&self.root)
            .arg(work)
            .args(program);
        let line =
            line_of(Command::new(program.first().unwrap_or(&"")).args(program.get(1..).unwrap_or(&[])));
        let Output { status, stdout, stderr } =
            command.output().context("cannot start unshare (package util-linux)")?;
        let words = [stdout, stderr].concat();
        let words = String::from_utf8_lossy(&words).into_owned();
        if !status.success() {
            bail!("`{line}` ended with {status} in Debian {}'s root:\n{words}", self.suite);
        }
        Ok(words)
    }
}

/// Root, work, program: the mounts are of a namespace that ends with the program.
const INSIDE: &str = "root=$1 work=$2; shift 2
mount --bind \"$root\" \"$root\"
mount -o remount,bind,ro \"$root\"
mount --rbind /proc \"$root/proc\"
mount --bind \"$work\" \"$root/mnt\"
mount -t tmpfs none \"$root/tmp\"
exec chroot \"$root\" /usr/bin/env -i PATH=/usr/sbin:/usr/bin HOME=/tmp LC_ALL=C \"$@\"";

/// The release of the kernel that the suite's metapackage stands for.
fn release(area: &Area, suite: &str) -> Result<String> {
    area.resolve(&["linux-image-amd64"])?
        .iter()
        .find_map(|package| release_of(&package.name))
        .with_context(|| format!("linux-image-amd64 of Debian {suite} depends on no kernel"))
}

/// `linux-image-6.1.0-1-amd64` -> `6.1.0-1-amd64`; not the metapackage.
pub(super) fn release_of(package: &str) -> Option<String> {
    let rest = package.strip_prefix("linux-image-")?;
    rest.starts_with(|c: char| c.is_ascii_digit()).then(|| rest.to_owned())
}

/// Whether a package is a kernel's image, which newer suites have in two parts.
fn is_kernel(package: &str) -> bool {
    let rest = package.strip_prefix("linux-binary-").map(str::to_owned).or_else(|| release_of(package));
    rest.is_some() || package.starts_with("linux-modules-")
}

/// What maintainer scripts would have made.
fn complete(root: &Path) -> Result<()> {
    for dir in ["dev", "proc", "tmp", WORK] {
        fs::create_dir_all(root.join(dir))?;
    }
    symlink("mawk", root.join("usr/bin/awk")).context("the suite's packages have an awk already")?;
    symlink("/proc/self/fd", root.join("dev/fd"))?;
    let null = root.join("dev/null");
    mknod(&null, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3))
        .with_context(|| format!("cannot make {}: this needs root", null.display()))?;
    run(Command::new("chmod").arg("666").arg(&null)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_package_names_its_release_and_the_metapackage_does_not() {
        assert_eq!(release_of("linux-image-6.1.0-1-amd64").as_deref(), Some("6.1.0-1-amd64"));
        assert_eq!(release_of("linux-image-amd64"), None);
        assert_eq!(release_of("linux-headers-6.1.0-1-amd64"), None);
    }

    #[test]
    fn an_image_may_come_in_parts() {
        for name in ["linux-image-7.0-amd64", "linux-binary-7.0-amd64", "linux-modules-7.0-amd64"] {
            assert!(is_kernel(name), "{name}");
        }
        for name in ["linux-image-amd64", "linux-headers-7.0-amd64", "linux-base", "linux-kbuild-7.0"] {
            assert!(!is_kernel(name), "{name}");
        }
    }
}
