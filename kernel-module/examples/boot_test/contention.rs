//! More than one at the device, or in its way.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use enlightenment::device::{DEVICE_PATH, Publish};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::cases::{me, run_at};
use crate::device::Device;
use crate::memory::Memory;
use crate::physical::Physical;
use crate::{load, unload};

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Starts `work` in a process of its own, whose exit status says whether it went well.
fn start(work: impl FnOnce() -> Result<()>) -> Result<Pid> {
    // SAFETY: this program has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let failed =
                work().inspect_err(|error| println!("  in a process of its own: {error:#}")).is_err();
            std::process::exit(i32::from(failed));
        }
        ForkResult::Parent { child } => Ok(child),
    }
}

fn end(child: Pid) -> Result<()> {
    match waitpid(child, None)? {
        WaitStatus::Exited(_, 0) => Ok(()),
        status => bail!("a process ended with {status:?}"),
    }
}

/// A process is killed while its pages are translated, at several moments. The module holds its memory for a call: it is all there,
/// or none.
pub fn dying() -> Result<()> {
    let memory = Memory::small(4000)?;
    let runs: Vec<_> =
        (0..60_000).map(|i| run_at(memory.address(i % 4000), 1, (i as u64) << 20, 1)).collect();
    let mut whole = 0;
    for turn in 0..6 {
        let victim = start(|| {
            loop {
                nix::unistd::pause();
            }
        })?;
        let killer = start(|| {
            std::thread::sleep(Duration::from_millis(turn * 20));
            Ok(kill(victim, Signal::SIGKILL)?)
        })?;
        let device = Device::open()?;
        let deadline = Instant::now() + LIMIT;
        loop {
            ensure!(Instant::now() < deadline, "a process that was killed still has pages");
            let generation = device.begin()?;
            match device.add(generation, victim.as_raw() as u32, &runs) {
                Ok(result) => {
                    ensure!(result == (60_000, 0), "{result:?}");
                    whole += 1;
                }
                Err(Errno::ESRCH) => break,
                Err(other) => bail!("adding pages of a dying process: {other}"),
            }
        }
        end(killer)?;
        waitpid(victim, None)?;
        device.withdraw()?;
        ensure!(device.stats()?.list_pages == 1, "{:?}", device.stats()?);
    }
    println!("  6 processes were killed while {whole} lists of them were made");
    Ok(())
}

/// Two processes have the open device, since one was forked with it.
pub fn two_writers() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small(500)?;
    let runs: Vec<_> = (0..2000).map(|i| run_at(memory.address(i % 500), 1, (i as u64) << 20, 1)).collect();
    let before = device.stats()?;
    let me = me();
    let writer = || -> Result<()> {
        for _ in 0..60 {
            let generation = device.begin()?;
            // Each begins what the other has not published: whoever comes too late is told.
            for _ in 0..2 {
                match device.add(generation, me, &runs) {
                    Ok(result) => ensure!(result == (2000, 0), "{result:?}"),
                    Err(Errno::ESTALE) => break,
                    Err(other) => bail!("add: {other}"),
                }
            }
            match device.publish(Publish { generation, ..Publish::default() }) {
                Ok(()) | Err(Errno::ESTALE) => {}
                Err(other) => bail!("publish: {other}"),
            }
        }
        Ok(())
    };
    let children = [start(writer)?, start(writer)?];
    // Whatever is published meanwhile is whole.
    let physical = Physical::open()?;
    let (mut read, mut replaced) = (0, 0);
    for _ in 0..20 {
        match physical.runs(before.root_pfn) {
            Ok((slot, runs)) => {
                ensure!(runs.len() as u64 == slot.runs, "{slot:?}");
                read += 1;
            }
            Err(_) => replaced += 1,
        }
    }
    for child in children {
        end(child)?;
    }
    let stats = device.stats()?;
    let published = stats.generations - before.generations;
    ensure!(published > 0, "nobody has published");
    let (slot, runs) = physical.runs(stats.root_pfn)?;
    ensure!(runs.len() as u64 == slot.runs && slot.runs.is_multiple_of(2000), "{slot:?}");
    println!(
        "  {published} of 120 generations were published; of 20 looks {read} saw one whole, {replaced} that it was replaced"
    );
    device.withdraw()?;
    ensure!(device.stats()?.list_pages == 1, "{:?}", device.stats()?);
    Ok(())
}

/// The module is unloaded while others open, use and close the device.
pub fn unloading() -> Result<()> {
    load()?;
    let memory = Memory::small(300)?;
    let runs: Vec<_> = (0..3000).map(|i| run_at(memory.address(i % 300), 1, (i as u64) << 20, 1)).collect();
    let me = me();
    let user = start(|| {
        loop {
            match Device::open() {
                Ok(device) => {
                    let generation = device.begin()?;
                    device.add(generation, me, &runs)?;
                    device.publish(Publish { generation, ..Publish::default() })?;
                    // Some leave what they have begun.
                    device.begin()?;
                }
                Err(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO | Errno::EBUSY) => {}
                Err(other) => bail!("open: {other}"),
            }
        }
    })?;
    let deadline = Instant::now() + LIMIT;
    let (mut gone, mut busy) = (0, 0);
    while gone < 15 {
        ensure!(
            Instant::now() < deadline,
            "the module was unloaded {gone} times only, {busy} times it was in use"
        );
        match unload() {
            Ok(()) => {
                gone += 1;
                ensure!(!fs::exists(DEVICE_PATH)?, "the device is still there");
                load()?;
            }
            Err(Errno::EAGAIN | Errno::EBUSY) => busy += 1,
            Err(other) => bail!("unload: {other}"),
        }
    }
    kill(user, Signal::SIGKILL)?;
    let status = waitpid(user, None)?;
    ensure!(matches!(status, WaitStatus::Signaled(..)), "the user of the device ended with {status:?}");
    unload().context("cannot unload at the end")?;
    println!("  unloaded {gone} times between {busy} refusals");
    Ok(())
}
