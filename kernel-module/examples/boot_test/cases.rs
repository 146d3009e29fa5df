//! The cases, in the order in which they run.

use std::collections::HashMap;
use std::mem::offset_of;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use anyhow::{Context, Result, bail, ensure};
use enlightenment::ABI_VERSION;
use enlightenment::device::{
    ADD, Add, BEGIN, DEVICE_PATH, MAX_ADD, PUBLISH, Publish, STATS, UserRun, WITHDRAW,
};
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Uid, fork, getpid};

use crate::device::Device;
use crate::memory::{Memory, PAGE, pfns_of};
use crate::physical::Physical;
use crate::{complaints, contention, leaks, load, movement, on_xen, speed, unload, xen};

type Case = fn() -> Result<()>;

/// Why a case is left out in a guest.
const FOR_OTHERS: Option<&str> = Some("the database here needs memory too");
/// Why a case is left out in a guest.
const ONE_NODE: Option<&str> = Some("the guest has one node");

/// All of them; those with a reason are left out where others run too.
pub const ALL: &[(&str, Option<&str>, Case)] = &[
    ("the node is for root only, and asks for CAP_SYS_ADMIN", None, node),
    ("one opener at a time", None, one_opener),
    ("unknown requests and bad addresses are refused", None, bad_calls),
    ("BEGIN checks its fields", None, bad_begin),
    ("ADD checks its fields", None, bad_add),
    ("ADD checks each run, and takes all back when one is bad", None, bad_runs),
    ("anonymous memory is translated as pagemap has it", None, || translated(&Memory::touched(1000)?)),
    ("a memfd is translated as pagemap has it", None, || translated(&Memory::of_file(700)?)),
    ("huge pages are translated as pagemap has them", None, || translated(&Memory::huge()?)),
    ("a file's pages are translated as pagemap has them", None, || translated(&Memory::of_program()?)),
    ("another process is translated as pagemap has it", None, other_process),
    ("device memory and the kernel's own pages are not listed", None, no_ram),
    ("runs that overlap are listed as they come", None, overlapping),
    ("holes, forbidden pages and the zero page are not listed, nothing is brought in", None, holes),
    ("a long list has several leaves, and its pages are used again", None, generations),
    ("what is begun and not published is dropped", None, dropped),
    ("WITHDRAW frees all", None, withdrawn),
    ("reads say that there is no request", None, reads),
    ("between \"begun\" and \"ended\" dom0 hears only what it asks for", None, xen::quiet),
    ("nodes that were removed are made again", None, xen::announced_again),
    ("a full memory is an error, and everything comes back", FOR_OTHERS, full_memory),
    ("a killed caller gets away", None, killed),
    ("a process that dies meanwhile is listed as it was, or unknown", None, contention::dying),
    ("two writers at once are served one after the other", None, contention::two_writers),
    ("pages that moved to another node are listed anew where they are", ONE_NODE, movement::between_nodes),
    ("pages that compaction moves are listed anew where they are, none is held", None, movement::compaction),
    ("as many pages are free after as before", None, leaks::free_pages),
    ("frames are translated and published in whole batches", None, speed::one_sample),
    ("the module stays while it is open, then goes and comes", None, reloaded),
    ("the module goes at any moment, whoever is at the door", None, contention::unloading),
    ("the kernel has nothing to complain of", None, complaints),
];

/// The disk of all runs.
pub const VDEV: u32 = 51712;

/// A run of one process's pages.
pub fn run_at(address: u64, pages: u16, disk_offset: u64, list: u8) -> UserRun {
    UserRun { address, disk_offset, vdev: VDEV, pages, list, reserved: 0 }
}

/// This process, as the device wants it.
pub fn me() -> u32 {
    getpid().as_raw() as u32
}

/// Whether a call failed, and as it should.
pub fn expect<T: std::fmt::Debug>(what: &str, result: Result<T, Errno>, expected: Errno) -> Result<()> {
    match result {
        Err(found) if found == expected => Ok(()),
        other => bail!("{what}: {other:?}, expected {expected:?}"),
    }
}

