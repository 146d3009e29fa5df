//! Whether all memory comes back.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use enlightenment::device::Publish;

use crate::cases::{me, run_at};
use crate::device::Device;
use crate::memory::Memory;
use crate::told;

/// Pages that may come and go without anybody's fault: a slab, a page table. At most 24 did in nine runs on three kernels.
const NOISE: u64 = 128;
/// Such pages where others live too.
const NOISE_IN_GUEST: u64 = 256;

/// Pages that nobody uses: those of the zones' free lists, and those that a processor keeps at hand, which are on no such list. The
/// kernel has raised what a processor may keep by its own measure since Linux 6.7, to thousands of pages after many were freed at once.
pub fn free() -> Result<u64> {
    fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop caches")?;
    // Counters that each processor keeps for itself are added up.
    let _ = fs::read_to_string("/proc/sys/vm/stat_refresh");
    let text = fs::read_to_string("/proc/zoneinfo").context("cannot read /proc/zoneinfo")?;
    let of = |key: &str| -> Result<u64> {
        let values: Vec<u64> = text
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix(key)?.trim_start().parse().ok())
            .collect();
        ensure!(!values.is_empty(), "/proc/zoneinfo has no {key:?}");
        Ok(values.iter().sum())
    };
    Ok(of("nr_free_pages ")? + of("count:")?)
}

/// Lists and translates in rounds far more pages than could be missing without being seen.
pub fn free_pages() -> Result<()> {
    let round = || -> Result<u64> {
        let device = Device::open()?;
        let memory = Memory::small(2000)?;
        let mut pages = 0;
        for _ in 0..2 {
            let generation = device.begin()?;
            let runs: Vec<_> =
                (0..40_000).map(|i| run_at(memory.address(i % 2000), 1, (i as u64) << 20, 1)).collect();
            device.add(generation, me(), &runs)?;
            device.publish(Publish { generation, ..Publish::default() })?;
            pages += device.stats()?.list_pages;
        }
        // One more, begun and left.
        let generation = device.begin()?;
        device.add(generation, me(), &[run_at(memory.address(0), 2000, 0, 1)])?;
        device.withdraw()?;
        Ok(pages + 2000)
    };
    round()?;
    // What the module loses it loses each time. Others, where there are any, take memory now and then.
    let (tries, noise) = if told().in_guest { (6, NOISE_IN_GUEST) } else { (1, NOISE) };
    let mut lost = 0;
    for _ in 0..tries {
        let before = free()?;
        let mut used = 0;
        for _ in 0..12 {
            used += round()?;
        }
        let after = free()?;
        ensure!(used > 20 * noise, "only {used} pages were used");
        lost = before.saturating_sub(after);
        if lost < noise {
            println!("  {used} pages were used and came back: {before} free before, {after} after");
            return Ok(());
        }
        println!("  of {used} pages that were used {lost} did not come back");
    }
    bail!("{lost} pages more were free before than after, and {tries} times too many")
}
