//! A kernel that is not one: pages in a map, processes as tables, xenstore and event channels as sets.
//!
//! It counts what is held, refuses what must never be done (freeing twice, closing what is not open), fails where a test
//! wants it to, and looks at the lists as dom0 would before each step of the core.
#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    reason = "each test uses a part of it, and ends where it cannot go on"
)]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};

use enlightenment::device::{ADD, Add, BEGIN, Begin, PUBLISH, Publish, STATS, Stats, UserRun, WITHDRAW};
use enlightenment::list::{ListError, RootView, Slot, parse_index, parse_leaf, parse_root};
use enlightenment::{ABI_VERSION, Generation, PAGE_SIZE, Pfn, Run};
use kernel_module::{Errno, Module, NOT_RAM, Shim};

/// Where the caller's structures lie.
pub const ARGUMENT: u64 = 0x10_0000;
/// Where its array of runs lies.
pub const ARRAY: u64 = 0x1000_0000;
/// The process whose pages are listed.
pub const PID: i32 = 77;
/// PFNs from here on belong to processes, those below to the kernel.
pub const FIRST_USER_PFN: u64 = 1 << 20;

pub type Page = [u8; PAGE_SIZE];

#[derive(Default)]
pub struct Fake {
    pages: HashMap<u64, Box<Page>>,
    /// Freed pages keep what was in them until they are given out again: the last freed first.
    freed: Vec<(u64, Box<Page>)>,
    next_pfn: u64,
    /// Calls that can fail and still succeed before one fails; `None`: that one has failed, or none will.
    pub failure_after: Option<usize>,
    /// Translations after which the process has ended: its memory is held, and empty.
    pub dies_after: Option<usize>,
    /// Allocations that still succeed; `None`: all.
    pub allocations_left: Option<usize>,
    pub user: BTreeMap<u64, Vec<u8>>,
    /// Calls of `copy_to_user` that still succeed.
    pub writes_left: Option<usize>,
    /// Page address to PFN, by process.
    pub processes: HashMap<i32, BTreeMap<u64, u64>>,
    pub held: usize,
    pub translations: usize,
    pub killed: bool,
    pub xenstore: BTreeMap<String, String>,
    pub xenstore_fails: bool,
    pub ports: BTreeSet<u32>,
    pub next_port: u32,
    pub no_ports: bool,
    pub signals: Vec<u32>,
    /// What each published generation holds; looked at before each step when `root` is set.
    pub published: BTreeMap<u64, Vec<Run>>,
    pub root: Option<u64>,
    pub observations: Cell<usize>,
    /// A reader that has read the root page, and goes on reading at every step.
    pub late_reader: RefCell<Option<(u64, Slot)>>,
    /// How often the late reader got its generation whole, and how often it noticed that it did not.
    pub late: Cell<(usize, usize)>,
}

impl Fake {
    pub fn new() -> Self {
        Self { next_pfn: 100, next_port: 5, ..Self::default() }
    }

    pub fn pages_held(&self) -> usize {
        self.pages.len()
    }

    /// A page as dom0 sees it: what a freed one held is still there.
    pub fn look(&self, pfn: u64) -> Option<&Page> {
        let freed = || self.freed.iter().find(|(freed, _)| *freed == pfn).map(|(_, page)| page);
        self.pages.get(&pfn).or_else(freed).map(|page| &**page)
    }

    pub fn view(&self) -> Result<RootView, ListError> {
        parse_root(self.look(self.root.unwrap()).unwrap())
    }

    /// Reads a generation through the parsers that dom0 uses; `None` as soon as anything is not as the slot says.
    pub fn read(&self, slot: &Slot) -> Option<Vec<Run>> {
        let (runs, indexes, leaves) = self.read_pages(slot)?;
        let whole = (indexes, leaves, runs.len() as u64) == (slot.index_pages, slot.leaf_pages, slot.runs);
        whole.then_some(runs)
    }

