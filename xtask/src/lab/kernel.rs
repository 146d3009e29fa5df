//! The kernel that the guest and both dom0s run, and the headers that a module for it is built against.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::dom0::SUITE;
use crate::apt::{Area, Package, unpack};
use crate::cache::{self, Key};

/// `uname -r` of the guest.
///
/// # Errors
/// When the mirror cannot be asked, and never was.
pub fn guest_kernel_release() -> Result<String> {
    release(&Area::open(SUITE)?)
}

/// A directory with `usr/src/linux-headers-RELEASE` for `make -C`, usable where it lies: nothing is installed.
///
/// # Errors
/// When the mirror cannot be reached and nothing was fetched before.
pub fn kernel_headers() -> Result<PathBuf> {
    let area = Area::open(SUITE)?;
    let release = release(&area)?;
    let packages: Vec<Package> = area
        .resolve(&[&format!("linux-headers-{release}")])?
        .into_iter()
        .filter(|package| {
            ["linux-headers-", "linux-kbuild-"].iter().any(|start| package.name.starts_with(start))
        })
        .collect();
    let list = packages.iter().map(Package::to_string).collect::<Vec<_>>().join("\n");
    let key = Key::new("kernel-headers-1").with(list.as_bytes());
    cache::get_or_make("kernel-headers", key, |root| {
        unpack(&area.download(&packages)?, root)?;
        relocate(root, &release)
    })
}

/// The release of the kernel that the suite's metapackage stands for.
fn release(area: &Area) -> Result<String> {
    area.resolve(&["linux-image-amd64"])?
        .iter()
        .find_map(|package| release_of(&package.name))
        .with_context(|| format!("linux-image-amd64 of Debian {SUITE} depends on no kernel"))
}

/// `linux-image-6.1.0-1-amd64` -> `6.1.0-1-amd64`; not the metapackage.
pub(super) fn release_of(package: &str) -> Option<String> {
    let rest = package.strip_prefix("linux-image-")?;
    rest.starts_with(|c: char| c.is_ascii_digit()).then(|| rest.to_owned())
}

/// The packages name each other by absolute paths; make these relative.
fn relocate(root: &Path, release: &str) -> Result<()> {
    let common = format!("linux-headers-{}-common", release.trim_end_matches("-amd64"));
    let makefile = root.join(format!("usr/src/linux-headers-{release}/Makefile"));
    fs::write(
        &makefile,
        format!("include $(dir $(realpath $(lastword $(MAKEFILE_LIST))))../{common}/Makefile\n"),
    )
    .with_context(|| format!("cannot write {}", makefile.display()))?;
    for (name, to) in [("build", format!("linux-headers-{release}")), ("source", common)] {
        let link = root.join("lib/modules").join(release).join(name);
        fs::remove_file(&link).with_context(|| format!("no link at {}", link.display()))?;
        symlink(Path::new("../../../../usr/src").join(to), &link)?;
    }
    Ok(())
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
}
