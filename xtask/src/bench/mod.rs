//! `cargo xtask bench`: speed, memory and bytes, each against a baseline that is measured in the same run.

mod figures;
mod migration;
mod model;
mod scale;

use std::path::PathBuf;

use anyhow::Result;

use crate::setup;
use figures::Report;
pub use figures::median;

/// Measure.
#[derive(clap::Args)]
pub struct Args {
    /// What to measure
    #[command(subcommand)]
    bench: Bench,
    /// Write the figures to this file too, as JSON
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Every bench is a module of its own with `Args` and `run(&Args) -> Result<Report>`.
#[derive(clap::Subcommand)]
enum Bench {
    /// Total time, downtime, bytes and throughput of migrations in the lab, side by side with the stock helper
    Migration(migration::Args),
    /// Cost of lists, window and filter for guests of 8 GiB to 1 TiB, by simulation
    Scale(scale::Args),
}

/// Runs the bench, and shows its figures.
///
/// # Errors
/// When something that is measured does not work.
pub fn run(args: &Args) -> Result<()> {
    setup::ensure()?;
    let report: Report = match &args.bench {
        Bench::Migration(args) => migration::run(args)?,
        Bench::Scale(args) => scale::run(args)?,
    };
    print!("{report}");
    if let Some(file) = &args.json {
        report.write(file)?;
    }
    Ok(())
}
