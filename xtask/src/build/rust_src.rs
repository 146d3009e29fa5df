//! Sources of Rust's own `core` and `alloc`, which the kernel module and the eBPF programs are compiled with.
//!
//! rustup's component `rust-src` where it is installed; else Debian's package of the same release, unpacked in the cache.
//! Debian keeps only its newest version of a package, so a release that has gone by cannot be had there any more: then the error
//! says what to install. What is built with these sources is kept in the tree, so only a change of it needs them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::step::run;

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
    let mirror = debian_mirror()?;
    let apt_dir = dir.join("apt");
    fs::create_dir_all(apt_dir.join("lists/partial"))?;
    fs::create_dir_all(apt_dir.join("cache/archives/partial"))?;
    let sources: String = ["forky", "sid"]
        .iter()
        .map(|suite| {
            format!("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} {suite} main\n")
        })
        .collect();
    fs::write(apt_dir.join("sources.list"), sources)?;
    let apt = |program: &str| {
        let mut command = Command::new(program);
        command
            .current_dir(&apt_dir)
            .arg(format!("-oDir::State::Lists={}", apt_dir.join("lists").display()))
            .arg(format!("-oDir::Cache={}", apt_dir.join("cache").display()))
            .arg(format!("-oDir::Etc::SourceList={}", apt_dir.join("sources.list").display()))
            .args(["-oDir::Etc::SourceParts=/dev/null", "-oAcquire::Check-Valid-Until=false"])
            .args(["-oAcquire::Languages=none", "-oAPT::Sandbox::User=root"]);
        command
    };
    run(apt("apt-get").args(["-q", "update"]))?;
    let known = run(apt("apt-cache").args(["madison", "rust-src"]))?;
    let known = String::from_utf8_lossy(&known).into_owned();
    let versions: Vec<&str> =
        known.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim).collect();
    let Some(version) = versions.iter().find(|version| version.starts_with(&format!("{release}."))) else {
        bail!(
            "no Rust sources for {toolchain} ({release}): the toolchain has no rust-src component, and Debian has only {}; \
             run `rustup component add rust-src --toolchain {toolchain}`, or set POOLSKIP_NIGHTLY to a toolchain that has it",
            versions.join(", ")
        );
    };
    run(apt("apt-get").args(["-q", "download", &format!("rust-src={version}")]))?;
    let package = fs::read_dir(&apt_dir)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get download left no rust-src package")?;
    run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(dir.join("package")))?;
    let sources = dir.join("package/usr/src");
    let library = fs::read_dir(&sources)?
        .filter_map(Result::ok)
        .map(|entry| entry.path().join("library"))
        .find(|path| path.join("core/src/lib.rs").exists())
        .with_context(|| format!("no usr/src/rustc-*/library in {}", package.display()))?;
    fs::rename(&library, dir.join("library"))?;
    fs::remove_dir_all(dir.join("package"))?;
    fs::remove_dir_all(&apt_dir)?;
    Ok(())
}

/// The Debian mirror that this machine already uses.
fn debian_mirror() -> Result<String> {
    let format = "$(REPO_URI) $(ORIGIN) $(LABEL) $(CODENAME) $(COMPONENT)";
    let output = run(Command::new("apt-get").args(["indextargets", "--format", format]))?;
    String::from_utf8_lossy(&output)
        .lines()
        .find_map(|line| {
            let mut words = line.split(' ');
            let uri = words.next()?;
            let rest: Vec<&str> = words.collect();
            matches!(rest[..], ["Debian", "Debian", codename, "main"] if !codename.contains('-'))
                .then(|| uri.to_owned())
        })
        .context("apt knows no mirror of Debian's main archive (see /etc/apt/sources.list)")
}
