//! `cargo xtask setup`: the packages that building and trying need.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::debian_mirror;
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
    ("g++", "libFuzzer, for `cargo xtask fuzz`"),
    ("make", "Kbuild"),
    ("pkg-config", "finds C libraries"),
    ("libelf-dev", "libbpf-rs"),
    ("zlib1g-dev", "libbpf-rs"),
    ("libxen-dev", "Xen's libraries, which tests of dom0-migrator open, and headers for the xenctrl crate"),
    ("libclang-dev", "reads those headers"),
    ("qemu-system-x86", "the lab's machines"),
    ("qemu-utils", "disk images"),
    ("e2fsprogs", "file systems of the lab and of the tests"),
    ("xfsprogs", "file systems of the tests"),
    ("dmsetup", "volumes that the storage map is tried on"),
    ("fdisk", "partitions of the lab's disk"),
    ("systemd", "its `systemd-analyze` looks at the probe's unit"),
    ("chromium", "a test looks at the page that `dom0-migrator report` makes"),
    ("fio", "what a disk can do, for `bench reload`"),
    ("dpkg-dev", "which libraries' packages a program needs, for `package`"),
    ("lintian", "what Debian's policy says of the packages"),
    ("man-db", "renders the man pages"),
    ("mmdebstrap", "a Debian system in a directory, in which packages are installed"),
    ("openssh-client", "`deploy`"),
    ("openssl", "a key to try the kernel module's signature with"),
];

/// Packages of which a Debian release may have versions that are too old; its backports then have newer ones. The lab keeps the state
/// of its machines in files, which QEMU can since 8.2.
const BACKPORTED: &[&str] = &["qemu-system-x86", "qemu-utils"];

/// The oldest version of these that will do.
const BACKPORTED_FROM: &str = "1:8.2";

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
    let (backported, plain): (Vec<&str>, Vec<&str>) =
        missing.iter().map(|(name, _)| *name).partition(|name| BACKPORTED.contains(name));
    if !plain.is_empty() {
        step("apt-get install", || run_program(install(Command::new("apt-get")).args(&plain)))?;
    }
    if !backported.is_empty() {
        step("apt-get install", || install_backported(&backported))?;
    }
    Ok(())
}

/// Installs packages from this machine's sources if these have a version that will do, else from the backports of its release on the
/// same mirror: through package lists of our own, so that its sources stay as they are.
fn install_backported(names: &[&str]) -> Result<()> {
    let words = run_program(Command::new("apt-cache").args(["policy", names[0]]))?;
    if candidate(&String::from_utf8_lossy(&words)).is_some_and(|version| will_do(&version)) {
        return run_program(install(Command::new("apt-get")).args(names)).map(drop);
    }
    let release = fs::read_to_string("/etc/os-release").context("this is no Debian machine")?;
    let codename = codename(&release).context("/etc/os-release names no VERSION_CODENAME")?;
    let own = tempfile::tempdir()?;
    let parts = own.path().join("sources.list.d");
    fs::create_dir_all(&parts)?;
    fs::create_dir_all(own.path().join("lists/partial"))?;
    for entry in fs::read_dir("/etc/apt/sources.list.d")? {
        let entry = entry?;
        fs::copy(entry.path(), parts.join(entry.file_name()))?;
    }
    let line = format!("deb {} {codename}-backports main\n", debian_mirror()?);
    fs::write(parts.join("poolskip-backports.list"), line)?;
    let apt = |directory: &Path| {
        let mut command = Command::new("apt-get");
        command.arg(format!("-oDir::State::Lists={}/lists", directory.display()));
        command.arg(format!("-oDir::Etc::SourceParts={}/sources.list.d", directory.display()));
        command.arg("-oAPT::Sandbox::User=root");
        command
    };
    run_program(apt(own.path()).args(["-q", "update"]))?;
    let target = format!("--target-release={codename}-backports");
    run_program(install(apt(own.path())).arg(target).args(names)).map(drop)
}

fn install(mut apt_get: Command) -> Command {
    apt_get.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-y", "--no-install-recommends", "install"]);
    apt_get
}

/// Whether a version of QEMU's packages is new enough.
fn will_do(version: &str) -> bool {
    Command::new("dpkg")
        .args(["--compare-versions", version, "ge", BACKPORTED_FROM])
        .status()
        .is_ok_and(|status| status.success())
}

/// The version that `apt-cache policy` would install.
fn candidate(policy: &str) -> Option<String> {
    policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: ")).map(str::to_owned)
}

fn codename(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim_matches('"').to_owned())
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
        .args(["-W", "-f", "${Package} ${db:Status-Status} ${Version}\n"])
        .args(PACKAGES.iter().map(|(name, _)| *name))
        .output()
        .context("cannot start dpkg-query: Poolskip's lab is made for Debian 12")?;
    let known = String::from_utf8_lossy(&output.stdout);
    Ok(PACKAGES.iter().copied().filter(|(name, _)| !known.lines().any(|line| is_there(name, line))).collect())
}

/// Whether a line `NAME STATUS VERSION` of dpkg-query says that a package is installed in a version that will do.
fn is_there(name: &str, line: &str) -> bool {
    let mut fields = line.split(' ');
    (fields.next(), fields.next()) == (Some(name), Some("installed"))
        && (!BACKPORTED.contains(&name) || fields.next().is_some_and(will_do))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_emulator_counts_as_missing() {
        assert!(is_there("make", "make installed 4.3-4.1"));
        assert!(!is_there("make", "make not-installed "));
        assert!(is_there("qemu-utils", "qemu-utils installed 1:10.0.2+ds-2"));
        assert!(!is_there("qemu-utils", "qemu-utils installed 1:7.2+dfsg-7"));
    }

    #[test]
    fn candidate_and_codename_are_read() {
        assert_eq!(candidate("a:\n  Installed: (none)\n  Candidate: 1:2.3\n").as_deref(), Some("1:2.3"));
        assert_eq!(codename("ID=debian\nVERSION_CODENAME=\"x\"\n").as_deref(), Some("x"));
        assert_eq!(codename("ID=debian\n"), None);
    }
}
