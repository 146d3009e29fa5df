//! `cargo xtask bench`: speed, memory and bytes, each against a baseline that is measured in the same run.

mod figures;
mod filters;
mod reload;
mod stream;

use std::path::PathBuf;

use anyhow::Result;

use crate::setup;
use figures::Report;

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
    /// The filters: a guest's stream through both of them, against the same stream copied
    Stream(stream::Args),
    /// The restorer: bytes that it reads a second, against fio on the same file
    Reload(reload::Args),
}

/// Runs the bench, and shows its figures.
///
/// # Errors
/// When something that is measured does not work.
pub fn run(args: &Args) -> Result<()> {
    setup::ensure()?;
    let report: Report = match &args.bench {
        Bench::Stream(args) => stream::run(args)?,
        Bench::Reload(args) => reload::run(args)?,
    };
    print!("{report}");
    if let Some(file) = &args.json {
        report.write(file)?;
    }
    Ok(())
}