/// Runs `work` in a process of its own; its word on how it went comes back as exit status.
fn in_child(work: impl FnOnce() -> Result<()>) -> Result<()> {
    // SAFETY: this program has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let failed =
                work().inspect_err(|error| println!("  in a process of its own: {error:#}")).is_err();
            std::process::exit(i32::from(failed));
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            status => bail!("the process ended with {status:?}"),
        },
    }
}

fn node() -> Result<()> {
    let meta = std::fs::metadata(DEVICE_PATH).context("no device")?;
    ensure!(meta.mode() & 0o777 == 0o600 && meta.uid() == 0, "mode {:o}, owner {}", meta.mode(), meta.uid());
    std::fs::set_permissions(DEVICE_PATH, std::fs::Permissions::from_mode(0o666))?;
    let result = in_child(|| {
        nix::unistd::setuid(Uid::from_raw(1000))?;
        expect("open without the capability", Device::open().map(|_| ()), Errno::EPERM)
    });
    std::fs::set_permissions(DEVICE_PATH, std::fs::Permissions::from_mode(0o600))?;
    result
}

fn one_opener() -> Result<()> {
    let first = Device::open()?;
    expect("second open", Device::open().map(|_| ()), Errno::EBUSY)?;
    drop(first);
    Device::open()?;
    Ok(())
}

fn bad_calls() -> Result<()> {
    let device = Device::open()?;
    for request in [0, 1, ADD + 0x10, BEGIN ^ 0x4000_0000, STATS | 0x4000_0000, 0xB700, 0xFFFF_FFFF] {
        expect("unknown request", device.call(request, 0), Errno::ENOTTY)?;
    }
    for request in [BEGIN, ADD, PUBLISH, STATS] {
        for address in [0, 8, 0x7fff_ffff_f000, 0xffff_8880_0000_0000, u64::MAX] {
            expect("bad address", device.call(request, address), Errno::EFAULT)?;
        }
    }
    Ok(())
}

fn bad_begin() -> Result<()> {
    let device = Device::open()?;
    expect("version 0", device.begin_as(0, 0), Errno::EPROTONOSUPPORT)?;
    expect("next version", device.begin_as(ABI_VERSION + 1, 0), Errno::EPROTONOSUPPORT)?;
    expect("flags", device.begin_as(ABI_VERSION, 1), Errno::EINVAL)?;
    expect("no generation", device.publish(Publish::default()), Errno::ESTALE)?;
    ensure!(device.begin()? < device.begin()?, "numbers of generations must rise");
    Ok(())
}

fn bad_add() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::touched(1)?;
    let runs = [run_at(memory.address(0), 1, 0, 1)];
    expect("nothing begun", device.add(1, me(), &runs), Errno::ESTALE)?;
    let generation = device.begin()?;
    let at = runs.as_ptr().addr() as u64;
    expect("another generation", device.add(generation + 1, me(), &runs), Errno::ESTALE)?;
    expect("too many", device.add_as(generation, me() as i32, at, MAX_ADD + 1), Errno::E2BIG)?;
    expect("all ones", device.add_as(generation, me() as i32, at, u32::MAX), Errno::E2BIG)?;
    // 2 is kthreadd, which has no memory of its own.
    for pid in [0, -1, i32::MIN, i32::MAX, 2] {
        expect("process", device.add_as(generation, pid, at, 1), Errno::ESRCH)?;
    }
    for address in [0, 0x7fff_ffff_f000, u64::MAX - 7, 0xffff_8880_0000_0000] {
        expect("array", device.add_as(generation, me() as i32, address, 1), Errno::EFAULT)?;
    }
    let end = Memory::touched(2)?;
    end.forbid(1)?;
    end.put(PAGE - size_of::<UserRun>(), &runs[0]);
    let last = end.address(1) - size_of::<UserRun>() as u64;
    expect("array's end", device.add_as(generation, me() as i32, last, 2), Errno::EFAULT)?;
    ensure!(device.add_as(generation, me() as i32, last, 1)? == (1, 0), "the array ends with its mapping");
    let generation = device.begin()?;
    ensure!(device.add_as(generation, me() as i32, 0, 0)? == (0, 0), "no run is no error");
    ensure!(device.stats()?.list_pages == 1, "pages stayed: {:?}", device.stats()?);
    Ok(())
}

