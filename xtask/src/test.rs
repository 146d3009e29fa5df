//! `cargo xtask test`: everything that must hold, from the sources' form to a migration between two hosts.

mod lab_cases;

use std::time::Instant;

use anyhow::{Result, bail};

use crate::build::{ebpf, module};
use crate::deployment::cargo;
use crate::step::{run as run_program, step};
use crate::{module_test, mysql, setup};

/// Run all tests.
#[derive(clap::Args)]
pub struct Args {
    /// Only these parts; all when none is named
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Of the lab's cases, only those with this in their names
    #[arg(long, value_name = "TEXT")]
    case: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Form of the sources, lints, built objects against their sources
    Lint,
    /// Tests of all crates; those of `tests` attach to a real mysqld on this machine
    Native,
    /// The kernel module in the guest's kernel under QEMU
    Module,
    /// Migrations between the two hosts of the lab
    Lab,
}

/// Runs the parts one after the other, all of them even when one fails.
///
/// # Errors
/// When any part fails; after all have run.
pub fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    setup::ensure()?;
    let all = [Part::Lint, Part::Native, Part::Module, Part::Lab];
    let parts: Vec<Part> =
        all.into_iter().filter(|part| args.parts.is_empty() || args.parts.contains(part)).collect();
    let (mut passed, mut failed) = (0, Vec::new());
    for part in parts {
        let result = match part {
            Part::Lint => lint(),
            Part::Native => native(),
            Part::Module => module_test::boot_test(),
            Part::Lab => lab_cases::run(args.case.as_deref()),
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
    println!("parts: {passed} passed, {} failed", failed.len());
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
    step("built eBPF object against its sources", ebpf::check)?;
    step("built module core against its sources", module::check)
}

/// Runs `cargo test` with its own output, since its lines are what one wants to see.
fn native() -> Result<()> {
    let root = mysql::root()?;
    step("cargo test", || {
        let status = cargo()
            .args(["test", "--workspace", "--locked", "--no-fail-fast"])
            .env("POOLSKIP_MYSQL_ROOT", root)
            .status()?;
        if !status.success() {
            bail!("cargo test ended with {status}");
        }
        Ok(())
    })
}
