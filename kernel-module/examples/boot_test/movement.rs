//! Pages that move while they are listed: what was published is stale then, as it may be; the next generation has it right, and the
//! module's hand on a page never outlasts a call.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use enlightenment::device::Publish;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::cases::{me, run_at};
use crate::device::Device;
use crate::memory::{Memory, PAGE};
use crate::physical::Physical;
use crate::told;

/// PFN by page of the memory, as a generation that is made now lists them.
fn list(device: &Device, memory: &Memory) -> Result<HashMap<u64, u64>> {
    let generation = device.begin()?;
    let runs: Vec<_> = (0..memory.pages())
        .step_by(4)
        .map(|page| {
            run_at(memory.address(page), 4.min(memory.pages() - page) as u16, (page * PAGE) as u64, 1)
        })
        .collect();
    device.add(generation, me(), &runs)?;
    device.publish(Publish { generation, ..Publish::default() })?;
    listed(device)
}

/// The published one, as dom0 reads it.
fn listed(device: &Device) -> Result<HashMap<u64, u64>> {
    let on_list = Physical::open()?.listed(device.stats()?.root_pfn)?;
    Ok(on_list.into_iter().map(|(pfn, (_, offset, _))| (offset / PAGE as u64, pfn)).collect())
}

fn as_pagemap(memory: &Memory) -> Result<HashMap<u64, u64>> {
    let pfns = memory.pfns()?;
    Ok((0..).zip(pfns).filter_map(|(page, pfn)| Some((page, pfn?))).collect())
}

fn moved(from: &HashMap<u64, u64>, to: &HashMap<u64, u64>) -> usize {
    from.iter().filter(|(page, pfn)| to.get(page).is_some_and(|now| now != *pfn)).count()
}

/// Moves every page of ours to a NUMA node; how many are there then.
fn move_to_node(memory: &Memory, node: i32) -> Result<usize> {
    let pages: Vec<u64> = (0..memory.pages()).map(|page| memory.address(page)).collect();
    let nodes = vec![node; pages.len()];
    let mut status = vec![-1_i32; pages.len()];
    // SAFETY: three arrays of that length; the pages are a mapping of this process, whose content stays as it is.
    let result = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_move_pages,
            0,
            pages.len(),
            pages.as_ptr(),
            nodes.as_ptr(),
            status.as_mut_ptr(),
            2,
        )
    };
    Errno::result(result).context("cannot move pages: has the machine two nodes?")?;
    Ok(status.iter().filter(|found| **found == node).count())
}

/// Migration between NUMA nodes, there and back.
pub fn between_nodes() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small(2000)?;
    let mut before = list(&device, &memory)?;
    let mut all = 0;
    for node in [1, 0, 1] {
        let there = move_to_node(&memory, node)?;
        // A page that the module held could not be moved.
        ensure!(there == memory.pages(), "{there} of {} pages went to node {node}", memory.pages());
        let published = listed(&device)?;
        ensure!(published == before, "what is published changed by itself");
        let now = list(&device, &memory)?;
        ensure!(now == as_pagemap(&memory)?, "the new generation is not where pagemap has the pages");
        all += moved(&before, &now);
        before = now;
    }
    ensure!(all >= 2 * memory.pages(), "only {all} pages moved");
    println!(
        "  {all} pages of {} moved in 3 migrations, all seen in the next generation",
        3 * memory.pages()
    );
    device.withdraw()?;
    Ok(())
}

/// Compaction, again and again, while generations are made.
pub fn compaction() -> Result<()> {
    let device = Device::open()?;
    // Every second page is given back: holes that compaction fills.
    let memory = Memory::small(if told().in_guest { 4_000 } else { 16_000 })?;
    for page in (0..memory.pages()).step_by(2) {
        memory.discard(page, 1)?;
    }
    let before = list(&device, &memory)?;
    ensure!(before.len() == memory.pages() / 2, "{} pages listed", before.len());
    // SAFETY: this program has one thread.
    let child = match unsafe { fork() }? {
        ForkResult::Child => {
            let failed = (0..4).any(|_| fs::write("/proc/sys/vm/compact_memory", "1").is_err());
            std::process::exit(i32::from(failed));
        }
        ForkResult::Parent { child } => child,
    };
    let seen = watch(&device, &memory, before.clone(), child);
    // It may have ended already.
    let _ = kill(child, Signal::SIGKILL);
    let _ = waitpid(child, None);
    let Seen { generations, moves, left_out } = seen?;
    // A parent's pages are shared with its child for a while, so once more alone; and with other holes, should nothing have moved.
    let mut holes = (2..memory.pages()).step_by(16);
    let moved = loop {
        fs::write("/proc/sys/vm/compact_memory", "1").context("cannot compact memory")?;
        let after = list(&device, &memory)?;
        ensure!(after == as_pagemap(&memory)?, "the new generation is not where pagemap has the pages");
        let moved = moved(&before, &after);
        if moved > 0 {
            break moved;
        }
        let Some(hole) = holes.next() else {
            // A small guest's memory may have no place that is better; in a machine of our own there is one.
            ensure!(told().in_guest, "compaction moves no page at all: nothing is shown");
            break 0;
        };
        memory.discard(hole + 1, 1)?;
    };
    println!(
        "  compaction moved {moved} of {} listed pages; {generations} generations were published meanwhile: {moves} moves between \
         them, {left_out} pages left out while they were on the way",
        before.len()
    );
    device.withdraw()?;
    Ok(())
}

/// What was seen while memory was being compacted.
#[derive(Default)]
struct Seen {
    generations: usize,
    moves: usize,
    left_out: usize,
}

/// Publishes generations until the process ends.
fn watch(device: &Device, memory: &Memory, mut last: HashMap<u64, u64>, process: Pid) -> Result<Seen> {
    let pages = last.len();
    let mut seen = Seen::default();
    loop {
        let now = list(device, memory)?;
        seen.generations += 1;
        seen.moves += moved(&last, &now);
        // A page that is being copied at this very moment is mapped nowhere.
        seen.left_out += pages.checked_sub(now.len()).context("more pages are listed than there are")?;
        last = now;
        match waitpid(process, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive => {}
            WaitStatus::Exited(_, 0) => return Ok(seen),
            status => bail!("compaction ended with {status:?}"),
        }
    }
}