fn bad_runs() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::touched(64)?;
    let generation = device.begin()?;
    let good = run_at(memory.address(0), 1, 4096, 1);
    let bad = [
        ("no page", UserRun { pages: 0, ..good }),
        ("address", UserRun { address: good.address + 1, ..good }),
        ("kernel address", UserRun { address: 0xffff_8880_0000_0000, ..good }),
        ("address overflows", UserRun { address: !4095, pages: 2, ..good }),
        ("offset", UserRun { disk_offset: 511, ..good }),
        ("offset overflows", UserRun { disk_offset: !511, ..good }),
        ("list 0", UserRun { list: 0, ..good }),
        ("list 3", UserRun { list: 3, ..good }),
        ("reserved", UserRun { reserved: 1, ..good }),
    ];
    // 300 runs that cannot be merged come first, so that the bad one lies in another leaf, and another copy from user space.
    let mut runs: Vec<_> = (0..300).map(|i| run_at(memory.address(0), 1, i << 20, 1)).collect();
    device.add(generation, me(), &runs[..1])?;
    let before = device.stats()?;
    for (what, bad) in bad {
        runs.push(bad);
        expect(what, device.add(generation, me(), &runs), Errno::EINVAL)?;
        runs.pop();
    }
    let after = device.stats()?;
    ensure!(before == after, "before {before:?}, after {after:?}");
    device.publish(Publish { generation, ..Publish::default() })?;
    let (_, listed) = Physical::open()?.runs(after.root_pfn)?;
    ensure!(listed.len() == 1 && listed[0].pages == 1, "listed: {listed:?}");
    device.withdraw()?;
    Ok(())
}

/// Lists a whole mapping, every second run of three pages in the other list, and compares.
fn translated(memory: &Memory) -> Result<()> {
    listed_as(me(), memory.address(0), &memory.pfns()?)
}

fn listed_as(pid: u32, address: u64, pfns: &[Option<u64>]) -> Result<()> {
    ensure!(pfns.iter().all(Option::is_some), "the test's own pages are not there");
    let device = Device::open()?;
    let generation = device.begin()?;
    let mut runs = Vec::new();
    let mut expected = HashMap::new();
    for (i, pages) in pfns.chunks(3).enumerate() {
        let offset = (1 << 30) + (i as u64) * 5 * PAGE as u64;
        let list = 1 + (i % 2) as u8;
        runs.push(run_at(address + (i * 3 * PAGE) as u64, pages.len() as u16, offset, list));
        for (page, pfn) in pages.iter().enumerate() {
            expected.insert(pfn.unwrap_or(0), (VDEV, offset + (page * PAGE) as u64, list));
        }
    }
    ensure!(device.add(generation, pid, &runs)? == (pfns.len() as u64, 0), "not all pages were listed");
    let publish = Publish {
        generation,
        answers: 0,
        frames_read: 1,
        frames_written: 2,
        pool_frames_clean: 3,
        pool_frames: 4,
    };
    device.publish(publish)?;
    let stats = device.stats()?;
    let physical = Physical::open()?;
    let view = physical.root(stats.root_pfn)?;
    let (slot, _) = physical.runs(stats.root_pfn)?;
    ensure!((slot.frames_read, slot.frames_written) == (1, 2), "{slot:?}");
    ensure!((view.pool_frames_clean, view.pool_frames) == (3, 4), "{view:?}");
    ensure!(slot.pages_read + slot.pages_written == pfns.len() as u64, "{slot:?}");
    let listed = physical.listed(stats.root_pfn)?;
    ensure!(listed == expected, "{} pages listed, {} expected", listed.len(), expected.len());
    device.withdraw()?;
    Ok(())
}

