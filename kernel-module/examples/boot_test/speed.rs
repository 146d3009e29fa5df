//! How fast frames are translated and published, beside reading the same PFNs from `/proc/PID/pagemap`.
//!
//! The figures are printed for whoever measures; nothing depends on them.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use enlightenment::device::{MAX_ADD, Publish, UserRun};

use crate::cases::{me, run_at};
use crate::device::Device;
use crate::memory::{Memory, PAGE};
use crate::told;

/// The argument of this program that asks for [`bench`].
pub const WORD: &str = "bench";

/// Pages of a frame of InnoDB's buffer pool.
const FRAME: usize = 4;
/// Frames of a sample: a pool of 128 MiB. Publishing takes the same for any number of them, a write to xenstore and a signal, so with few
/// frames that would be all that is measured.
const FRAMES: usize = 8192;

/// Frames that have memory of their own: all, or a quarter where a database has the memory; each is asked for four times then, which costs
/// the module and pagemap what four frames cost.
fn frames_with_memory() -> usize {
    if told().in_guest { FRAMES / 4 } else { FRAMES }
}

/// A pool whose every page is there, and its frames in the order in which they are asked for.
struct Pool {
    #[expect(dead_code, reason = "it stays mapped as long as this is there")]
    memory: Memory,
    runs: Vec<UserRun>,
}

impl Pool {
    fn new() -> Result<Self> {
        let in_memory = frames_with_memory();
        let memory = Memory::touched(in_memory * FRAME)?;
        // Places on disk in no order, so that no two frames become one run.
        let runs = (0..FRAMES)
            .map(|frame| {
                let place = (frame * 40_503 % FRAMES) as u64;
                let address = memory.address(frame % in_memory * FRAME);
                run_at(address, FRAME as u16, place * 2 * (FRAME * PAGE) as u64, 1)
            })
            .collect();
        Ok(Self { memory, runs })
    }

    /// The same in no order of addresses: 40,503 has no divisor in common with the number of frames.
    fn shuffle(&mut self) {
        let frames = self.runs.len();
        self.runs = (0..frames).filter_map(|i| self.runs.get(i * 40_503 % frames).copied()).collect();
    }

    /// Frames a second by the module: begun, translated, published.
    fn by_module(&self, device: &Device) -> Result<f64> {
        let before = device.stats()?.calls;
        let start = Instant::now();
        let generation = device.begin()?;
        let begun = start.elapsed();
        let mut listed = 0;
        for batch in self.runs.chunks(MAX_ADD as usize) {
            listed += device.add(generation, me(), batch)?.0;
        }
        let added = start.elapsed();
        device.publish(Publish { generation, ..Publish::default() })?;
        let took = start.elapsed();
        println!("  begun {begun:?}, added {:?}, published {:?}", added - begun, took - added);
        // Pages that the kernel moves at this very moment are left out; where nobody else needs memory, none.
        let pages = (self.runs.len() * FRAME) as u64;
        let moving = if told().in_guest { pages / 100 } else { 0 };
        ensure!(listed + moving >= pages, "{listed} pages listed");
        let calls = device.stats()?.calls - before;
        let frames = self.runs.len();
        ensure!(calls == 2 + frames.div_ceil(MAX_ADD as usize) as u64, "{calls} calls: that is no batch");
        Ok(frames as f64 / took.as_secs_f64())
    }

    /// Frames a second by pagemap: one read for all that adjoin, since that is how one would read it.
    fn by_pagemap(&self) -> Result<f64> {
        let start = Instant::now();
        let pagemap = File::open("/proc/self/pagemap").context("cannot open pagemap")?;
        let mut bytes = vec![0; 512 * 8];
        let frames = self.runs.len();
        let mut pfns = Vec::with_capacity(frames * FRAME);
        let mut first = 0;
        while let Some(run) = self.runs.get(first) {
            let mut last = first + 1;
            let adjoins = |i: usize| {
                self.runs.get(i).is_some_and(|next| {
                    next.address == run.address + ((i - first) * FRAME * PAGE) as u64
                        && (i - first) * FRAME < 512
                })
            };
            while adjoins(last) {
                last += 1;
            }
            let read = bytes.get_mut(..(last - first) * FRAME * 8).context("a batch is too long")?;
            pagemap.read_exact_at(read, run.address / PAGE as u64 * 8).context("cannot read pagemap")?;
            pfns.extend(
                read.chunks_exact(8)
                    .map(|entry| u64::from_le_bytes(entry.try_into().unwrap_or_default()) & ((1 << 55) - 1)),
            );
            first = last;
        }
        let took = start.elapsed();
        ensure!(black_box(&pfns).len() == frames * FRAME, "{} PFNs read", pfns.len());
        Ok(frames as f64 / took.as_secs_f64())
    }
}

/// One sample, and what it shows beside its figure: all frames go in with one call.
pub fn one_sample() -> Result<()> {
    let device = Device::open()?;
    let pool = Pool::new()?;
    let (module, pagemap) = (pool.by_module(&device)?, pool.by_pagemap()?);
    println!(
        "  {module:.0} frames/s translated and published, {pagemap:.0} frames/s read from pagemap: ratio {:.2}",
        module / pagemap
    );
    device.withdraw()?;
    Ok(())
}

/// Prints samples in turn: `sample NAME MODULE PAGEMAP`, in frames a second.
pub fn bench() -> Result<()> {
    let device = Device::open()?;
    let mut pool = Pool::new()?;
    for (name, shuffled) in [("in_order", false), ("scattered", true)] {
        if shuffled {
            pool.shuffle();
        }
        // Once for the caches.
        pool.by_module(&device)?;
        pool.by_pagemap()?;
        for _ in 0..15 {
            println!("sample {name} {:.0} {:.0}", pool.by_module(&device)?, pool.by_pagemap()?);
        }
    }
    println!("bench: done");
    Ok(())
}
