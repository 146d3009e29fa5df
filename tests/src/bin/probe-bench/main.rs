//! What `cargo xtask bench snapshot` and `overhead` run: a real mysqld on this machine, measured with and without the probe. The samples
//! go to standard output as JSON; xtask makes figures of them.

mod overhead;
mod snapshot;

use anyhow::Result;
use clap::Parser;
use serde::Serialize;

/// Measures the probe against a real mysqld; needs root and `POOLSKIP_MYSQL_ROOT`.
#[derive(Parser)]
enum Bench {
    /// How fast the pool is read, and what memory that takes
    Snapshot(snapshot::Args),
    /// What the probes cost mysqld
    Overhead(overhead::Args),
    /// Attaches to a mysqld, builds its lists once, and says what memory that took (used by `snapshot`)
    #[command(hide = true)]
    Footprint {
        /// The mysqld
        pid: i32,
    },
}

/// Samples of one thing, as xtask's bench takes them.
#[derive(Debug, Serialize)]
struct Samples {
    name: String,
    unit: &'static str,
    samples: Vec<f64>,
    baseline: Option<Vec<f64>>,
    /// Whether each sample was taken beside the baseline's of the same number.
    paired: bool,
}

fn main() -> Result<()> {
    let samples = match Bench::parse() {
        Bench::Snapshot(args) => snapshot::run(&args)?,
        Bench::Overhead(args) => overhead::run(&args)?,
        Bench::Footprint { pid } => {
            println!("{}", snapshot::footprint(pid)?);
            return Ok(());
        }
    };
    println!("{}", serde_json::to_string(&samples)?);
    Ok(())
}