fn other_process() -> Result<()> {
    let memory = Memory::touched(300)?;
    let (reader, writer) = nix::unistd::pipe()?;
    // SAFETY: this program has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            // Pages of its own, where the parent has others.
            memory.touch();
            drop(reader);
            let _ = nix::unistd::write(&writer, b"!");
            loop {
                nix::unistd::pause();
            }
        }
        ForkResult::Parent { child } => {
            drop(writer);
            let mut byte = [0];
            nix::unistd::read(&reader, &mut byte)?;
            let result = (|| {
                let pfns = pfns_of(&child.to_string(), memory.address(0), memory.pages())?;
                ensure!(pfns != memory.pfns()?, "parent and child share all pages");
                listed_as(child.as_raw() as u32, memory.address(0), &pfns)
            })();
            nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
            waitpid(child, None)?;
            let device = Device::open()?;
            let generation = device.begin()?;
            let runs = [run_at(memory.address(0), 1, 0, 1)];
            expect(
                "a process that is gone",
                device.add(generation, child.as_raw() as u32, &runs),
                Errno::ESRCH,
            )?;
            result
        }
    }
}

fn no_ram() -> Result<()> {
    let device = Device::open()?;
    let generation = device.begin()?;
    // A PCI device's registers; nobody reads them here. A guest of Xen has no such device.
    let registers = std::fs::read_dir("/sys/bus/pci/devices")
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .flat_map(|entry| (0..6).map(move |bar| entry.path().join(format!("resource{bar}"))))
        .filter_map(|path| std::fs::File::options().read(true).write(true).open(path).ok())
        .find_map(|file| Memory::of_device(&file, 1).ok());
    ensure!(registers.is_some() || on_xen(), "the machine has no device with memory");
    let mut runs: Vec<_> = registers.iter().map(|memory| run_at(memory.address(0), 1, 0, 1)).collect();
    // Pages of the kernel's that every process has.
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let special: Vec<u64> = maps
        .lines()
        .filter(|line| ["[vvar]", "[vdso]", "[vsyscall]"].iter().any(|name| line.ends_with(name)))
        .filter_map(|line| u64::from_str_radix(line.split('-').next()?, 16).ok())
        .filter(|address| *address < 1 << 47)
        .collect();
    ensure!(special.len() >= 2, "no vvar and vdso in {maps}");
    runs.extend(special.iter().map(|address| run_at(*address, 1, 1 << 20, 1)));
    let result = device.add(generation, me(), &runs)?;
    ensure!(result == (0, runs.len() as u64), "{result:?} of {} pages", runs.len());
    Ok(())
}

fn overlapping() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::touched(8)?;
    let pfns = memory.pfns()?;
    let generation = device.begin()?;
    // Hints: which of them is right, if any, the hashes tell.
    let runs = [run_at(memory.address(0), 8, 0, 1), run_at(memory.address(4), 4, 1 << 20, 2)];
    ensure!(device.add(generation, me(), &runs)? == (12, 0), "not all were listed");
    device.publish(Publish { generation, ..Publish::default() })?;
    let (_, listed) = Physical::open()?.runs(device.stats()?.root_pfn)?;
    let pages = |list| -> Vec<Option<u64>> {
        let of_list = listed.iter().filter(|run| run.list == list);
        of_list.flat_map(|run| (0..u64::from(run.pages)).map(|page| Some(run.pfn + page))).collect()
    };
    ensure!(pages(1) == pfns && pages(2) == pfns[4..], "listed: {listed:?}");
    // The array may lie in the argument itself: what stands there is no run.
    let generation = device.begin()?;
    let mut argument = [0; size_of::<Add>()];
    let at = argument.as_mut_ptr().addr() as u64;
    argument[offset_of!(Add, generation)..][..8].copy_from_slice(&generation.to_le_bytes());
    argument[offset_of!(Add, runs)..][..8].copy_from_slice(&at.to_le_bytes());
    argument[offset_of!(Add, count)..][..4].copy_from_slice(&1_u32.to_le_bytes());
    argument[offset_of!(Add, pid)..][..4].copy_from_slice(&me().to_le_bytes());
    std::hint::black_box(&mut argument);
    expect("an array in its own argument", device.call(ADD, at), Errno::EINVAL)?;
    device.withdraw()?;
    Ok(())
}