    /// The same without the slot's counts: what the pages alone say. Runs, index pages, leaves.
    fn read_pages(&self, slot: &Slot) -> Option<(Vec<Run>, u32, u64)> {
        let generation = Generation(slot.generation);
        let (mut runs, mut indexes, mut leaves) = (Vec::new(), 0, 0);
        let mut next = (slot.index_pages > 0).then_some(Pfn(slot.first_index_pfn));
        while let Some(pfn) = next {
            let index = parse_index(self.look(pfn.0)?, generation).ok()?;
            indexes += 1;
            if indexes > slot.index_pages {
                return None;
            }
            for leaf in index.leaves() {
                leaves += 1;
                for run in parse_leaf(self.look(leaf.0)?, generation).ok()? {
                    runs.push(run.ok()?);
                }
            }
            next = index.next;
        }
        Some((runs, indexes, leaves))
    }

    /// What a reader that begins now gets.
    pub fn read_active(&self) -> Option<(Slot, Vec<Run>)> {
        let slot = self.view().unwrap().active?;
        let runs = self.read(&slot).expect("the published generation must be whole");
        Some((slot, runs))
    }

    /// Whether this call is the one that fails.
    fn fails(&mut self) -> bool {
        match &mut self.failure_after {
            Some(0) => {
                self.failure_after = None;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    fn observe(&self) {
        if self.root.is_none() {
            return;
        }
        self.observations.set(self.observations.get() + 1);
        if let Some((slot, runs)) = self.read_active() {
            let expected = self.published.get(&slot.generation);
            assert!(Some(&runs) == expected, "dom0 does not see generation {} as published", slot.generation);
        }
        if let Some((began_at, slot)) = *self.late_reader.borrow() {
            // It may believe what it read as long as no more than one generation came after.
            let active = self.view().unwrap().active.map_or(0, |slot| slot.generation);
            let later =
                self.published.keys().filter(|&&number| began_at < number && number <= active).count();
            let believes = later <= 1 && active >= began_at;
            let (whole, noticed) = self.late.get();
            match self.read_pages(&slot) {
                Some((runs, ..)) if believes => {
                    assert!(Some(&runs) == self.published.get(&began_at), "a late reader was deceived");
                    self.late.set((whole + 1, noticed));
                }
                _ => self.late.set((whole, noticed + 1)),
            }
        }
    }

    /// Maps pages of a process.
    pub fn map(&mut self, address: u64, pfns: &[u64]) {
        let table = self.processes.entry(PID).or_default();
        for (i, pfn) in pfns.iter().enumerate() {
            table.insert(address + (i * PAGE_SIZE) as u64, *pfn);
        }
    }

    /// Puts bytes into the caller's memory.
    pub fn put(&mut self, address: u64, bytes: &[u8]) {
        self.user.insert(address, bytes.to_vec());
    }

    fn user_range(&mut self, address: u64, length: usize) -> Option<&mut [u8]> {
        let (start, bytes) = self.user.range_mut(..=address).next_back()?;
        let at = usize::try_from(address - start).ok()?;
        bytes.get_mut(at..at.checked_add(length)?)
    }
}

impl Shim for Fake {
    type Process = i32;

    fn allocate(&mut self) -> Option<Pfn> {
        self.observe();
        if self.fails() {
            return None;
        }
        if let Some(left) = &mut self.allocations_left {
            *left = left.checked_sub(1)?;
        }
        let pfn = self.freed.pop().map_or_else(
            || {
                self.next_pfn += 1;
                self.next_pfn
            },
            |(pfn, _)| pfn,
        );
        self.pages.insert(pfn, Box::new([0; PAGE_SIZE]));
        Some(Pfn(pfn))
    }

    fn free(&mut self, page: Pfn) {
        self.observe();
        let content = self.pages.remove(&page.0).expect("a page that is not held was freed");
        self.freed.push((page.0, content));
    }

    fn page(&mut self, page: Pfn) -> &mut Page {
        self.observe();
        self.pages.get_mut(&page.0).expect("a page that is not held was used")
    }

    fn store_release(&mut self, page: Pfn, offset: usize, value: u64) {
        self.observe();
        let page = self.pages.get_mut(&page.0).expect("a page that is not held was used");
        page[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        self.observe();
    }

    fn copy_from_user(&mut self, to: &mut [u8], address: u64) -> Result<(), Errno> {
        if self.fails() {
            return Err(Errno::EFAULT);
        }
        let length = to.len();
        to.copy_from_slice(self.user_range(address, length).ok_or(Errno::EFAULT)?);
        Ok(())
    }

    fn copy_to_user(&mut self, address: u64, from: &[u8]) -> Result<(), Errno> {
        if self.fails() {
            return Err(Errno::EFAULT);
        }
        if let Some(left) = &mut self.writes_left {
            *left = left.checked_sub(1).ok_or(Errno::EFAULT)?;
        }
        self.user_range(address, from.len()).ok_or(Errno::EFAULT)?.copy_from_slice(from);
        Ok(())
    }

    fn hold(&mut self, pid: i32) -> Result<i32, Errno> {
        if self.fails() || !self.processes.contains_key(&pid) {
            return Err(Errno::ESRCH);
        }
        self.held += 1;
        Ok(pid)
    }

    fn release(&mut self, _process: i32) {
        self.held -= 1;
    }

    fn translate(&mut self, process: &i32, address: u64, pfns: &mut [u64]) -> Result<usize, Errno> {
        self.translations += 1;
        if self.killed || self.fails() {
            return Err(Errno::EINTR);
        }
        if self.dies_after.is_some_and(|after| self.translations > after) {
            return Ok(0);
        }
        assert!(!pfns.is_empty(), "nothing to translate");
        let table = &self.processes[process];
        let mut count = 0;
        for pfn in pfns.iter_mut() {
            let Some(found) = table.get(&(address + (count * PAGE_SIZE) as u64)) else { break };
            *pfn = *found;
            count += 1;
        }
        Ok(count)
    }

    fn random(&mut self) -> u64 {
        0x5eed
    }

    fn xenstore_write(&mut self, node: &str, value: &str) -> bool {
        assert!(!node.contains('\0') && !value.contains('\0'));
        let fails = self.fails() || self.xenstore_fails;
        if !fails {
            self.xenstore.insert(node.to_owned(), value.to_owned());
        }
        !fails
    }

    fn xenstore_read(&mut self, node: &str, to: &mut [u8]) -> Option<usize> {
        if self.fails() {
            return None;
        }
        let value = self.xenstore.get(node)?.as_bytes();
        let length = value.len().min(to.len());
        to[..length].copy_from_slice(&value[..length]);
        Some(value.len())
    }

    fn xenstore_remove(&mut self) {
        self.xenstore.clear();
    }

    fn event_channel_allocate(&mut self) -> Option<u32> {
        if self.no_ports || self.fails() {
            return None;
        }
        self.next_port += 1;
        self.ports.insert(self.next_port);
        Some(self.next_port)
    }

    fn event_channel_signal(&mut self, port: u32) -> bool {
        if self.fails() {
            return false;
        }
        self.signals.push(port);
        self.ports.contains(&port)
    }

    fn event_channel_close(&mut self, port: u32) {
        assert!(self.ports.remove(&port), "a port that is not ours was closed");
    }
}

/// A module on a fake kernel, and its caller.
pub struct Machine {
    pub fake: Fake,
    pub module: Module,
}

impl Machine {
    /// A started module.
    pub fn new(on_xen: bool) -> Self {
        let mut machine = Self { fake: Fake::new(), module: Module::new() };
        machine.fake.put(ARGUMENT, &[0; 256]);
        machine.fake.processes.insert(PID, BTreeMap::new());
        machine.module.start(&mut machine.fake, on_xen).unwrap();
        machine.fake.root = Some(machine.stats().root_pfn);
        machine
    }

    pub fn call(&mut self, command: u32) -> Result<(), Errno> {
        self.module.ioctl(&mut self.fake, command, ARGUMENT)
    }

    fn argument(&self, offset: usize) -> u64 {
        let bytes = &self.fake.user[&ARGUMENT];
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    fn put_words(&mut self, words: &[u64]) {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.resize(256, 0);
        self.fake.put(ARGUMENT, &bytes);
    }

    pub fn begin_as(&mut self, begin: Begin) -> Result<u64, Errno> {
        self.put_words(&[u64::from(begin.version) | u64::from(begin.flags) << 32, begin.generation]);
        self.call(BEGIN)?;
        Ok(self.argument(8))
    }

    pub fn begin(&mut self) -> u64 {
        self.begin_as(Begin { version: ABI_VERSION, flags: 0, generation: 0 }).unwrap()
    }

    pub fn add_as(&mut self, add: Add) -> Result<(u64, u64), Errno> {
        let last = u64::from(add.count) | u64::from(add.pid as u32) << 32;
        self.put_words(&[add.generation, add.runs, last, add.pages_listed, add.pages_unmapped]);
        self.call(ADD)?;
        Ok((self.argument(24), self.argument(32)))
    }

    pub fn add(&mut self, generation: u64, runs: &[UserRun]) -> Result<(u64, u64), Errno> {
        let bytes: Vec<u8> = runs.iter().flat_map(user_run_bytes).collect();
        self.fake.put(ARRAY, &bytes);
        let count = runs.len() as u32;
        self.add_as(Add { generation, runs: ARRAY, count, pid: PID, pages_listed: 0, pages_unmapped: 0 })
    }

    pub fn publish_as(&mut self, publish: Publish) -> Result<(), Errno> {
        self.put_words(&[
            publish.generation,
            publish.answers,
            publish.frames_read,
            publish.frames_written,
            publish.pool_frames_clean,
            publish.pool_frames,
        ]);
        self.call(PUBLISH)
    }

    /// Publishes, where a reader must see exactly these runs from then on.
    pub fn publish(&mut self, generation: u64, runs: Vec<Run>) {
        self.fake.published.insert(generation, runs);
        self.publish_as(Publish { generation, ..Publish::default() }).unwrap();
    }

    pub fn withdraw(&mut self) {
        self.call(WITHDRAW).unwrap();
    }

    pub fn stats(&mut self) -> Stats {
        self.call(STATS).unwrap();
        Stats {
            generations: self.argument(0),
            pages_translated: self.argument(8),
            pages_unmapped: self.argument(16),
            requests: self.argument(24),
            signals: self.argument(32),
            list_pages: self.argument(40),
            root_pfn: self.argument(48),
            xen: self.argument(56),
            calls: self.argument(64),
            migrating: self.argument(72),
            untold: self.argument(80),
            requests_forgotten: self.argument(88),
        }
    }

    /// Stops the module; nothing may be left.
    pub fn stop(mut self) {
        self.fake.root = None;
        self.module.stop(&mut self.fake);
        assert_eq!(self.fake.pages_held(), 0, "pages are left");
        assert_eq!(self.fake.held, 0, "a process is still held");
        assert!(self.fake.xenstore.is_empty(), "nodes are left: {:?}", self.fake.xenstore);
    }
}

pub fn user_run_bytes(run: &UserRun) -> [u8; 24] {
    let mut out = [0; 24];
    out[0..8].copy_from_slice(&run.address.to_le_bytes());
    out[8..16].copy_from_slice(&run.disk_offset.to_le_bytes());
    out[16..20].copy_from_slice(&run.vdev.to_le_bytes());
    out[20..22].copy_from_slice(&run.pages.to_le_bytes());
    out[22] = run.list;
    out[23] = run.reserved;
    out
}

/// Every listed page by itself: PFN, offset, disk, list.
pub fn pages_of(runs: &[Run]) -> Vec<(u64, u64, u32, u8)> {
    runs.iter()
        .flat_map(|run| {
            (0..u64::from(run.pages)).map(move |page| {
                (run.pfn + page, run.disk_offset + page * PAGE_SIZE as u64, run.vdev, run.list)
            })
        })
        .collect()
}

/// The same of what was asked for, as far as it is mapped to ordinary memory.
pub fn expected_pages(fake: &Fake, runs: &[UserRun]) -> Vec<(u64, u64, u32, u8)> {
    let table = &fake.processes[&PID];
    runs.iter()
        .flat_map(|run| {
            (0..u64::from(run.pages)).filter_map(|page| {
                let pfn = *table.get(&(run.address + page * PAGE_SIZE as u64))?;
                let offset = run.disk_offset + page * PAGE_SIZE as u64;
                (pfn != NOT_RAM).then_some((pfn, offset, run.vdev, run.list))
            })
        })
        .collect()
}
