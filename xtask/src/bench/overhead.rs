//! `cargo xtask bench overhead`: sysbench against a mysqld on this machine, with and without resident probes.

use anyhow::Result;

use super::figures::Report;
use super::native;

/// Run sysbench in pairs.
#[derive(clap::Args)]
pub struct Args {
    /// Pairs of runs for each workload
    #[arg(long, default_value_t = 10)]
    pairs: u32,
    /// Seconds of each run; 2 will do for a first look
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Clients
    #[arg(long, default_value_t = 4)]
    threads: u32,
    /// Pool in MiB; the tables take about 190, so with less pages are evicted all the time
    #[arg(long, default_value_t = 512)]
    pool: u64,
}

/// Figures `read_only_throughput` and `read_write_throughput`, the baseline of which is that without probes; the processor time of mysqld for
/// a thousand transactions, which is steadier on a machine that does other things too; and hits and time in our programs as the
/// kernel counts them.
///
/// # Errors
/// When mysqld or sysbench does not run, or events are lost.
pub fn run(args: &Args) -> Result<Report> {
    let Args { pairs, seconds, threads, pool } = args;
    let arguments = [("--pairs", u64::from(*pairs)), ("--seconds", u64::from(*seconds))];
    let arguments = arguments.into_iter().chain([("--threads", u64::from(*threads)), ("--pool", *pool)]);
    native::measure("overhead", arguments.flat_map(|(name, value)| [name.to_owned(), value.to_string()]))
}
