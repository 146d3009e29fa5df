//! `cargo xtask test`: everything that must hold, from the sources' form to a migration between two hosts.

mod advisories;
mod bed;
mod confined;
mod deploy_cases;
mod emulated;
mod faults;
mod footprint;
mod guest_cases;
mod hostile_case;
mod hvm_cases;
mod lab_cases;
mod licences;
mod opened;
mod pvh_cases;
mod repetition;
mod storage_cases;
mod units;
mod unsafe_code;
mod upgrade;
mod xl_case;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};

use crate::build::{ebpf, module, rust_src};
use crate::deployment::cargo;
use crate::ending::status_of_group;
use crate::step::{run as run_program, step};
use crate::{fuzz, mariadb, module_test, mysql, package, setup, volume_test};

/// Run all tests.
#[derive(clap::Args)]
pub struct Args {
    /// Only these parts; all but `fuzz`, `pvh`, `hvm` and `deploy` when none is named
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Of the lab's cases, only those with this in their names; may be given more than once
    #[arg(long = "case", value_name = "TEXT")]
    cases: Vec<String>,
    /// Only a soak. Without a number the probe's: a real mysqld under load with evictions, resizes and DDL, its listed frames compared with
    /// the disk at 50 random stops. With one: so many migrations to and fro in the lab, under load, all memory compared after each, and
    /// nothing may grow; a run that was ended is gone on with
    #[arg(long, value_name = "MIGRATIONS", num_args = 0..=1, value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "parts")]
    soak: Option<Option<u32>>,
    /// How long the probe's soak takes [default: 600]; of migrations, begin no other one after so long
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(10..), requires = "soak")]
    soak_seconds: Option<u64>,
    /// Only the fault matrix: prints what comes of each thing that goes wrong in each phase, and holds docs/reliability.md against it
    #[arg(long, conflicts_with = "parts")]
    faults: bool,
    /// Writes the table into docs/reliability.md
    #[arg(long, requires = "faults")]
    write_table: bool,
    /// Only take what a checkout of RustSec's database says of the crates that are used here, into the tree
    #[arg(long, value_name = "DIR", conflicts_with = "parts")]
    write_advisories: Option<PathBuf>,
    /// The same as `module`
    #[arg(long)]
    module: bool,
    /// The same as `deploy`
    #[arg(long)]
    deploy: bool,
    /// Only the module core's tests of calls and of xenstore, under Miri (some minutes; needs a nightly toolchain with `miri` and `rust-src`)
    #[arg(long, conflicts_with_all = ["parts", "module", "deploy"])]
    miri: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Form of the sources, lints, built objects against their sources
    Lint,
    /// Tests of all crates; those of `tests` attach to a real mysqld on this machine
    Native,
    /// This release's commands and filters against those of the release before, which is built from git
    Upgrade,
    /// The packages: what is in them, what lintian says, whether they install and go without a trace
    Package,
    /// Each fuzz target for a second under libFuzzer; only when it is named, since all has to be built anew for it. `native` replays the
    /// corpora and tries inputs a little other than those
    Fuzz,
    /// The kernel module in the kernels of three Debian releases, under QEMU
    Module,
    /// The storage map on volumes of the device mapper in a Debian kernel, under QEMU
    Volume,
    /// Migrations of a PV guest between the two hosts of the lab, Debian 12 with Xen 4.17; cases that take minutes each only when it is named
    Lab,
    /// The same of a PVH guest, Debian 13 with Xen 4.20; only when it is named, for its migrations are slow under emulation
    Pvh,
    /// Of an HVM guest with its device model, on the same hosts; only when it is named, for the same reason
    Hvm,
    /// The quick start in the lab of whole Debian systems: deployed over ssh, migrated there and back, removed without a trace; only when
    /// it is named, for packages are slow to install under emulation
    Deploy,
}

impl Part {
    /// Names of its cases in a lab.
    fn cases(self) -> Vec<&'static str> {
        match self {
            Self::Lint
            | Self::Native
            | Self::Upgrade
            | Self::Package
            | Self::Fuzz
            | Self::Module
            | Self::Volume => Vec::new(),
            Self::Lab => lab_cases::CASES.iter().map(|(name, _)| *name).collect(),
            Self::Pvh => pvh_cases::CASES.iter().map(|(name, _)| *name).collect(),
            Self::Hvm => hvm_cases::CASES.iter().map(|(name, _)| *name).collect(),
            Self::Deploy => deploy_cases::CASES.iter().map(|(name, _)| *name).collect(),
        }
    }
}

