//! `cargo xtask package`: what an operator installs, into `target/package`.
//!
//! Two Debian packages, one for guests and one for hosts, and a tarball with `install.sh` for other systems. The same sources, built at
//! the same path by the same toolchain, give the same bytes: times are those of `SOURCE_DATE_EPOCH`, or else of the last commit.

pub mod contents;
mod debian;
mod tarball;
mod tree;
pub mod trial;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::build::{ebpf, module};
use crate::deployment::{self, target_directory};
use crate::step::{run as run_program, step};
use contents::Role;

/// Version of all packages.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Build the Debian packages poolskip-guest and poolskip-dom0, and a tarball with install.sh.
#[derive(clap::Args)]
pub struct Args {
    /// Where to write [default: target/package]
    #[arg(long, value_name = "DIRECTORY")]
    out: Option<PathBuf>,
}

/// Builds, and says what was written.
///
/// # Errors
/// When something does not compile, or a tool is missing.
pub fn run(args: &Args) -> Result<()> {
    crate::setup::ensure()?;
    let programs = Programs::build()?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => target_directory()?.join("package"),
    };
    let made = make(&programs, &out, epoch()?)?;
    for file in &made.all() {
        println!("{}  {} bytes", file.display(), fs::metadata(file)?.len());
    }
    Ok(())
}

/// The two programs, built for release, without debug information.
pub struct Programs {
    probe: PathBuf,
    migrator: PathBuf,
}

impl Programs {
    /// Builds them.
    ///
    /// # Errors
    /// When something does not compile, or a built object in the tree does not belong to its sources.
    pub fn build() -> Result<Self> {
        ebpf::check()?;
        module::check()?;
        let target = deployment::build_release()?;
        let lean = |name: &str| -> Result<PathBuf> {
            let (whole, lean) = (target.join("release").join(name), target.join(format!("{name}.packaged")));
            run_program(
                Command::new("strip")
                    .args(["--remove-section=.comment", "--remove-section=.note", "-o"])
                    .arg(&lean)
                    .arg(whole),
            )?;
            Ok(lean)
        };
        Ok(Self { probe: lean("guest-probe")?, migrator: lean("dom0-migrator")? })
    }

    fn of(&self, role: Role) -> &Path {
        match role {
            Role::Guest => &self.probe,
            Role::Dom0 => &self.migrator,
        }
    }
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Made {
    /// The packages, guest first.
    pub debs: [PathBuf; 2],
    /// The tarball.
    pub tarball: PathBuf,
    /// Their hashes, as `sha256sum --check` reads them.
    pub sums: PathBuf,
}

impl Made {
    /// Those that were made before, in a directory.
    ///
    /// # Errors
    /// When one is missing.
    pub fn find(directory: &Path) -> Result<Self> {
        let file = |name: String| {
            let path = directory.join(name);
            ensure!(path.exists(), "{} is not there: `cargo xtask package` makes it", path.display());
            Ok(path)
        };
        let deb = |role: Role| file(debian::file_name(role));
        Ok(Self {
            debs: [deb(Role::Guest)?, deb(Role::Dom0)?],
            tarball: file(tarball::file_name())?,
            sums: file("SHA256SUMS".to_owned())?,
        })
    }

    /// All files.
    pub fn all(&self) -> Vec<PathBuf> {
        self.debs.iter().chain([&self.tarball, &self.sums]).cloned().collect()
    }
}

/// Writes packages, tarball and their hashes to a directory, in place of what was there.
///
/// # Errors
/// When a file is missing or a tool fails.
pub fn make(programs: &Programs, out: &Path, epoch: u64) -> Result<Made> {
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let deb = |role| step(role_step(role), || debian::build(role, programs.of(role), out, epoch));
    let debs = [deb(Role::Guest)?, deb(Role::Dom0)?];
    let tarball = step("tarball", || tarball::build(programs, out, epoch))?;
    let mut sums = String::new();
    for file in debs.iter().chain([&tarball]) {
        let digest = crate::cache::sha256(&fs::read(file)?);
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        sums.push_str(&format!("{digest}  {name}\n"));
    }
    let sums_file = out.join("SHA256SUMS");
    fs::write(&sums_file, sums)?;
    Ok(Made { debs, tarball, sums: sums_file })
}

fn role_step(role: Role) -> &'static str {
    match role {
        Role::Guest => "package poolskip-guest",
        Role::Dom0 => "package poolskip-dom0",
    }
}

/// The time that all files have: `SOURCE_DATE_EPOCH`, or else the last commit's.
///
/// # Errors
/// When neither is to be had.
pub fn epoch() -> Result<u64> {
    if let Ok(given) = std::env::var("SOURCE_DATE_EPOCH") {
        return given.parse().with_context(|| format!("SOURCE_DATE_EPOCH is {given:?}, not seconds"));
    }
    let words = run_program(Command::new("git").arg("-C").arg(deployment::root()).args([
        "log",
        "-1",
        "--format=%ct",
    ]))
    .context("the packages' time is the last commit's; without git, set SOURCE_DATE_EPOCH")?;
    let words = String::from_utf8_lossy(&words).into_owned();
    words.trim().parse().with_context(|| format!("git says {words:?}, not seconds"))
}

/// Compresses, with neither name nor time in it.
fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    filter(Command::new("gzip").args(["-9", "-n"]), bytes)
}

/// What a program makes of bytes on its standard input.
fn filter(command: &mut Command, bytes: &[u8]) -> Result<Vec<u8>> {
    let line = crate::step::line_of(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {line}"))?;
    let mut input = child.stdin.take().context("a child without an input")?;
    let output = std::thread::scope(|scope| {
        let written = scope.spawn(move || input.write_all(bytes));
        let output = child.wait_with_output();
        match written.join() {
            Ok(written) => written.and(output),
            Err(_) => Err(std::io::Error::other("the writer has ended")),
        }
    })
    .with_context(|| format!("{line} does not take what it is given"))?;
    if !output.status.success() {
        bail!("{line} ended with {}", output.status);
    }
    ensure!(!output.stdout.is_empty(), "{line} made nothing");
    Ok(output.stdout)
}