fn holes() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::touched(16)?;
    memory.discard(3, 2)?;
    memory.forbid(9)?;
    let untouched = Memory::untouched(8)?;
    let zero = Memory::untouched(4)?;
    zero.read_all();
    let generation = device.begin()?;
    let runs = [
        run_at(memory.address(0), 16, 0, 1),
        run_at(untouched.address(0), 8, 1 << 20, 1),
        run_at(zero.address(0), 4, 2 << 20, 1),
        run_at(0x10_0000, 3, 3 << 20, 1),
        run_at(0x7fff_ffff_e000, 5, 4 << 20, 1),
    ];
    let (listed, unmapped) = device.add(generation, me(), &runs)?;
    // A page that is mapped but may not be read is left out or listed, by kernel; it is memory all the same.
    ensure!(listed + unmapped == 36 && (13..=14).contains(&listed), "{listed} listed, {unmapped} not");
    ensure!(untouched.pfns()?.iter().all(Option::is_none), "pages were brought in");
    device.publish(Publish { generation, ..Publish::default() })?;
    let on_list = Physical::open()?.listed(device.stats()?.root_pfn)?;
    for (page, pfn) in memory.pfns()?.iter().enumerate().filter(|(page, _)| *page != 9) {
        let offset = pfn.and_then(|pfn| on_list.get(&pfn)).map(|place| place.1);
        let expected = (page != 3 && page != 4).then_some((page * PAGE) as u64);
        ensure!(offset == expected, "page {page} is listed at {offset:?}, expected {expected:?}");
    }
    device.withdraw()?;
    Ok(())
}

fn generations() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::touched(8)?;
    let physical = Physical::open()?;
    // 100,000 runs that cannot be merged: 589 leaves, so two index pages.
    let runs: Vec<_> = (0..50_000).map(|i| run_at(memory.address(i % 8), 1, (i as u64) << 20, 1)).collect();
    let mut pages = Vec::new();
    for _ in 0..4 {
        let generation = device.begin()?;
        device.add(generation, me(), &runs)?;
        device.add(generation, me(), &runs)?;
        device.publish(Publish { generation, ..Publish::default() })?;
        let stats = device.stats()?;
        let (slot, listed) = physical.runs(stats.root_pfn)?;
        ensure!(slot.generation == generation && listed.len() == 100_000, "{slot:?}");
        ensure!(slot.index_pages == 2 && slot.leaf_pages == 589, "{slot:?}");
        pages.push(stats.list_pages);
    }
    ensure!(pages == [592, 1183, 1183, 1183], "pages held: {pages:?}");
    // A short generation gives back what it does not need.
    let generation = device.begin()?;
    device.add(generation, me(), &runs[..10])?;
    device.publish(Publish { generation, ..Publish::default() })?;
    ensure!(device.stats()?.list_pages == 1 + 591 + 2, "{:?}", device.stats()?);
    device.withdraw()?;
    Ok(())
}

fn dropped() -> Result<()> {
    let memory = Memory::touched(1)?;
    let runs: Vec<_> = (0..2000).map(|i| run_at(memory.address(0), 1, i << 20, 2)).collect();
    let device = Device::open()?;
    let first = device.begin()?;
    device.add(first, me(), &runs)?;
    ensure!(device.stats()?.list_pages == 1 + 12 + 1, "{:?}", device.stats()?);
    let second = device.begin()?;
    ensure!(device.stats()?.list_pages == 1, "{:?}", device.stats()?);
    expect("the dropped one", device.add(first, me(), &runs), Errno::ESTALE)?;
    expect(
        "the dropped one",
        device.publish(Publish { generation: first, ..Publish::default() }),
        Errno::ESTALE,
    )?;
    device.add(second, me(), &runs)?;
    drop(device);
    let device = Device::open()?;
    ensure!(device.stats()?.list_pages == 1, "{:?}", device.stats()?);
    expect(
        "of the closed file",
        device.publish(Publish { generation: second, ..Publish::default() }),
        Errno::ESTALE,
    )
}

