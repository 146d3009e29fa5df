//! `cargo xtask bench snapshot`: guest-probe's reading of all control blocks, against a plain `process_vm_readv` of the same bytes.

use anyhow::Result;

use super::figures::Report;
use super::native;

/// Read pools of several sizes.
#[derive(clap::Args)]
pub struct Args {
    /// Pool sizes in MiB, the largest last: its figure is the one that counts, and memory is measured there
    #[arg(long, default_value = "1024,2048,4096", value_name = "MIB,…")]
    pools: String,
    /// Snapshots of each pool
    #[arg(long, default_value_t = 15)]
    samples: u32,
}

/// Figures `pool_bytes_per_second_N_gib` (bytes of pool, not of control blocks) and `probe_resident_bytes`, the baseline of which is
/// what is promised: 32 MiB and 64 bytes a frame.
///
/// # Errors
/// When mysqld does not start or cannot be read.
pub fn run(args: &Args) -> Result<Report> {
    native::measure("snapshot", ["--pools", &args.pools, "--samples", &args.samples.to_string()], None)
}
