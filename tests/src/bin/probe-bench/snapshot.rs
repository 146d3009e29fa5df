//! The pool's control blocks, read by the probe and by nothing but `process_vm_readv`, in turn.

use std::env;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use guest_probe::control_blocks::BlocksError;
use guest_probe::frame_table::PAGE_BYTES;
use guest_probe::memory::{Memory, ProcessMemory};
use guest_probe::session::{Options, Server as Probed, Session};
use guest_probe::storage_map::DiskRule;
use tests::disk::run as run_program;
use tests::server::Server;

use crate::Samples;

/// Bytes that the baseline reads at once.
const PIECE: usize = 1 << 20;
/// What the probe promises: this, and so much a frame.
const MOST_BYTES: u64 = 32 << 20;
const MOST_BYTES_A_FRAME: u64 = 64;

/// What to measure.
#[derive(clap::Args)]
pub struct Args {
    /// Pool sizes in MiB, the largest last
    #[arg(long, value_delimiter = ',', default_value = "1024,2048,4096")]
    pools: Vec<u64>,
    /// Snapshots of each
    #[arg(long, default_value_t = 15)]
    samples: u32,
}

/// Measures; the last pool gives the memory.
pub fn run(args: &Args) -> Result<Vec<Samples>> {
    let mut found = Vec::new();
    for (index, mib) in args.pools.iter().enumerate() {
        let pool = format!("--innodb-buffer-pool-size={}M", mib);
        let server = Server::start(&[&pool, "--innodb-buffer-pool-chunk-size=128M"])?;
        for table in 1..=4 {
            server.sql(&format!("SELECT COUNT(*) FROM sbtest.sbtest{table} WHERE pad != ''"))?;
        }
        found.push(speed(&server, *mib, args.samples)?);
        if index + 1 == args.pools.len() {
            found.push(memory(&server)?);
        }
    }
    Ok(found)
}

fn speed(server: &Server, mib: u64, samples: u32) -> Result<Samples> {
    let probed = Probed::find(Some(server.pid()))?;
    let memory = ProcessMemory { pid: server.pid() };
    let blocks = probed.control_blocks()?;
    let chunks = blocks.chunks()?;
    let size = probed.build.block.size as u64;
    let pool_bytes = chunks.iter().map(|chunk| chunk.count).sum::<u64>() * PAGE_BYTES;
    // A little is lost to alignment, as in any pool.
    ensure!(pool_bytes > (mib << 20) / 10 * 9, "a pool of {pool_bytes} bytes for {mib} MiB");
    let mut buffer = vec![0; PIECE];
    let (mut ours, mut plain) = (Vec::new(), Vec::new());
    for _ in 0..samples {
        let start = Instant::now();
        for chunk in &chunks {
            let (mut at, mut left) = (chunk.blocks, chunk.count * size);
            while left > 0 {
                let now = left.min(PIECE as u64);
                memory.read(at, &mut buffer[..now as usize])?;
                (at, left) = (at + now, left - now);
            }
        }
        plain.push(pool_bytes as f64 / start.elapsed().as_secs_f64());
        let start = Instant::now();
        let table = blocks.snapshot()?;
        ours.push(pool_bytes as f64 / start.elapsed().as_secs_f64());
        ensure!(table.len() as u64 * PAGE_BYTES == pool_bytes);
        let counts = table.counts();
        ensure!(counts.read + counts.written > 10_000, "the pool is cold: {counts:?}");
    }
    let gib = mib as f64 / 1024.0;
    let name = format!("pool_bytes_per_second_{gib}_gib").replace('.', "_");
    Ok(Samples { name, unit: "bytes/s", samples: ours, baseline: Some(plain), paired: true })
}

/// The peak memory of a process that does all that a probe does; what is promised is its baseline.
fn memory(server: &Server) -> Result<Samples> {
    let frames = Probed::find(Some(server.pid()))?.control_blocks()?.snapshot()?.len() as u64;
    let me = env::current_exe()?;
    let words = run_program(Command::new(me).arg("footprint").arg(server.pid().to_string()))?;
    let bytes: u64 = words.trim().parse().context("the footprint is no number")?;
    Ok(Samples {
        name: "probe_resident_bytes".into(),
        unit: "bytes",
        samples: vec![bytes as f64],
        baseline: Some(vec![(MOST_BYTES + MOST_BYTES_A_FRAME * frames) as f64]),
        paired: false,
    })
}

/// Probes a mysqld, reads its pool twice, builds lists, and returns the most memory that this process ever had.
pub fn footprint(pid: i32) -> Result<u64> {
    let options = Options { pid: Some(pid), rule: DiskRule::Any, ..Options::default() };
    let mut session = Session::start(&options)?;
    let mut runs = 0;
    session.lists(|piece| {
        runs += piece.len();
        Ok::<(), BlocksError>(())
    })?;
    ensure!(runs > 0, "nothing is listed");
    // A new snapshot stands beside the table that it replaces.
    session.snapshot_anew()?;
    session.lists(|_| Ok::<(), BlocksError>(()))?;
    Ok(guest_probe::status::peak_memory_bytes())
}
