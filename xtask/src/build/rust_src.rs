//! Sources of Rust's own `core` and `alloc`, which the kernel module and the eBPF programs are compiled with.
//!
//! rustup's component `rust-src` where it is installed; else Debian's package of the same release, unpacked in the cache.
//! Debian keeps only its newest version of a package, so a release that has gone by cannot be had there any more: then the error
//! says what to install. What is built with these sources is kept in the tree, so only a change of it needs them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::{Area, Package, unpack};
use crate::cache;
use crate::step::run;

/// Debian releases that may have the sources of a recent nightly.
const SUITES: [&str; 2] = ["forky", "sid"];

/// The toolchain that builds the kernel module's core and the eBPF programs: `$POOLSKIP_NIGHTLY`, else `nightly`.
pub fn toolchain() -> String {
    std::env::var("POOLSKIP_NIGHTLY").unwrap_or_else(|_| "nightly".to_owned())
}

/// The directory `library` of Rust's sources, usable with [`toolchain`]; downloaded at the first call if it has to be.
///
/// # Errors
/// When the toolchain is not installed, or no sources of its release can be had.
pub fn library_dir() -> Result<PathBuf> {
    let toolchain = toolchain();
    let output = run(Command::new("rustc").arg(format!("+{toolchain}")).args(["--print", "sysroot"]))
        .with_context(|| {
            format!("the toolchain {toolchain} is needed: `rustup toolchain install nightly`")
        })?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output).trim());
    let component = sysroot.join("lib/rustlib/src/rust/library");
    if component.join("core/src/lib.rs").exists() {
        return Ok(component);
    }
    let release = release(&toolchain)?;
    let key = cache::Key::new("rust-src 1").with(release.as_bytes());
    let made = cache::get_or_make("rust-src", key, |dir| from_debian(dir, &toolchain, &release))?;
    Ok(made.join("library"))
}

/// `1.97` of `rustc 1.97.0-nightly (…)`: sources of another minor release do not compile with it.
fn release(toolchain: &str) -> Result<String> {
    let output = run(Command::new("rustc").arg(format!("+{toolchain}")).arg("--version"))?;
    let words = String::from_utf8_lossy(&output).into_owned();
    let mut numbers = words.split_whitespace().nth(1).unwrap_or_default().split('.');
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => Ok(format!("{major}.{minor}")),
        _ => bail!("rustc +{toolchain} --version says {words:?}, which names no release"),
    }
}

/// Unpacks Debian's `rust-src` of that release into `dir/library`.
fn from_debian(dir: &Path, toolchain: &str, release: &str) -> Result<()> {
    let mut found = Vec::new();
    for suite in SUITES {
        let area = Area::open(suite)?;
        let package = area.resolve(&["rust-src"])?.into_iter().find(|package| package.name == "rust-src");
        let package = package.with_context(|| format!("Debian {suite} has no rust-src"))?;
        if package.version.starts_with(&format!("{release}.")) {
            return unpack_library(&area, &package, dir);
        }
        found.push(format!("{} in {suite}", package.version));
    }
    bail!(
        "no Rust sources for {toolchain} ({release}): the toolchain has no rust-src component, and Debian has only {}; \
         run `rustup component add rust-src --toolchain {toolchain}`, or set POOLSKIP_NIGHTLY to a toolchain that has it",
        found.join(", ")
    );
}

fn unpack_library(area: &Area, package: &Package, dir: &Path) -> Result<()> {
    let root = dir.join("package");
    unpack(&area.download(std::slice::from_ref(package))?, &root)?;
    let library = fs::read_dir(root.join("usr/src"))?
        .filter_map(Result::ok)
        .map(|entry| entry.path().join("library"))
        .find(|path| path.join("core/src/lib.rs").exists())
        .with_context(|| format!("{package} has no usr/src/rustc-*/library"))?;
    fs::rename(&library, dir.join("library"))?;
    Ok(fs::remove_dir_all(&root)?)
}
