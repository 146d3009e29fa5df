//! References read by the restorer: as many bytes a second as the disk gives, hashes included.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Instant;

use dom0_migrator::engine::Config;
use dom0_migrator::engine::disk::Disk;
use dom0_migrator::engine::memory_record;
use dom0_migrator::engine::restorer::{Key, Restorer, Wanted};
use dom0_migrator::engine::xen_stream::PAGE;

use crate::Failed;
use crate::guest::mixed;

/// Key of the hashes; any will do.
const KEY: [u8; 32] = [7; 32];

/// What to measure.
#[derive(clap::Args)]
pub struct Args {
    /// A raw disk or a file; it is only read
    #[arg(long)]
    disk: PathBuf,
    /// Bytes of one read
    #[arg(long, default_value_t = 1 << 20)]
    block: u64,
    /// Reads in flight
    #[arg(long, default_value_t = 64)]
    depth: usize,
    /// Bytes to read at most
    #[arg(long, default_value_t = 512 << 20)]
    bytes: u64,
    /// Read with threads instead of io_uring
    #[arg(long)]
    threads: bool,
}

/// Measures, and prints JSON.
pub fn run(args: &Args) -> Result<(), Failed> {
    let path = std::fs::canonicalize(&args.disk)?;
    let disk = Disk::open(&path)?;
    // Every other block, in no order: so that one read is one block, as the other reader's is.
    let mut blocks: Vec<u64> = (0..disk.size() / args.block).step_by(2).collect();
    blocks.sort_unstable_by_key(|&block| mixed(block));
    blocks.truncate((args.bytes / args.block).max(1) as usize);
    let mut references = Vec::new();
    let file = File::open(&path)?;
    let mut block = vec![0; args.block as usize];
    for &number in &blocks {
        file.read_exact_at(&mut block, number * args.block)?;
        for (index, page) in block.chunks_exact(PAGE).enumerate() {
            let place = references.len() as u64;
            let key = Key { disk: 0, offset: number * args.block + (index * PAGE) as u64, number: place };
            references.push((key, Wanted { pfn: place, hash: memory_record::hash(&KEY, page) }));
        }
    }
    let total = references.len();
    let config = Config {
        read_bytes: args.block as usize,
        gap_bytes: 0,
        queue_depth_first: args.depth,
        queue_depth: args.depth,
        readers: args.depth,
        io_uring: !args.threads,
        ..Config::default()
    };
    let outstanding = (config.window_bytes / PAGE as u64) as usize;
    let restorer = Restorer::start(KEY, vec![Some(disk)], &config)?;
    let began = Instant::now();
    let mut references = references.into_iter();
    restorer.push(references.by_ref().take(outstanding));
    let (mut loaded, mut reads) = (0, 0);
    while loaded < total {
        for batch in restorer.results.recv()? {
            if let Some(refused) = batch.loaded.iter().find(|loaded| loaded.outcome.is_err()) {
                return Err(format!("page {} was refused: {:?}", refused.pfn, refused.outcome).into());
            }
            loaded += batch.loaded.len();
            reads += 1;
            restorer.push(references.by_ref().take(batch.loaded.len()));
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let rate = (total * PAGE) as f64 / seconds;
    println!("{}", serde_json::json!({ "rate": rate, "reads": reads, "bytes": total * PAGE }));
    Ok(())
}
