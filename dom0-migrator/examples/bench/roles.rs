//! The processes of the chain, each with its stream on its standard input and output:
//!
//! ```text
//! generate ─► source ═► target ─► sink        with the filters, a side channel between them
//! generate ─► copy   ═► copy   ─► sink        the baseline: sockets alone
//! generate ─► source ═► wire ═► target ─► sink        the wire lets so many bytes a second through
//! ```

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dom0_migrator::engine::xen_stream::{MAX_BATCH, PAGE_DATA_HEAD, PageData, RecordHeader, record};
use dom0_migrator::engine::{
    Config, DiskName, SourceFilter, SourceParts, SourceSummary, TargetFilter, TargetParts, TargetSummary,
};
use enlightenment::Vdev;
use serde::{Deserialize, Serialize};

use crate::Failed;
use crate::guest::{Guest, Pages, XVDA, digest};

/// Slices that one `writev(2)` takes.
const MAX_SLICES: usize = 1024;

/// Which one.
#[derive(clap::Args, Clone)]
pub struct Args {
    /// The role
    #[arg(value_enum)]
    pub role: Role,
    /// The raw disk
    #[arg(long)]
    pub disk: PathBuf,
    /// Pages of the guest
    #[arg(long)]
    pub pages: u64,
    /// Path of the side channel's socket
    #[arg(long)]
    pub side: PathBuf,
    /// Where to write the report
    #[arg(long)]
    pub report: PathBuf,
    /// Compare all memory
    #[arg(long)]
    pub check: bool,
    /// Pages of a kind that lie together
    #[arg(long, default_value_t = 16)]
    pub stretch: u64,
    /// Source: nothing overtakes anything
    #[arg(long)]
    pub in_order: bool,
    /// Wire: bytes a second
    #[arg(long, default_value_t = u64::MAX)]
    pub rate: u64,
}

/// Places in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Writes the stream, as libxenguest would
    Generate,
    /// The source's filter
    Source,
    /// The target's filter
    Target,
    /// Copies from one socket to the next
    Copy,
    /// The same, no faster than it may
    Wire,
    /// Reads the stream, as libxenguest would
    Sink,
}

/// What a process says in the end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Told {
    /// Most memory that it had, in bytes.
    pub resident_bytes: u64,
    /// From the first byte to the last.
    pub seconds: f64,
    /// Bytes read or written.
    pub bytes: u64,
    /// Sum over all memory, when it was to be compared.
    pub digest: u64,
    /// Processor time in seconds, of a filter alone: not what was needed to find the guest's pages.
    pub processor_seconds: f64,
    /// What a filter counted.
    pub counted: serde_json::Value,
}

/// Plays a role to its end.
pub fn run(args: &Args) -> Result<(), Failed> {
    let mut told = match args.role {
        Role::Generate => generate(args)?,
        Role::Source => {
            let (summary, before) = source(args)?;
            let processor_seconds = processor_seconds()? - before;
            Told { counted: serde_json::to_value(summary)?, processor_seconds, ..Told::default() }
        }
        Role::Target => {
            let summary = target(args)?;
            let processor_seconds = processor_seconds()?;
            Told { counted: serde_json::to_value(summary)?, processor_seconds, ..Told::default() }
        }
        Role::Copy => copy(u64::MAX)?,
        Role::Wire => copy(args.rate)?,
        Role::Sink => sink(args.check)?,
    };
    told.resident_bytes = most_resident()?;
    Ok(std::fs::write(&args.report, serde_json::to_vec(&told)?)?)
}

fn standard(fd: impl std::os::fd::AsFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}

fn guest(args: &Args) -> Result<Guest, Failed> {
    Ok(Guest { disk: Pages::find(&args.disk)?, pages: args.pages, stretch: args.stretch })
}

fn generate(args: &Args) -> Result<Told, Failed> {
    let guest = guest(args)?;
    let mut told = Told::default();
    let mut out = UnixStream::from(standard(io::stdout())?);
    out.write_all(&headers())?;
    let mut pfns = 0..guest.pages;
    loop {
        let batch: Vec<u64> = pfns.by_ref().take(MAX_BATCH).collect();
        if batch.is_empty() {
            break;
        }
        let length = PAGE_DATA_HEAD + batch.len() * (8 + 4096);
        let mut head = RecordHeader::bytes(record::PAGE_DATA, length).to_vec();
        head.extend((batch.len() as u64).to_le_bytes());
        head.extend(batch.iter().flat_map(|&pfn| Guest::word(pfn)));
        let pages = batch.iter().map(|&pfn| IoSlice::new(guest.page(pfn)));
        let mut slices: Vec<_> = std::iter::once(IoSlice::new(&head)).chain(pages).collect();
        let mut left = slices.as_mut_slice();
        while !left.is_empty() {
            let most = left.len().min(MAX_SLICES);
            let written = out.write_vectored(&left[..most])?;
            IoSlice::advance_slices(&mut left, written);
        }
        told.bytes += (8 + length) as u64;
        if args.check {
            told.digest =
                batch.iter().fold(told.digest, |sum, &pfn| sum.wrapping_add(digest(pfn, guest.page(pfn))));
        }
    }
    out.write_all(&RecordHeader::bytes(record::END, 0))?;
    Ok(told)
}