fn withdrawn() -> Result<()> {
    let memory = Memory::touched(1)?;
    let device = Device::open()?;
    let runs = [run_at(memory.address(0), 1, 0, 1)];
    for _ in 0..2 {
        let generation = device.begin()?;
        device.add(generation, me(), &runs)?;
        device.publish(Publish { generation, ..Publish::default() })?;
    }
    let open = device.begin()?;
    device.add(open, me(), &runs)?;
    device.withdraw()?;
    let stats = device.stats()?;
    ensure!(stats.list_pages == 1, "{stats:?}");
    ensure!(Physical::open()?.root(stats.root_pfn)?.active.is_none(), "something is published");
    expect("withdrawn", device.publish(Publish { generation: open, ..Publish::default() }), Errno::ESTALE)?;
    Ok(device.call(WITHDRAW, u64::MAX)?)
}

fn reads() -> Result<()> {
    let mut device = Device::open()?;
    expect("no room", device.read(15), Errno::EINVAL)?;
    expect("no request", device.read(16), Errno::EAGAIN)?;
    ensure!(!device.is_readable()?, "poll reports a request");
    let stats = device.stats()?;
    ensure!((stats.xen, stats.requests) == (u64::from(on_xen()), 0), "{stats:?}");
    // The cases before have published.
    ensure!((stats.signals > 0) == on_xen() && stats.untold == 0, "{stats:?}");
    Ok(())
}

fn full_memory() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::touched(1)?;
    let runs: Vec<_> = (0..u64::from(MAX_ADD)).map(|i| run_at(memory.address(0), 1, i << 20, 1)).collect();
    let physical = Physical::open()?;
    let generation = device.begin()?;
    let (mut listed, mut last) = (0, device.stats()?.list_pages);
    // Given back when all else is full, so that the test itself can go on. In small pages, and not by unmapping: to split a huge page
    // or a mapping the kernel wants memory first, and then it finds nobody but this process to kill for it.
    let ballast = Memory::small(2048)?;
    for _ in 0..1000 {
        match device.add(generation, me(), &runs) {
            // A page that the kernel moves at this moment, to make room, is left out.
            Ok((more, _)) => {
                listed += more;
                last = device.stats()?.list_pages;
            }
            Err(Errno::ENOMEM) => {
                ballast.discard(0, ballast.pages())?;
                let stats = device.stats()?;
                ensure!(stats.list_pages == last, "{} pages before the failure, {stats:?} after", last);
                ensure!(last > 1000, "only {last} pages fitted");
                device.publish(Publish { generation, ..Publish::default() })?;
                let slot = physical.root(stats.root_pfn)?.active.context("nothing is published")?;
                ensure!(slot.runs == listed, "{listed} were listed; a call that failed left runs: {slot:?}");
                device.withdraw()?;
                ensure!(device.stats()?.list_pages == 1, "{:?}", device.stats()?);
                return Ok(());
            }
            Err(other) => bail!("{other}"),
        }
    }
    bail!("memory never got full: {last} pages")
}

fn killed() -> Result<()> {
    let address = 0x1000_0000_0000_u64;
    let runs = vec![run_at(address, u16::MAX, 0, 1); MAX_ADD as usize];
    // SAFETY: this program has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            // Four thousand million pages that are not mapped: hours, if nobody could stop it.
            let result = Device::open().and_then(|device| device.add(device.begin()?, me(), &runs));
            println!("  not killed: {result:?}");
            std::process::exit(1);
        }
        ForkResult::Parent { child } => {
            std::thread::sleep(std::time::Duration::from_secs(2));
            nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
            let status = waitpid(child, None)?;
            ensure!(matches!(status, WaitStatus::Signaled(..)), "it ended with {status:?}");
            ensure!(Device::open()?.stats()?.list_pages == 1, "pages stayed");
            Ok(())
        }
    }
}

fn reloaded() -> Result<()> {
    let device = Device::open()?;
    expect("unload while it is open", unload(), Errno::EAGAIN)?;
    let memory = Memory::touched(1)?;
    let generation = device.begin()?;
    device.add(generation, me(), &[run_at(memory.address(0), 1, 0, 1)])?;
    device.publish(Publish { generation, ..Publish::default() })?;
    drop(device);
    unload()?;
    ensure!(!std::path::Path::new(DEVICE_PATH).exists(), "the device is still there");
    for _ in 0..20 {
        load()?;
        ensure!(Device::open()?.stats()?.generations == 0, "counters outlived the module");
        unload()?;
    }
    Ok(())
}
