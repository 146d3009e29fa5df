//! A root with the stock MySQL server of Debian sid (older suites have none), its clients, sysbench, and what the lab's guest needs
//! beside them. The packages are only unpacked: no maintainer script runs, and the machine's own packages stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::apt::{Area, Package, unpack};
use crate::cache::{self, Key};
use crate::step::run;

/// What the root holds, with what these depend on.
const PACKAGES: &[&str] = &[
    "base-files",
    "bash",
    "coreutils",
    "libc-bin",
    // The -core packages: mysql-server itself conflicts with a library that sysbench needs.
    "mysql-server-core",
    "mysql-client-core",
    "sysbench",
    // guest-probe's libraries.
    "libelf1",
    "zlib1g",
    "libgcc-s1",
    // What the lab's guest is made of besides.
    "busybox-static",
    "iproute2",
    "procps",
];

/// The probe's own list of the builds it knows.
const CATALOGUE: &str = include_str!("../../guest-probe/catalogue.toml");

/// The directory of an unpacked root with `usr/sbin/mysqld`, `usr/bin/mysql` and `usr/bin/sysbench`, made on first use and kept in
/// the cache under the versions of all its packages. Nobody writes into it: start mysqld with a data directory elsewhere
/// (a bind mount over `var/lib/mysql` in a private mount namespace), or copy it.
///
/// # Errors
/// When the mirror cannot be reached and no root was made before, or Debian sid's mysqld is one that the probe does not know.
pub fn root() -> Result<PathBuf> {
    let resolved = Area::open("sid").and_then(|area| {
        let packages = area.resolve(PACKAGES)?;
        Ok((area, packages))
    });
    let made = resolved.and_then(|(area, packages)| {
        check_known(&packages)?;
        let list = packages.iter().map(Package::to_string).collect::<Vec<_>>().join("\n");
        let key = Key::new("mysql-root-1").with(list.as_bytes());
        cache::get_or_make("mysql-root", key, |root| make(&area, &packages, root, "/usr/sbin/mysqld"))
    });
    made.or_else(|error| match newest_cached("mysql-root-")? {
        Some(cached) => {
            eprintln!("  using {}, made before: {error:#}", cached.display());
            Ok(cached)
        }
        None => Err(error),
    })
}

/// Whether the probe has a catalogue entry for this version.
fn check_known(packages: &[Package]) -> Result<()> {
    let server = packages
        .iter()
        .find(|package| package.name == "mysql-server-core")
        .context("apt left mysql-server-core out")?;
    if CATALOGUE.contains(&format!("\"{server}\"")) {
        return Ok(());
    }
    bail!(
        "Debian sid now has {server}, which guest-probe/catalogue.toml has no entry for: the lab and the tests need one \
         (its build id, and the struct offsets of that build)"
    )
}

/// Makes a root of these packages, with what a server needs around it, and tries the server.
pub fn make(area: &Area, packages: &[Package], root: &Path, server: &str) -> Result<()> {
    let debs = match area.download(packages) {
        Ok(debs) => debs,
        // The archive keeps only the newest version of each package: ask what that is and let the caller resolve anew.
        Err(error) => {
            area.refresh()?;
            return Err(
                error.context("Debian's archive has moved on; its lists are new now, please run this again")
            );
        }
    };
    unpack(&debs, root)?;
    for dir in ["tmp", "proc", "sys", "dev", "run/mysqld", "var/lib/mysql"] {
        fs::create_dir_all(root.join(dir))?;
    }
    run(Command::new("chmod").arg("1777").arg(root.join("tmp")))?;
    for (name, minor) in [("null", 3), ("zero", 5), ("urandom", 9)] {
        let device = root.join("dev").join(name);
        if !device.exists() {
            mknod(&device, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, minor))
                .with_context(|| format!("cannot make {}: this needs root", device.display()))?;
            run(Command::new("chmod").arg("666").arg(&device))?;
        }
    }
    let list = packages.iter().map(Package::to_string).collect::<Vec<_>>().join("\n");
    fs::write(root.join("packages.txt"), list + "\n")?;
    run(Command::new("chroot").arg(root).args([server, "--version"]))?;
    Ok(())
}

/// The root that was made last under a name, if there is one.
pub fn newest_cached(start: &str) -> Result<Option<PathBuf>> {
    let mut newest = None;
    for entry in fs::read_dir(cache::dir()?)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(start) && !name.contains('.') && entry.path().join("packages.txt").exists() {
            let made = entry.metadata()?.modified()?;
            if newest.as_ref().is_none_or(|(when, _)| made > *when) {
                newest = Some((made, entry.path()));
            }
        }
    }
    Ok(newest.map(|(_, path)| path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(version: &str) -> Vec<Package> {
        vec![Package { name: "mysql-server-core".into(), version: version.into() }]
    }

    #[test]
    fn a_server_that_the_probe_does_not_know_is_named() {
        let error = check_known(&server("99.0.0-1")).unwrap_err().to_string();
        assert!(error.contains("mysql-server-core 99.0.0-1") && error.contains("catalogue.toml"), "{error}");
        assert!(check_known(&[]).is_err());
    }

    #[test]
    fn the_catalogue_s_own_server_is_known() {
        check_known(&server("9.7.4-2")).unwrap();
    }
}