/// Image and domain header of a PV guest.
fn headers() -> Vec<u8> {
    let mut out = vec![0xff; 8];
    out.extend(0x5845_4e46_u32.to_be_bytes());
    out.extend(3_u32.to_be_bytes());
    out.extend([0; 8]);
    out.extend(1_u32.to_le_bytes());
    out.extend(12_u16.to_le_bytes());
    out.extend([0; 2]);
    out.extend(4_u32.to_le_bytes());
    out.extend(17_u32.to_le_bytes());
    out
}

/// What it counted, and the processor time that it took to make the lists before.
fn source(args: &Args) -> Result<(SourceSummary, f64), Failed> {
    // The pages' contents are no business of the filter's, and would count as its memory.
    let map = { guest(args)?.map()? };
    forget_peak()?;
    let before = processor_seconds()?;
    let began = Instant::now();
    let side = loop {
        match UnixStream::connect(&args.side) {
            Ok(side) => break side,
            Err(_) if began.elapsed() < Duration::from_secs(60) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
        }
    };
    let filter = SourceFilter::start(SourceParts {
        from_save: standard(io::stdin())?,
        to_wire: standard(io::stdout())?,
        side: Some(OwnedFd::from(side)),
        map,
        disks: vec![DiskName { vdev: Vdev(XVDA), path: std::fs::canonicalize(&args.disk)? }],
        config: Config {
            ahead_bytes: if args.in_order { u64::MAX } else { Config::default().ahead_bytes },
            ..Config::default()
        },
    })?;
    Ok((filter.finish()?, before))
}

fn target(args: &Args) -> Result<TargetSummary, Failed> {
    let side = UnixListener::bind(&args.side)?.accept()?.0;
    let filter = TargetFilter::start(TargetParts {
        from_wire: standard(io::stdin())?,
        to_restore: standard(io::stdout())?,
        side: Some(OwnedFd::from(side)),
        config: Config::default(),
    })?;
    Ok(filter.finish()?)
}

/// Copies, so many bytes a second at most; what is not used of a moment is lost, as on a wire.
fn copy(rate: u64) -> Result<Told, Failed> {
    let mut from = UnixStream::from(standard(io::stdin())?);
    let mut to = UnixStream::from(standard(io::stdout())?);
    let mut buffer = vec![0; if rate == u64::MAX { 1 << 20 } else { 64 << 10 }];
    let (mut told, began) = (Told::default(), Instant::now());
    let mut free_at = Duration::ZERO;
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return Ok(told);
        }
        if rate != u64::MAX {
            free_at = free_at.max(began.elapsed());
            std::thread::sleep(free_at.saturating_sub(began.elapsed()));
            free_at += Duration::from_secs_f64(read as f64 / rate as f64);
        }
        to.write_all(&buffer[..read])?;
        told.bytes += read as u64;
    }
}

fn sink(check: bool) -> Result<Told, Failed> {
    let mut from = File::from(standard(io::stdin())?);
    let mut told = Told::default();
    let mut began = None;
    if check {
        check_all(&mut from, &mut told)?;
        return Ok(told);
    }
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = from.read(&mut buffer)?;
        let began = *began.get_or_insert_with(Instant::now);
        told.bytes += read as u64;
        if read == 0 {
            told.seconds = began.elapsed().as_secs_f64();
            return Ok(told);
        }
    }
}

/// Reads the stream as libxenguest would: the last content of each PFN counts.
fn check_all(from: &mut File, told: &mut Told) -> Result<(), Failed> {
    let mut memory = std::collections::HashMap::new();
    from.read_exact(&mut [0; 40])?;
    loop {
        let mut head = [0; 8];
        from.read_exact(&mut head)?;
        let header = RecordHeader::parse(&head, 0);
        let mut body = vec![0; header.length as usize];
        from.read_exact(&mut body)?;
        match header.kind {
            record::END => break,
            record::PAGE_DATA => {}
            kind => return Err(format!("record {kind:#x} reached libxenguest").into()),
        }
        let pages = PageData::parse(&body).map_err(|problem| problem.to_string())?;
        for (entry, page) in pages.pages_by_entry() {
            memory.insert(entry.pfn, digest(entry.pfn, page.unwrap_or_default()));
        }
    }
    told.digest = memory.values().fold(0, |sum, &one| sum.wrapping_add(one));
    Ok(())
}

/// Lets the count of this process's largest size begin anew (`proc(5)`, `clear_refs`).
fn forget_peak() -> io::Result<()> {
    std::fs::write(Path::new("/proc/self/clear_refs"), "5")
}

/// The largest resident size so far, in bytes.
fn most_resident() -> Result<u64, Failed> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

/// Processor time of this process so far, in seconds.
fn processor_seconds() -> Result<f64, Failed> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // Fields 14 and 15 (`proc(5)`); the name in parentheses is the second. They count in hundredths on every Linux that is built for x86.
    let after_name = stat.rsplit(") ").next().ok_or("no name in stat")?;
    let ticks = |field: usize| -> Result<f64, Failed> {
        Ok(after_name.split(' ').nth(field - 3).ok_or("stat is short")?.parse::<f64>()? / 100.0)
    };
    Ok(ticks(14)? + ticks(15)?)
}
