//! `cargo xtask bench overhead`: sysbench against a mysqld on this machine, with and without resident probes.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::sys::statvfs::statvfs;

use super::figures::Report;
use super::native;

/// Room for the copy of the server's data and for what its redo log and undo logs grow by.
const ROOM: u64 = 2 << 30;

/// Run sysbench in pairs.
#[derive(clap::Args)]
pub struct Args {
    /// Pairs of runs for each workload
    #[arg(long, default_value_t = 10)]
    pairs: u32,
    /// Seconds that a run without probes takes about; all runs make the same number of transactions. 2 will do for a first look
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Clients
    #[arg(long, default_value_t = 4)]
    threads: u32,
    /// Pool in MiB; the tables take about 190, so with less pages are evicted all the time
    #[arg(long, default_value_t = 512)]
    pool: u64,
    /// Where the server's disk is a file. In memory, nothing waits for a disk: its noise would hide what probes cost, and its waiting
    /// would make that less
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    data: PathBuf,
    /// In place of a resident service, one on demand that is asked nothing: what the bench shows where there is nothing to show
    #[arg(long)]
    idle: bool,
}

/// Figures `read_only_throughput` and `read_write_throughput`, the baseline of which is that without probes; the processor time of mysqld for
/// a thousand transactions, which is steadier on a machine that does other things too; hits and time in our programs as the
/// kernel counts them; and the processor time of the service itself.
///
/// # Errors
/// When mysqld or sysbench does not run, or events are lost.
pub fn run(args: &Args) -> Result<Report> {
    let Args { pairs, seconds, threads, pool, data, idle } = args;
    let room = statvfs(data).with_context(|| format!("cannot look at {}", data.display()))?;
    let room = room.blocks_available().saturating_mul(room.fragment_size());
    ensure!(
        room >= ROOM,
        "{} has room for {} MiB, the server's disk takes up to {}: name another place with --data",
        data.display(),
        room >> 20,
        ROOM >> 20
    );
    let arguments = [("--pairs", u64::from(*pairs)), ("--seconds", u64::from(*seconds))];
    let arguments = arguments.into_iter().chain([("--threads", u64::from(*threads)), ("--pool", *pool)]);
    let arguments = arguments.flat_map(|(name, value)| [name.to_owned(), value.to_string()]);
    native::measure("overhead", arguments.chain(idle.then(|| "--idle".to_owned())), Some(data))
}
