//! A probed mysqld: attach, snapshot, keep the table, build lists.
//!
//! The order matters and is kept here: probes first, then the snapshot, then the events since (`frame_table.rs` says why). A new snapshot
//! is taken when events were lost or the pool has changed its shape.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use enlightenment::device::UserRun;
use thiserror::Error;

use crate::catalogue::{Build, Catalogue, CatalogueError};
use crate::control_blocks::{BlocksError, ControlBlocks, PoolVariables, SpacesInMemory};
use crate::coverage::{TableCoverage, by_table};
use crate::device::{Device, DeviceError, Translated};
use crate::disk::Disks;
use crate::elf::{Elf, ElfError};
use crate::event::EventKind;
use crate::frame_table::{Applied, FrameTable};
use crate::left_out::LeftOut;
use crate::lists::{self, ListError, ListSummary};
use crate::memory::ProcessMemory;
use crate::probes::{ProbeError, Probes, RING_BYTES};
use crate::process::{MysqldProcess, ProcessError};
use crate::spaces::Spaces;
use crate::storage_map::{DiskRule, StorageMap};
use crate::wrong_hints::WrongHints;

/// Before a snapshot, calls that were told of at their entry are given this time to come to their end.
const GRACE: Duration = Duration::from_millis(20);
/// How often a snapshot is taken anew because events were lost meanwhile; the rest is for the next time.
const SNAPSHOTS_AT_ONCE: u32 = 3;
/// Many frames differ when more than one of so many clean ones does: under load it is one of thousands.
const MANY_DIFFER: u64 = 100;
/// A pool that is changing its shape is looked at again after this time at the earliest.
const BETWEEN_SNAPSHOTS: Duration = Duration::from_secs(2);

/// Why a mysqld cannot be probed, or no lists can be built.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "each is what its source says")]
pub enum SessionError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Elf(#[from] ElfError),
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    #[error(transparent)]
    Probes(#[from] ProbeError),
    #[error(transparent)]
    Blocks(#[from] BlocksError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("cannot list the open files of mysqld: {0}")]
    Spaces(io::Error),
}

impl SessionError {
    /// Whether trying again with the same process is in vain: its program will not change.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Elf(_) | Self::Catalogue(_))
    }
}

impl<E: Into<SessionError>> From<ListError<E>> for SessionError {
    fn from(error: ListError<E>) -> Self {
        match error {
            ListError::Blocks(error) => Self::Blocks(error),
            ListError::Sink(error) => error.into(),
        }
    }
}

/// A running mysqld that is known: what can be read without any probe.
pub struct Server {
    /// The process.
    pub process: MysqldProcess,
    /// Its build.
    pub build: Build,
    exe: File,
    memory: ProcessMemory,
    variables: PoolVariables,
    /// Bytes from an address in the ELF file to the one in memory.
    bias: u64,
}

impl Server {
    /// Finds the mysqld and its build.
    ///
    /// # Errors
    /// [`SessionError`] when there is none, several, or none that is known.
    pub fn find(pid: Option<i32>) -> Result<Self, SessionError> {
        Self::open(MysqldProcess::find(pid)?)
    }

    /// Learns the build of a mysqld.
    ///
    /// # Errors
    /// [`SessionError`] when it is none that is known.
    pub fn open(process: MysqldProcess) -> Result<Self, SessionError> {
        let exe = process.exe()?;
        let elf = Elf::parse(&exe)?;
        let build = Catalogue::installed()?.find(&elf.build_id()?)?.clone();
        let bias = process.load_address()?.wrapping_sub(elf.first_address());
        let names = &build.variables;
        let [pools, pool_count, page_size] =
            elf.symbols(&[&names.pools, &names.pool_count, &names.page_size])?[..]
        else {
            return Err(ElfError::NoSymbol { symbol: names.pools.clone() }.into());
        };
        let at = |place: crate::elf::Place| bias.wrapping_add(place.address);
        let variables =
            PoolVariables { pools: at(pools), pool_count: at(pool_count), page_size: at(page_size) };
        let memory = process.memory();
        Ok(Self { process, build, exe, memory, variables, bias })
    }

    /// Its control blocks.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn control_blocks(&self) -> Result<ControlBlocks<'_, ProcessMemory>, SessionError> {
        let most_frames = self.process.most_frames()?;
        Ok(ControlBlocks::new(&self.memory, &self.build, self.variables, most_frames))
    }

    /// Attaches the probes.
    ///
    /// # Errors
    /// [`SessionError::Probes`].
    pub fn attach(&self, ring_bytes: u32) -> Result<Probes, SessionError> {
        Ok(Probes::attach(&self.process, &Elf::parse(&self.exe)?, &self.build, ring_bytes)?)
    }

    /// Bytes from an address in the ELF file to the one in memory.
    pub fn bias(&self) -> u64 {
        self.bias
    }

    /// Builds lists of what `table` trusts.
    ///
    /// # Errors
    /// [`SessionError`], or what `sink` returns.
    pub fn build_lists<E: Into<SessionError>>(
        &self,
        table: &FrameTable,
        storage: &mut StorageMap<'_>,
        sink: impl FnMut(&mut [UserRun]) -> Result<(), E>,
    ) -> Result<ListSummary, SessionError> {
        let spaces = SpacesInMemory::new(&self.memory, &self.build);
        Ok(lists::build(&self.control_blocks()?, spaces, table, storage, sink)?)
    }
}

