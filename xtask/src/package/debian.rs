//! A Debian package, of a tree that is laid out here; dpkg-deb only puts it together.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::contents::{Places, Role, contents};
use super::tree::Tree;
use super::{VERSION, gzip};
use crate::step::run;

/// Who answers for the packages.
const MAINTAINER: &str = "Poolskip Developers <developers@poolskip.invalid>";

/// The packages' architecture; the programs are for no other.
const ARCHITECTURE: &str = "amd64";

/// Scripts of each package, by the names that dpkg has for them.
const GUEST_SCRIPTS: [(&str, &str); 3] = [
    ("postinst", include_str!("files/poolskip-guest.postinst")),
    ("prerm", include_str!("files/poolskip-guest.prerm")),
    ("postrm", include_str!("files/poolskip-guest.postrm")),
];
const DOM0_SCRIPTS: [(&str, &str); 3] = [
    ("postinst", include_str!("files/poolskip-dom0.postinst")),
    ("prerm", include_str!("files/poolskip-dom0.prerm")),
    ("postrm", include_str!("files/poolskip-dom0.postrm")),
];

/// What lintian says of the packages, and why it may.
const GUEST_OVERRIDES: &str = include_str!("files/poolskip-guest.lintian-overrides");
const DOM0_OVERRIDES: &str = include_str!("files/poolskip-dom0.lintian-overrides");

/// Name of a role's package file.
pub fn file_name(role: Role) -> String {
    format!("{}_{VERSION}_{ARCHITECTURE}.deb", role.package())
}

/// Builds a role's package into a directory; its file.
///
/// # Errors
/// When a file is missing, or dpkg-deb fails.
pub fn build(role: Role, program: &Path, out: &Path, epoch: u64) -> Result<PathBuf> {
    let package = role.package();
    let mut tree = contents(role, Places::Debian, program)?;
    let overrides = if role == Role::Guest { GUEST_OVERRIDES } else { DOM0_OVERRIDES };
    tree.file(format!("usr/share/lintian/overrides/{package}"), 0o644, overrides);
    tree.file(format!("usr/share/doc/{package}/copyright"), 0o644, &include_bytes!("files/copyright")[..]);
    tree.file(
        format!("usr/share/doc/{package}/changelog.gz"),
        0o644,
        gzip(changelog(&date(epoch)?).as_bytes())?,
    );
    let size = installed_kib(&tree);
    let mut control = Tree::default();
    control.file("DEBIAN/control", 0o644, describe(role, &depends(role, program)?, size));
    let conffiles: String = tree
        .files()
        .filter(|(path, _)| path.starts_with("etc/"))
        .map(|(path, _)| format!("/{path}\n"))
        .collect();
    control.file("DEBIAN/conffiles", 0o644, conffiles);
    control.file("DEBIAN/md5sums", 0o644, md5sums(&tree)?);
    for (name, text) in if role == Role::Guest { GUEST_SCRIPTS } else { DOM0_SCRIPTS } {
        control.file(format!("DEBIAN/{name}"), 0o755, text.replace("@VERSION@", VERSION));
    }
    let work = tempfile::tempdir()?;
    let laid = work.path().join(package);
    fs::create_dir(&laid)?;
    // DEBIAN first: the directory above has the time of its last change.
    control.write(&laid, epoch)?;
    tree.write(&laid, epoch)?;
    let file = out.join(file_name(role));
    run(Command::new("dpkg-deb")
        // One thread: xz's blocks depend on their number.
        .args(["--root-owner-group", "--threads-max=1", "-Zxz", "--build"])
        .env("SOURCE_DATE_EPOCH", epoch.to_string())
        .arg(&laid)
        .arg(&file))?;
    Ok(file)
}

/// What dpkg says that the files take: each in KiB, rounded up, and one for each directory (`Installed-Size` in the policy).
fn installed_kib(tree: &Tree) -> u64 {
    tree.files().map(|(_, bytes)| (bytes.len() as u64).div_ceil(1024)).sum::<u64>() + 16
}

fn describe(role: Role, depends: &str, size: u64) -> String {
    let package = role.package();
    let (section, more, description) = match role {
        Role::Guest => (
            "database",
            "Recommends: linux-headers-amd64\n",
            "tells a Xen host what the buffer pool of mysqld holds\n \
             Poolskip live-migrates a Xen guest that runs a big-memory MySQL without sending\n \
             the buffer pool: most of it is a cache of pages that also lie on storage which\n \
             both hosts share.\n .\n \
             This is the guest's side: guest-probe, which probes the running mysqld by eBPF,\n \
             and the sources of a kernel module by which it tells dom0, for DKMS. mysqld is\n \
             neither restarted nor configured.\n",
        ),
        Role::Dom0 => (
            "admin",
            "Recommends: openssh-client\n",
            "live migration of Xen guests without their buffer pools\n \
             Poolskip live-migrates a Xen guest that runs a big-memory MySQL without sending\n \
             the buffer pool: most of it is a cache of pages that also lie on storage which\n \
             both hosts share.\n .\n \
             This is the host's side: dom0-migrator, which stands in the place of libxl's\n \
             save helper, and the service that receives domains. Xen and its toolstack stay\n \
             as they are.\n",
        ),
    };
    format!(
        "Package: {package}\nSource: poolskip\nVersion: {VERSION}\nArchitecture: {ARCHITECTURE}\nMaintainer: {MAINTAINER}\n\
         Installed-Size: {size}\nDepends: {depends}\n{more}Section: {section}\nPriority: optional\n\
         Description: {description}"
    )
}

/// What a package needs: the libraries that its program is linked with, as their packages say, and what it calls.
fn depends(role: Role, program: &Path) -> Result<String> {
    let work = tempfile::tempdir()?;
    // dpkg-shlibdeps wants to be in a package's sources.
    fs::create_dir(work.path().join("debian"))?;
    fs::write(
        work.path().join("debian/control"),
        "Source: poolskip\n\nPackage: poolskip\nArchitecture: any\n",
    )?;
    let words = run(Command::new("dpkg-shlibdeps").arg("-O").arg(program).current_dir(work.path()))
        .context("which libraries' packages does it need?")?;
    let words = String::from_utf8_lossy(&words).into_owned();
    let Some(libraries) = words.lines().find_map(|line| line.strip_prefix("shlibs:Depends=")) else {
        bail!("dpkg-shlibdeps says {words:?}");
    };
    let called = match role {
        Role::Guest => "dkms, kmod",
        // xl; the libraries of the release that runs come with xen-utils.
        Role::Dom0 => "xen-utils-common",
    };
    Ok(format!("{libraries}, {called}"))
}

fn md5sums(tree: &Tree) -> Result<String> {
    let work = tempfile::tempdir()?;
    tree.write(work.path(), 0)?;
    let paths = tree.files().map(|(path, _)| path).filter(|path| !path.starts_with("etc/"));
    let words = run(Command::new("md5sum").current_dir(work.path()).args(paths))?;
    Ok(String::from_utf8(words)?)
}

/// As the changelog has it.
fn date(epoch: u64) -> Result<String> {
    let words = run(Command::new("date").env("LC_ALL", "C").args([
        "--utc",
        "--rfc-email",
        &format!("--date=@{epoch}"),
    ]))?;
    Ok(String::from_utf8(words)?.trim().to_owned())
}

fn changelog(date: &str) -> String {
    format!(
        "poolskip ({VERSION}) unstable; urgency=medium\n\n  * Release {VERSION}.\n\n -- {MAINTAINER}  {date}\n"
    )
}
