//! What the kernel says our eBPF programs cost: how often each ran and how long, while somebody has told it to count.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use aya::sys::{Stats, enable_stats};
use libbpf_rs::query::ProgInfoIter;
use serde::{Deserialize, Serialize};

/// One program's share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramStatistics {
    /// Its name.
    pub name: String,
    /// Runs.
    pub runs: u64,
    /// Time in them, in nanoseconds; without what the trap into the kernel costs.
    pub nanoseconds: u64,
}

/// Lets the kernel count for as long as the descriptor lives; counting costs some 20 ns a run.
///
/// # Errors
/// When the kernel does not (before 5.8, or without CAP_SYS_ADMIN).
pub fn count() -> io::Result<OwnedFd> {
    enable_stats(Stats::RunTime).map_err(io::Error::other)
}

/// What the kernel counted of these programs.
pub fn of_programs(programs: &[(String, u32)]) -> Vec<ProgramStatistics> {
    let names: HashMap<u32, &str> = programs.iter().map(|(name, id)| (*id, name.as_str())).collect();
    ProgInfoIter::default()
        .filter_map(|info| {
            let name = (*names.get(&info.id)?).to_owned();
            Some(ProgramStatistics { name, runs: info.run_cnt, nanoseconds: info.run_time_ns })
        })
        .collect()
}