/// Options of a session.
#[derive(Clone, Debug)]
pub struct Options {
    /// The process, where it is not the only mysqld.
    pub pid: Option<i32>,
    /// Bytes of the ring buffer, a power of two and of the page size.
    pub ring_bytes: u32,
    /// Which disks count.
    pub rule: DiskRule,
    /// Whether cached pages of files are listed, too ([`crate::page_cache`]).
    pub page_cache: bool,
    /// Seed of wrong hints.
    pub wrong_hints: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self { pid: None, ring_bytes: RING_BYTES, rule: DiskRule::Xen, page_cache: true, wrong_hints: None }
    }
}

/// A probed mysqld with its frame table.
pub struct Session {
    server: Server,
    probes: Probes,
    table: FrameTable,
    spaces: Spaces,
    disks: Disks,
    rule: DiskRule,
    wrong_hints: Option<WrongHints>,
    /// Events missed when the last snapshot began.
    missed_at_snapshot: u64,
    wants_snapshot: bool,
    wants_scan: bool,
    /// When the last snapshot ended, and how long it took.
    snapshot_at: Instant,
    snapshot_took: Duration,
    snapshots: u64,
    events: BTreeMap<EventKind, u64>,
}

impl Session {
    /// Attaches to the mysqld that is named, or the only one, and reads its pool.
    ///
    /// # Errors
    /// [`SessionError`]; then nothing stays attached.
    pub fn start(options: &Options) -> Result<Self, SessionError> {
        Self::attach(Server::find(options.pid)?, options)
    }

    /// Attaches to a running mysqld and reads its pool.
    ///
    /// # Errors
    /// [`SessionError`]; then nothing stays attached.
    pub fn attach(server: Server, options: &Options) -> Result<Self, SessionError> {
        // A server that is just starting has no pool yet: then no probe is worth its while.
        server.control_blocks()?.chunks()?;
        let probes = server.attach(options.ring_bytes)?;
        let spaces = Spaces::scan(&server.process).map_err(SessionError::Spaces)?;
        let mut session = Self {
            server,
            probes,
            table: FrameTable::default(),
            spaces,
            disks: Disks::default(),
            rule: options.rule,
            wrong_hints: options.wrong_hints.map(WrongHints::new),
            missed_at_snapshot: 0,
            wants_snapshot: true,
            wants_scan: false,
            snapshot_at: Instant::now(),
            snapshot_took: Duration::ZERO,
            snapshots: 0,
            events: BTreeMap::new(),
        };
        session.snapshot()?;
        session.drain()?;
        Ok(session)
    }

    /// Takes the events that wait. A snapshot that they ask for is taken when the last one is not too recent.
    ///
    /// # Errors
    /// [`SessionError`] when the process is gone.
    pub fn update(&mut self) -> Result<(), SessionError> {
        self.drain()?;
        if self.wants_snapshot && self.snapshot_at.elapsed() >= BETWEEN_SNAPSHOTS {
            self.snapshot()?;
            self.drain()?;
        }
        Ok(())
    }

    /// Like [`Session::update`], but what is asked for is done now.
    ///
    /// # Errors
    /// [`SessionError`] when the process is gone.
    pub fn settle(&mut self) -> Result<(), SessionError> {
        self.drain()?;
        for _ in 0..SNAPSHOTS_AT_ONCE {
            if self.wants_snapshot {
                self.snapshot()?;
                self.drain()?;
            }
        }
        if self.wants_scan {
            self.spaces = Spaces::scan(&self.server.process).map_err(SessionError::Spaces)?;
            self.wants_scan = false;
        }
        Ok(())
    }

    /// Reads the pool anew, whether or not anything asks for it.
    ///
    /// # Errors
    /// [`SessionError`] when the process is gone.
    pub fn snapshot_anew(&mut self) -> Result<(), SessionError> {
        self.snapshot()?;
        self.drain()
    }

