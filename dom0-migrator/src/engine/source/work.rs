//! What can be found out about a record's pages before its turn comes: zeros and hashes, on threads of their own.
//!
//! A worker takes a whole record, so there is nothing to hand to and fro for a page. What it finds depends on the record's bytes and
//! on the map alone, so it does not matter when it is found. Whether a page then goes by reference is decided by
//! the filter's thread, when the record's turn has come.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use enlightenment::Pfn;

use crate::engine::error::StreamProblem;
use crate::engine::intake::Dispatch;
use crate::engine::memory_record::Hash;
use crate::engine::page_hash::PageHasher;
use crate::engine::pool::Buffer;
use crate::engine::reference_map::{Place, ReferenceMap};
use crate::engine::xen_stream::{MAX_PAGE_DATA, NOTAB, PageData, RecordHeader, ZERO_PAGE, record};

use super::Request;
use super::side::Side;

/// What was found out about an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// It has no data.
    NoData,
    /// An ordinary page of zeros.
    Zero,
    /// Nothing that matters.
    Plain,
    /// A list says where it lies; not hashed, since the window had no room when it was looked at.
    Listed(Place),
    /// A list says where it lies, and the next of the record's hashes is its.
    Hashed(Place),
}

/// A record of memory and what was found out about it.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) header: RecordHeader,
    pub(super) body: Buffer,
    /// The pass that it belongs to, counted from 1; 0 after VERIFY.
    pub(super) pass: u32,
    /// What is wrong with it.
    pub(super) problem: Option<StreamProblem>,
    /// One for each entry; none when nothing was looked for.
    pub(super) classes: Vec<Class>,
    pub(super) hashes: Vec<Hash>,
    pub(super) hashing_seconds: f64,
}

/// A record that is being worked on.
pub(super) type Ticket = Receiver<Record>;

/// What was agreed with the target.
#[derive(Debug)]
pub(super) struct Agreed {
    hasher: PageHasher,
    /// Which of the map's disks the target has opened.
    opened: Vec<bool>,
}

impl Agreed {
    /// On this side channel.
    pub(super) fn on(side: &Side) -> Self {
        Self { hasher: PageHasher::new(&side.key), opened: side.disks.iter().map(Option::is_some).collect() }
    }

    fn is_open(&self, place: Place) -> bool {
        self.opened.get(place.disk as usize).copied().unwrap_or(false)
    }
}

/// What the workers know.
#[derive(Debug)]
pub(super) struct Knowledge {
    map: RwLock<Arc<ReferenceMap>>,
    /// None without a side channel: nothing is looked for then. Of one that comes late, from then on.
    pub(super) agreed: OnceLock<Agreed>,
    /// Passes in which pages may go by reference.
    pub(super) reference_passes: u32,
    /// Whether pages may go by reference at all; the filter's thread says when that ends.
    pub(super) may_refer: AtomicBool,
    /// Room in the window, as the filter's thread saw it last, or will have made when their turn has come: not worth hashing more.
    pub(super) room: AtomicUsize,
}

impl Knowledge {
    /// That pages lie where `map` says, if they may go by reference. `agreed` is none if that is yet to come, or will not.
    pub(super) fn new(map: ReferenceMap, agreed: Option<Agreed>, reference_passes: u32) -> Self {
        Self {
            map: RwLock::new(Arc::new(map)),
            agreed: agreed.map_or_else(OnceLock::new, Into::into),
            reference_passes,
            may_refer: AtomicBool::new(false),
            room: AtomicUsize::new(0),
        }
    }