/// Runs the parts one after the other, all of them even when one fails.
///
/// # Errors
/// When any part fails; after all have run.
pub fn run(args: &Args) -> Result<()> {
    if args.miri {
        return miri();
    }
    if let Some(database) = &args.write_advisories {
        return advisories::write(database);
    }
    let start = Instant::now();
    setup::ensure()?;
    match args.soak {
        Some(None) => return soak(args.soak_seconds.unwrap_or(600)),
        Some(Some(migrations)) => {
            return repetition::run(migrations, args.soak_seconds.map(Duration::from_secs));
        }
        None => {}
    }
    if args.faults {
        return faults::run(args.write_table);
    }
    let all = [
        Part::Lint,
        Part::Native,
        Part::Upgrade,
        Part::Package,
        Part::Fuzz,
        Part::Module,
        Part::Volume,
        Part::Lab,
        Part::Pvh,
        Part::Hvm,
        Part::Deploy,
    ];
    let is_default = |part: &Part| !matches!(part, Part::Fuzz | Part::Pvh | Part::Hvm | Part::Deploy);
    let mut named = args.parts.clone();
    if args.module {
        named.push(Part::Module);
    }
    if args.deploy {
        named.push(Part::Deploy);
    }
    let is_wanted = |part: &Part| if named.is_empty() { is_default(part) } else { named.contains(part) };
    let parts: Vec<Part> = all.into_iter().filter(is_wanted).collect();
    for only in &args.cases {
        let has_it = |part: &Part| part.cases().iter().any(|name| name.contains(only));
        ensure!(parts.iter().any(has_it), "no case of the lab has {only:?} in its name");
    }
    let (mut passed, mut failed, mut not_run) = (0, Vec::new(), Vec::new());
    for part in parts {
        let result = match part {
            Part::Lint => lint(),
            Part::Native => native(),
            Part::Upgrade => match upgrade::find() {
                Ok(upgrade::Found::Here(before)) => upgrade::run(&before),
                // Asked for by name, it must run. Otherwise a clone without history is no fault of the sources, and no proof either.
                Ok(upgrade::Found::NotHere(why)) if named.is_empty() => {
                    not_run.push(format!("{part:?}: {why}"));
                    continue;
                }
                Ok(upgrade::Found::NotHere(why)) => Err(anyhow!(why)),
                Err(error) => Err(error),
            },
            Part::Package => package::trial::run(),
            Part::Fuzz => fuzz::smoke(1),
            Part::Module => module_test::boot_test(),
            Part::Volume => volume_test::run(),
            Part::Lab => lab_cases::run(&args.cases, !named.is_empty() || !args.cases.is_empty()),
            Part::Pvh => pvh_cases::run(&args.cases),
            Part::Hvm => hvm_cases::run(&args.cases),
            Part::Deploy => deploy_cases::run(&args.cases),
        };
        match result {
            Ok(()) => passed += 1,
            Err(error) => {
                eprintln!("FAILED {part:?}: {error:?}");
                failed.push(part);
            }
        }
    }
    println!("all parts took {:.0} s", start.elapsed().as_secs_f64());
    not_run.iter().for_each(|why| println!("NOT RUN {why}"));
    // Whoever counts tests knows this line, and no other word for what was not run.
    let skipped = if not_run.is_empty() { String::new() } else { format!(", {} skipped", not_run.len()) };
    println!("parts: {passed} passed, {} failed{skipped}", failed.len());
    if !failed.is_empty() {
        bail!("failed: {failed:?}");
    }
    Ok(())
}

fn lint() -> Result<()> {
    step("cargo fmt", || run_program(cargo().args(["fmt", "--all", "--check"])).map(drop))?;
    step("cargo clippy", || {
        run_program(cargo().args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ]))
        .map(drop)
    })?;
    step("licences and sources of all crates", licences::check)?;
    step("advisories on all crates", advisories::check)?;
    step("exposure of the units", units::check)?;
    eprintln!("  {}", unsafe_code::summary()?);
    step("built eBPF object against its sources", ebpf::check)?;
    step("built module core against its sources", module::check)
}

/// Runs the tests of the kernel module's core that are not too long for an interpreter. The core itself is safe code; what Miri watches
/// besides are overflows, uninitialised bytes and leaks in it and in the fake kernel.
fn miri() -> Result<()> {
    step("cargo miri test", || {
        let mut miri = Command::new("rustup");
        miri.args(["run", &rust_src::toolchain(), "cargo", "miri", "test", "--locked"])
            .args(["--package=kernel-module", "--test=xen", "--test=device"])
            // Thousands of runs each: hours in an interpreter.
            .args(["--", "--skip=add_checks_each_run", "--skip=any_bytes_in_any_order"])
            .env("MIRIFLAGS", "-Zmiri-disable-isolation");
        let status = status_of_group(&mut miri)?;
        if !status.success() {
            bail!(
                "cargo miri test ended with {status}; `rustup component add miri rust-src` may be what it wants"
            );
        }
        Ok(())
    })
}

/// Runs `cargo test` with its own output, since its lines are what one wants to see.
fn native() -> Result<()> {
    let root = mysql::root()?;
    let mariadb = mariadb::root()?;
    step("cargo test", || {
        let status = status_of_group(
            cargo()
                .args(["test", "--workspace", "--locked", "--no-fail-fast"])
                .env("POOLSKIP_MYSQL_ROOT", root)
                .env("POOLSKIP_MARIADB_ROOT", mariadb),
        )?;
        if !status.success() {
            bail!("cargo test ended with {status}");
        }
        Ok(())
    })
}

/// Runs the soak, which is no part of the default run.
fn soak(seconds: u64) -> Result<()> {
    ebpf::check()?;
    let root = mysql::root()?;
    step("soak", || {
        let status = status_of_group(
            cargo()
                .args([
                    "test",
                    "--locked",
                    "--package=tests",
                    "--test=soak",
                    "--",
                    "--ignored",
                    "--nocapture",
                ])
                .env("POOLSKIP_MYSQL_ROOT", root)
                .env("POOLSKIP_SOAK_SECONDS", seconds.to_string()),
        )?;
        if !status.success() {
            bail!("the soak ended with {status}");
        }
        Ok(())
    })
}