    /// Builds lists as things are now and hands them to `sink`.
    ///
    /// # Errors
    /// [`SessionError`], or what `sink` returns.
    pub fn lists<E: Into<SessionError>>(
        &mut self,
        mut sink: impl FnMut(&mut [UserRun]) -> Result<(), E>,
    ) -> Result<ListSummary, SessionError> {
        self.settle()?;
        let mut storage = StorageMap::new(&self.spaces, &mut self.disks, self.rule);
        let wrong_hints = &mut self.wrong_hints;
        let summary = self.server.build_lists(&self.table, &mut storage, |runs| {
            if let Some(hints) = wrong_hints {
                hints.spoil(runs);
            }
            sink(runs)
        })?;
        self.wants_scan |= storage.found_moved_file();
        // Mostly events that are on their way; should one never have come, a new snapshot heals it.
        self.wants_snapshot |= summary.left_out.contains_key(&LeftOut::TableDiffers);
        Ok(summary)
    }

    /// Adds lists as things are now to a generation of the device.
    ///
    /// # Errors
    /// [`SessionError`]; the generation then has a part of them and is to be begun anew.
    pub fn add_lists(
        &mut self,
        device: &mut impl Device,
        generation: u64,
    ) -> Result<(ListSummary, Translated), SessionError> {
        let pid = self.server.process.pid;
        let mut translated = Translated::default();
        let lists = self.lists(|runs| {
            let added = device.add(generation, pid, runs)?;
            translated.listed += added.listed;
            translated.unmapped += added.unmapped;
            Ok::<(), DeviceError>(())
        })?;
        Ok((lists, translated))
    }

    /// Whether lists that are built once more would have notably more than these, just built: a file was found under no name that is
    /// known, or many frames have other pages than the table says, as when a pool that shrinks moves pages without any event. What heals
    /// that (a scan, a snapshot) is done before the next lists anyway.
    pub fn would_list_more(&self, lists: &ListSummary) -> bool {
        let differ = lists.left_out.get(&LeftOut::TableDiffers).copied().unwrap_or_default();
        self.wants_scan || differ * MANY_DIFFER > lists.pool_frames_clean
    }

    /// What of each table is in these lists.
    pub fn by_table(&self, lists: &ListSummary) -> Vec<TableCoverage> {
        by_table(self.server.process.pid, lists, &self.spaces)
    }

    /// The server.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// The frame table, up to the last event that was taken.
    pub fn table(&self) -> &FrameTable {
        &self.table
    }

    /// The probes.
    pub fn probes(&self) -> &Probes {
        &self.probes
    }

    /// The files of the tablespaces.
    pub fn spaces(&self) -> &Spaces {
        &self.spaces
    }

    /// Events taken so far, by kind.
    pub fn events(&self) -> &BTreeMap<EventKind, u64> {
        &self.events
    }

    /// Snapshots taken so far, and how long the last took.
    pub fn snapshots(&self) -> (u64, Duration) {
        (self.snapshots, self.snapshot_took)
    }

    /// Whether something has happened that only a new snapshot settles.
    pub fn wants_snapshot(&self) -> bool {
        self.wants_snapshot
    }

    /// Hints that were made wrong on purpose.
    pub fn hints_made_wrong(&self) -> u64 {
        self.wrong_hints.as_ref().map_or(0, WrongHints::made_wrong)
    }

    /// Becomes readable when many events wait.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.probes.wake_fd()
    }

    fn drain(&mut self) -> Result<(), SessionError> {
        let Self { probes, table, events, wants_snapshot, wants_scan, .. } = self;
        probes.drain(|kind, event| {
            *events.entry(kind).or_default() += 1;
            match table.apply(kind, event) {
                Applied::Yes => {}
                Applied::FileOpened => *wants_scan = true,
                Applied::NeedsSnapshot => *wants_snapshot = true,
            }
        });
        if probes.missed()?.total() != self.missed_at_snapshot {
            *wants_snapshot = true;
        }
        Ok(())
    }

    /// Reads the pool anew; the events from then on are applied to it afterwards. Events from before are not: where some were lost,
    /// an older one would undo what the pool says now. A call whose event is dropped here and that ends only after its block was read
    /// leaves a frame wrong until that one's next event; the lists' own look at the block covers it.
    fn snapshot(&mut self) -> Result<(), SessionError> {
        // Counted first: an event that is lost from here on asks for another snapshot.
        let missed = self.probes.missed()?.total();
        let events = &mut self.events;
        self.probes.drain(|kind, _| *events.entry(kind).or_default() += 1);
        std::thread::sleep(GRACE);
        let start = Instant::now();
        self.table = self.server.control_blocks()?.snapshot()?;
        self.missed_at_snapshot = missed;
        self.wants_snapshot = false;
        self.snapshot_at = Instant::now();
        self.snapshot_took = start.elapsed();
        self.snapshots += 1;
        tracing::debug!(frames = self.table.len(), took = ?self.snapshot_took, "snapshot");
        Ok(())
    }
}
