//! What the module and dom0 say to each other through xenstore. Only a guest of Xen has it; there this program stands in for dom0, since
//! the nodes lie where the guest may write.

use std::fs::File;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use enlightenment::device::{Publish, Stats};
use enlightenment::xenstore::{ANSWER, DIRECTORY, REQUEST, ROOT_PFN, VERSION};
use nix::errno::Errno;

use crate::cases::{expect, me, run_at};
use crate::device::Device;
use crate::memory::Memory;
use crate::on_xen;

/// How long a watch may take to fire.
const LIMIT: Duration = Duration::from_secs(120);
/// Generations that are published between "begun" and "ended".
const UNTOLD: u64 = 100;

// Xen's public/io/xs_wire.h.
const XS_READ: u32 = 2;
const XS_WRITE: u32 = 11;
const XS_RM: u32 = 13;
const XS_ERROR: u32 = 16;

/// The guest's own connection to xenstore.
struct Store(File);

impl Store {
    fn open() -> Result<Self> {
        let file = File::options().read(true).write(true).open("/dev/xen/xenbus");
        Ok(Self(file.context("cannot open xenstore")?))
    }

    /// One request: `struct xsd_sockmsg` {type, number, transaction, length} and what belongs to it; the answer has the same form.
    fn ask(&mut self, kind: u32, node: &str, value: &str) -> Result<String> {
        let path = if node.is_empty() { DIRECTORY.to_owned() } else { format!("{DIRECTORY}/{node}") };
        let body = [path.as_bytes(), b"\0", value.as_bytes()].concat();
        let mut message = Vec::new();
        for word in [kind, 0, 0, body.len() as u32] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.extend_from_slice(&body);
        self.0.write_all(&message).context("cannot write to xenstore")?;
        let mut head = [0; 16];
        self.0.read_exact(&mut head).context("cannot read from xenstore")?;
        let length = u32::from_le_bytes([head[12], head[13], head[14], head[15]]);
        let mut answer = vec![0; length as usize];
        self.0.read_exact(&mut answer).context("cannot read from xenstore")?;
        let answer = String::from_utf8_lossy(&answer).trim_end_matches('\0').to_owned();
        if head[..4] == XS_ERROR.to_le_bytes() {
            bail!("xenstore says {answer} of {path}");
        }
        Ok(answer)
    }

    fn write(&mut self, node: &str, value: &str) -> Result<()> {
        self.ask(XS_WRITE, node, value).map(drop)
    }

    fn read(&mut self, node: &str) -> Result<String> {
        self.ask(XS_READ, node, "")
    }
}

/// Looks at the counters until they are as they should be.
fn wait_for(device: &Device, what: &str, is_so: impl Fn(&Stats) -> bool) -> Result<Stats> {
    let start = Instant::now();
    loop {
        let stats = device.stats()?;
        if is_so(&stats) {
            return Ok(stats);
        }
        ensure!(start.elapsed() < LIMIT, "{what}: never, {stats:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn publish(device: &Device, memory: &Memory, answers: u64) -> Result<u64> {
    let generation = device.begin()?;
    device.add(generation, me(), &[run_at(memory.address(0), memory.pages() as u16, 0, 1)])?;
    device.publish(Publish { generation, answers, ..Publish::default() })?;
    Ok(generation)
}

/// Between "begun" and "ended" dom0 hears only what it has asked for, and afterwards once of all the rest.
pub fn quiet() -> Result<()> {
    if !on_xen() {
        println!("  no Xen here: there is nobody to be told");
        return Ok(());
    }
    let mut device = Device::open()?;
    let mut store = Store::open()?;
    let memory = Memory::touched(4)?;
    publish(&device, &memory, 0)?;
    let before = device.stats()?;
    store.write(REQUEST, "7 begun")?;
    wait_for(&device, "begun", |stats| stats.migrating == 1)?;
    for _ in 0..UNTOLD {
        publish(&device, &memory, 0)?;
    }
    let during = device.stats()?;
    ensure!(during.signals == before.signals, "signals during a migration: {before:?}, {during:?}");
    ensure!(during.untold == before.untold + UNTOLD, "{before:?}, {during:?}");
    store.write(REQUEST, "8 snapshot")?;
    wait_for(&device, "a snapshot is asked for", |stats| stats.requests == before.requests + 2)?;
    ensure!(device.is_readable()?, "poll reports no request");
    let generation = publish(&device, &memory, 8)?;
    ensure!(store.read(ANSWER)? == format!("8 {generation}"), "answer: {}", store.read(ANSWER)?);
    ensure!(device.stats()?.signals == before.signals + 1, "an answer is one signal: {:?}", device.stats()?);
    store.write(REQUEST, "9 ended")?;
    let after = wait_for(&device, "ended", |stats| stats.migrating == 0)?;
    ensure!(after.signals == before.signals + 2, "one signal for all that was not told: {after:?}");
    for _ in 0..3 {
        ensure!(device.read(16)? == 16, "three requests wait");
    }
    expect("a fourth request", device.read(16), Errno::EAGAIN)?;
    device.withdraw()?;
    println!(
        "  {UNTOLD} generations between begun and ended: {} signals, and one for the answer; one at the end",
        during.signals - before.signals
    );
    Ok(())
}

/// Nodes that somebody has removed are made again, as on another host, and requests are heard as before.
pub fn announced_again() -> Result<()> {
    if !on_xen() {
        println!("  no Xen here: there are no nodes");
        return Ok(());
    }
    let mut device = Device::open()?;
    let mut store = Store::open()?;
    let root = device.stats()?.root_pfn.to_string();
    ensure!(store.read(ROOT_PFN)? == root, "root at {}", store.read(ROOT_PFN)?);
    store.ask(XS_RM, "", "")?;
    let start = Instant::now();
    while store.read(VERSION).is_err() {
        ensure!(start.elapsed() < LIMIT, "the nodes are not made again");
        std::thread::sleep(Duration::from_millis(5));
    }
    ensure!(store.read(ROOT_PFN)? == root, "root at {}", store.read(ROOT_PFN)?);
    let before = device.stats()?;
    ensure!(before.xen == 1, "{before:?}");
    store.write(REQUEST, "1 snapshot")?;
    wait_for(&device, "a request after that", |stats| stats.requests == before.requests + 1)?;
    ensure!(device.read(16)? == 16, "the request waits");
    let generation = publish(&device, &Memory::touched(1)?, 1)?;
    ensure!(store.read(ANSWER)? == format!("1 {generation}"), "answer: {}", store.read(ANSWER)?);
    ensure!(device.stats()?.signals == before.signals + 1, "no event channel: {:?}", device.stats()?);
    Ok(device.withdraw()?)
}
