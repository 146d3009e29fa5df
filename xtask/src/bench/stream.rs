//! `bench stream`: a guest's memory through both filters, against the same bytes copied.
//!
//! The guest is made up, its pages are not: they are those of the lab's MySQL data directory, which lies on a raw disk that both filters
//! see. Twelve of twenty pages are named by the lists, three are zeros, five go as they are. The stream goes into one socket pair, through
//! both filters with a socket pair between them, and out of the pipe through which libxenguest restores; what libxenguest writes to and reads from is made by the
//! helpers' own code. The baseline copies it through three socket pairs, by two processes that do nothing else: a copy is faster through sockets than through that pipe. The first run, which is not counted, compares all memory.
//!
//! A narrow wire: the same guest, but with its kinds of pages in stretches of 64 MiB, as a pool lies in a guest, over a wire that lets 200 MB a
//! second through; against the filter with nothing overtaking anything.

use anyhow::Result;

use super::figures::{Figure, Report};
use super::filters::{Program, numbers};
use crate::lab::{GuestSize, guest_disk};

/// Measure the filters.
#[derive(clap::Args)]
pub struct Args {
    /// Memory of the made-up guest in GiB
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=256))]
    gib: u64,
    /// Times that each way is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

/// Figures: `filter_throughput` (at least 0.8 of the copy), `filter_throughput_one_copy` (against one copying process, with one socket
/// less), `narrow_wire_seconds` and `narrow_wire_busy` (the share of the time in which the wire had something to carry), `resident_bytes` (the larger filter's; at most the window and 64 MiB), and what each filter took of the processor.
///
/// # Errors
/// When memory differs, or a process of the chain fails.
pub fn run(args: &Args) -> Result<Report> {
    let disk = guest_disk(GuestSize::default())?;
    let program = Program::build()?;
    let words = ["--mib".into(), (args.gib << 10).to_string(), "--runs".into(), args.runs.to_string()];
    let measured = program.measure("stream", &disk, &words)?;
    let filters = numbers(&measured, "filters")?;
    let resident = numbers(&measured, "source_resident")?
        .into_iter()
        .zip(numbers(&measured, "target_resident")?)
        .map(|(source, target)| source.max(target))
        .collect();
    Ok(Report {
        bench: "stream".into(),
        figures: vec![
            Figure::against("filter_throughput", "bytes/s", filters.clone(), &numbers(&measured, "copies")?),
            Figure::against(
                "filter_throughput_one_copy",
                "bytes/s",
                filters,
                &numbers(&measured, "one_copy")?,
            ),
            Figure::against(
                "narrow_wire_seconds",
                "s",
                numbers(&measured, "narrow")?,
                &numbers(&measured, "narrow_in_order")?,
            ),
            Figure::against(
                "narrow_wire_busy",
                "1",
                numbers(&measured, "narrow_busy")?,
                &numbers(&measured, "narrow_busy_in_order")?,
            ),
            Figure::alone("resident_bytes", "bytes", resident),
            Figure::alone("source_processor", "s", numbers(&measured, "source_processor")?),
            Figure::alone("target_processor", "s", numbers(&measured, "target_processor")?),
        ],
    })
}
