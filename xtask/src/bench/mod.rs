//! `cargo xtask bench`: speed, memory and bytes, each against a baseline that is measured in the same run.

mod figures;
mod filters;
mod migration;
// The one that `dom0-migrator check` estimates with: there is no second one to keep in step, and nothing else of that crate is needed here.
#[path = "../../../dom0-migrator/src/command/check/model.rs"]
mod model;
mod module;
mod native;
mod overhead;
mod reload;
mod scale;
mod snapshot;
mod storage;
mod stream;

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
    /// The filters: a guest's stream through both of them, against the same stream copied
    Stream(stream::Args),
    /// The restorer: bytes that it reads a second, against fio on the same file
    Reload(reload::Args),
    /// How fast guest-probe reads the pool of a running mysqld, against a plain read of the same bytes; and its memory
    Snapshot(snapshot::Args),
    /// What resident probes cost a running mysqld under sysbench, against the same without
    Overhead(overhead::Args),
    /// Frames a second through the kernel module, against /proc/PID/pagemap, in an emulated machine
    Module(module::Args),
    /// Total time, downtime, bytes and throughput of migrations in the lab, side by side with the stock helper
    Migration(migration::Args),
    /// Total time of migrations to a host whose storage gives a tenth, side by side with the stock helper
    Storage(storage::Args),
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
        Bench::Stream(args) => stream::run(args)?,
        Bench::Reload(args) => reload::run(args)?,
        Bench::Snapshot(args) => snapshot::run(args)?,
        Bench::Overhead(args) => overhead::run(args)?,
        Bench::Module(args) => module::run(args)?,
        Bench::Migration(args) => migration::run(args)?,
        Bench::Storage(args) => storage::run(args)?,
        Bench::Scale(args) => scale::run(args)?,
    };
    print!("{report}");
    if let Some(file) = &args.json {
        report.write(file)?;
    }
    Ok(())
}
