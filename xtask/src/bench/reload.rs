//! `bench reload`: what the restorer reads a second, hashes included, against what fio reads from the same file with the same size and
//! number of reads: O_DIRECT, io_uring, in no order.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::figures::{Figure, Report};
use super::filters::Program;
use crate::lab::guest_disk;
use crate::step::run as run_program;

/// Bytes that each measurement reads.
const BYTES: u64 = 512 << 20;

/// Measure the restorer.
#[derive(clap::Args)]
pub struct Args {
    /// The file or device to read; the lab's disk if none is given
    #[arg(long, value_name = "PATH")]
    disk: Option<PathBuf>,
    /// Reads in flight; as many as the restorer has at most
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=64))]
    depth: u32,
    /// Times that each is measured
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

/// Figures: `reload_throughput` (reads of 1 MiB, the restorer's longest; at least 0.9 of fio's), and the same for reads of 64 KiB and
/// of 16 KiB, one InnoDB page.
///
/// # Errors
/// When fio or the restorer fails.
pub fn run(args: &Args) -> Result<Report> {
    let disk = args.disk.clone().map_or_else(guest_disk, Ok)?;
    let program = Program::build()?;
    let mut figures = Vec::new();
    for (name, block) in [
        ("reload_throughput", 1 << 20),
        ("reload_throughput_64k", 64 << 10),
        ("reload_throughput_16k", 16 << 10),
    ] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..args.runs {
            theirs.push(fio(&disk, block, args.depth)?);
            let words = [("--block", block), ("--depth", args.depth.into()), ("--bytes", BYTES)]
                .map(|(name, value)| [name.to_owned(), value.to_string()])
                .concat();
            let measured = program.measure("reload", &disk, &words)?;
            ours.push(measured["rate"].as_f64().context("`bench reload` measured no rate")?);
        }
        figures.push(Figure::against(name, "bytes/s", ours, &theirs));
    }
    Ok(Report { bench: "reload".into(), figures })
}

/// Bytes that fio reads a second.
fn fio(disk: &Path, block: u64, depth: u32) -> Result<f64> {
    let mut fio = Command::new("fio");
    fio.args([
        "--name=reload",
        "--readonly",
        "--rw=randread",
        "--direct=1",
        "--ioengine=io_uring",
        "--randrepeat=0",
    ]);
    fio.args([format!("--bs={block}"), format!("--iodepth={depth}"), format!("--io_size={BYTES}")]);
    fio.arg("--output-format=json").arg(format!("--filename={}", disk.display()));
    rate(&run_program(&mut fio)?)
}

/// The rate in what fio prints.
fn rate(words: &[u8]) -> Result<f64> {
    let printed: serde_json::Value = serde_json::from_slice(words).context("fio printed no JSON")?;
    printed["jobs"][0]["read"]["bw_bytes"].as_f64().context("fio's JSON names no bandwidth")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_the_first_job_s() {
        assert_eq!(rate(br#"{"jobs": [{"read": {"bw_bytes": 12.5}}]}"#).unwrap(), 12.5);
        assert!(rate(b"fio: no such file").is_err() && rate(b"{}").is_err());
    }
}
