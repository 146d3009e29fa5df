//! A root with the stock MariaDB server of Debian 12, made as the one with MySQL is: guest-probe's doctor is tried on it.

use std::path::PathBuf;

use anyhow::Result;

use crate::apt::{Area, Package};
use crate::cache::{self, Key};
use crate::mysql;

/// The suite whose MariaDB is 10.11.
const SUITE: &str = "bookworm";

/// What the root holds, with what these depend on.
const PACKAGES: &[&str] =
    &["base-files", "bash", "coreutils", "libc-bin", "sed", "mariadb-server-core", "mariadb-client-core"];

/// The directory of an unpacked root with `usr/sbin/mariadbd` and `usr/bin/mariadb`, made on first use and kept in the cache. Nobody
/// writes into it.
///
/// # Errors
/// When the mirror cannot be reached and no root was made before.
pub fn root() -> Result<PathBuf> {
    let made = Area::open(SUITE).and_then(|area| {
        let packages = area.resolve(PACKAGES)?;
        let list = packages.iter().map(Package::to_string).collect::<Vec<_>>().join("\n");
        let key = Key::new("mariadb-root-1").with(list.as_bytes());
        cache::get_or_make("mariadb-root", key, |root| {
            mysql::make(&area, &packages, root, "/usr/sbin/mariadbd")
        })
    });
    made.or_else(|error| match mysql::newest_cached("mariadb-root-")? {
        Some(cached) => {
            eprintln!("  using {}, made before: {error:#}", cached.display());
            Ok(cached)
        }
        None => Err(error),
    })
}