    /// Where pages lie.
    pub(super) fn map(&self) -> Arc<ReferenceMap> {
        Arc::clone(&self.map.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Nothing goes by reference any more: lets go of the map, which takes 1 GiB for the largest guests.
    pub(super) fn forget_map(&self) {
        let none = Arc::new(ReferenceMap::new(Pfn(0)));
        let map = std::mem::replace(&mut *self.map.write().unwrap_or_else(PoisonError::into_inner), none);
        drop(map);
    }

    /// Looks at every page of a record.
    pub(super) fn work(&self, record: &mut Record) {
        let Some(agreed) = self.agreed.get() else { return };
        let length = record.header.length as usize;
        let Ok(pages) = PageData::parse(record.body.get(..length).unwrap_or(&record.body)) else { return };
        let refer = self.may_refer.load(Ordering::Relaxed) && record.pass <= self.reference_passes;
        let mut room = if refer { self.room.load(Ordering::Relaxed) } else { 0 };
        let mut listed = Vec::with_capacity(if refer { pages.pages() } else { 0 });
        let map = self.map();
        let mut places = map.cursor();
        record.classes.extend(pages.pages_by_entry().map(|(entry, page)| match page {
            None => Class::NoData,
            Some(page) if entry.page_type == NOTAB && page == ZERO_PAGE => Class::Zero,
            Some(page) if entry.page_type == NOTAB && refer => match places.lookup(Pfn(entry.pfn)) {
                None => Class::Plain,
                Some(place) if room > 0 && agreed.is_open(place) => {
                    room -= 1;
                    listed.push(page);
                    Class::Hashed(place)
                }
                Some(place) => Class::Listed(place),
            },
            Some(_) => Class::Plain,
        }));
        let began = Instant::now();
        agreed.hasher.hash_all(&listed, &mut record.hashes);
        record.hashing_seconds = began.elapsed().as_secs_f64();
    }
}

/// The workers.
#[derive(Debug)]
pub(super) struct Workers {
    jobs: Sender<(Record, Sender<Record>)>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts as many as are wanted.
    pub(super) fn start(count: usize, knowledge: &Arc<Knowledge>) -> std::io::Result<Self> {
        let (jobs, receiver) = bounded::<(Record, Sender<Record>)>(count);
        let mut this = Self { jobs, threads: Vec::new() };
        for number in 0..count {
            let (jobs, knowledge) = (receiver.clone(), Arc::clone(knowledge));
            let work = move || {
                while let Ok((mut record, done)) = jobs.recv() {
                    knowledge.work(&mut record);
                    // A filter that has ended no longer wants it.
                    let _ = done.send(record);
                }
            };
            this.threads.push(std::thread::Builder::new().name(format!("source-hash-{number}")).spawn(work)?);
        }
        Ok(this)
    }
}

/// The reading thread's part: it follows the passes and hands the records to the workers.
#[derive(Debug)]
pub(super) struct ToWorkers {
    pub(super) workers: Workers,
    pub(super) pass: Pass,
}

/// Where the stream is in memory. Within a pass PFNs ascend, and the first pass ends with the last PFN of all, so a PFN that
/// is not above the one before begins a new pass.
#[derive(Debug, Default)]
pub(super) struct Pass {
    number: u32,
    last_pfn: Option<u64>,
    verify: bool,
}

impl Pass {
    /// The number of the pass that these pages belong to.
    fn follow(&mut self, pages: &PageData<'_>) -> u32 {
        if self.verify {
            return 0;
        }
        let first = pages.entries().next().map_or(0, |entry| entry.pfn);
        if self.last_pfn.is_none_or(|last| first <= last) {
            self.number += 1;
        }
        self.last_pfn = pages.entries().last().map(|entry| entry.pfn);
        self.number
    }
}

impl Dispatch for ToWorkers {
    type Request = Request;
    type Record = Ticket;

    fn longest(&self, kind: u32) -> Option<usize> {
        (kind == record::PAGE_DATA).then_some(MAX_PAGE_DATA)
    }

    fn record(&mut self, header: RecordHeader, body: Buffer) -> Ticket {
        let (done, ticket) = bounded(1);
        // A PAGE_DATA that parses has a length of whole words, so `body` has no padding in it.
        let parsed = PageData::parse(body.get(..header.length as usize).unwrap_or(&body));
        let (pass, problem) = match parsed {
            Ok(pages) => (self.pass.follow(&pages), None),
            Err(problem) => (0, Some(problem)),
        };
        let (classes, hashes) = (Vec::new(), Vec::new());
        let record = Record { header, body, pass, problem, classes, hashes, hashing_seconds: 0.0 };
        if record.problem.is_some() || pass == 0 {
            let _ = done.send(record);
        } else {
            // Workers that are gone drop the ticket's other end, which the filter notices.
            let _ = self.workers.jobs.send((record, done));
        }
        ticket
    }

    fn other(&mut self, header: RecordHeader) {
        self.pass.verify |= header.kind == record::VERIFY;
    }

    fn asks_for_silence(request: &Request) -> bool {
        matches!(request, Request::Drain { .. } | Request::CatchUp(_))
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // Without a sender they end.
        self.jobs = bounded(0).0;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
