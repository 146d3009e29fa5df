//! `cargo xtask setup`: the packages that building and trying need.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::step::{run as run_program, step};

/// Install the packages that the other commands need.
#[derive(clap::Args)]
pub struct Args {
    /// Say what is missing and install nothing
    #[arg(long)]
    dry_run: bool,
}

/// Debian packages, with why each is needed.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "C shim of the kernel module, C parts of crates"),
    ("make", "Kbuild"),
    ("pkg-config", "finds C libraries"),
    ("libelf-dev", "libbpf-rs"),
    ("zlib1g-dev", "libbpf-rs"),
    ("libxen-dev", "xenctrl"),
    ("libclang-dev", "bindgen, for xenctrl"),
    ("mmdebstrap", "roots of the lab's machines"),
    ("qemu-system-x86", "the lab's machines"),
    ("qemu-utils", "disk images"),
    ("e2fsprogs", "file systems of the lab"),
    ("xfsprogs", "file systems of the tests"),
    ("fdisk", "partitions of the lab's disk"),
    ("cpio", "initramfs images"),
    ("zstd", "frozen labs"),
    ("kmod", "module dependencies of the lab's kernels"),
    ("iproute2", "network namespaces of the tests"),
];

/// Installs what is missing.
///
/// # Errors
/// When apt cannot install it.
pub fn run(args: &Args) -> Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        return Ok(());
    }
    for (name, why) in &missing {
        eprintln!("  missing package {name}: {why}");
    }
    if args.dry_run {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        let names: Vec<_> = missing.iter().map(|(name, _)| *name).collect();
        bail!("installing packages needs root; run: sudo apt-get install {}", names.join(" "));
    }
    step("apt-get update", || run_program(Command::new("apt-get").args(["-q", "update"])))?;
    step("apt-get install", || {
        run_program(
            Command::new("apt-get")
                .env("DEBIAN_FRONTEND", "noninteractive")
                .args(["-q", "-y", "--no-install-recommends", "install"])
                .args(missing.iter().map(|(name, _)| *name)),
        )
    })?;
    Ok(())
}

/// Installs what is missing, or says nothing.
///
/// # Errors
/// Those of [`run`].
pub fn ensure() -> Result<()> {
    run(&Args { dry_run: false })
}

fn missing() -> Result<Vec<(&'static str, &'static str)>> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(PACKAGES.iter().map(|(name, _)| *name))
        .output()
        .context("cannot start dpkg-query: Poolskip's lab is made for Debian 12")?;
    let known = String::from_utf8_lossy(&output.stdout);
    Ok(PACKAGES
        .iter()
        .copied()
        .filter(|(name, _)| !known.lines().any(|line| line == format!("{name} installed")))
        .collect())
}
