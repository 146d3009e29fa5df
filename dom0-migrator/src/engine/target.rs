//! The target's filter: between the network and libxenguest.
//!
//! One thread owns the table of references that are held, and both ends of the stream. Two threads serve the side channel, one
//! writing verdicts, one waiting for its end; the [`Restorer`]'s read disks.
//!
//! # The rule for a reference that is held
//! A reference is held from the moment at which it comes until libxenguest has been handed the page, or anything newer for
//! its PFN. What a reader brings is handed on only if the table still holds that very number for that PFN; so a load that
//! comes late never overwrites anything, and a verdict is given only once the page is in libxenguest's pipe. A refused
//! reference stays in the table too: memory is not whole until its page has come.
//!
//! For PVH and HVM guests an entry "allocate only" (XALLOC) goes ahead of a held page: newer versions of libxenguest build 2 MiB
//! superpages out of PFNs that come in order in the first pass, and would find holes otherwise.

use std::collections::HashMap;
use std::io::{IoSlice, Read as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::config::{Config, DiskName};
use super::descriptor::{Bell, Input, Output, Ringer, bell};
use super::disk::{Disk, DiskError};
use super::error::{EngineError, SideError, StreamProblem};
use super::memory_record::{self, MemoryRecord, PrivateRecord, SpanKind};
use super::restorer::{Batch, Key, Restorer, Wanted};
use super::side_message::{Answer, Hello, MAX_VERDICTS, Refusal, Report, Verdicts};
use super::summary::{DiskSummary, RefusalCounts, TargetStats, TargetSummary};
use super::xen_stream::{
    DOMAIN_HEADER, DOMAIN_HVM, Entry, IMAGE_HEADER, MAX_PAGE_DATA, MAX_RECORD, NOTAB, PAGE, PAGE_DATA_HEAD,
    PageData, RECORD_HEADER, RecordHeader, XALLOC, ZERO_PAGE, check_headers, domain_type, record,
};

/// How long the writer of verdicts may be blocked: a source that does not read them for so long is gone.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(30);

/// What a [`TargetFilter`] stands between.
#[derive(Debug)]
pub struct TargetParts {
    /// The way from the source; read up to the END record, and not a byte further.
    pub from_wire: OwnedFd,
    /// Where libxenguest reads.
    pub to_restore: OwnedFd,
    /// The side channel, a connected socket; `None`: the stream passes through unchanged.
    pub side: Option<OwnedFd>,
    /// Settings.
    pub config: Config,
}

/// The target's filter.
#[derive(Debug)]
pub struct TargetFilter {
    ringer: Ringer,
    aborted: Arc<AtomicBool>,
    stats: Arc<Mutex<TargetStats>>,
    thread: JoinHandle<Result<TargetSummary, EngineError>>,
}

impl TargetFilter {
    /// Starts the filter; the hello is answered by a thread of its own.
    ///
    /// # Errors
    /// [`EngineError::Start`] when threads or sockets cannot be had.
    pub fn start(parts: TargetParts) -> Result<Self, EngineError> {
        let TargetParts { from_wire, to_restore, side, config } = parts;
        let (ringer, bell) = bell().map_err(EngineError::Start)?;
        let aborted = Arc::new(AtomicBool::new(false));
        let stats = Arc::new(Mutex::new(TargetStats::default()));
        let side =
            side.map(|fd| Side::start(fd, &config, &ringer)).transpose().map_err(EngineError::Start)?;
        let mut filter = Filter {
            input: Input::new(from_wire),
            output: Output::new(to_restore),
            bell,
            ringer: ringer.clone(),
            aborted: Arc::clone(&aborted),
            phase: Phase::Memory,
            placeholders: false,
            side,
            session: None,
            held: HashMap::new(),
            next_number: 0,
            config,
            stats: TargetStats::default(),
            shared: Arc::clone(&stats),
            disks: Vec::new(),
            body: Vec::new(),
            head: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("target-filter".into())
            .spawn(move || {
                let result = filter.run();
                filter.publish();
                let poolskip = filter.session.take().is_some();
                if let Some(side) = filter.side.take() {
                    side.close(poolskip && result.is_ok());
                }
                let summary = TargetSummary { stats: filter.stats, poolskip, disks: filter.disks };
                result.map(|()| summary)
            })
            .map_err(EngineError::Start)?;
        Ok(Self { ringer, aborted, stats, thread })
    }

    /// The counters as they are now.
    pub fn stats(&self) -> TargetStats {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the filter's thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until END has been handed to libxenguest.
    ///
    /// # Errors
    /// What ended the filter before END.
    pub fn finish(self) -> Result<TargetSummary, EngineError> {
        self.thread.join().map_err(|_| EngineError::Panicked)?
    }

    /// Ends the filter at the next record boundary. A filter that is blocked in a read or a write notices only when its
    /// other side closes.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
        self.ringer.ring();
    }
}

/// What the hello agreed on.
#[derive(Debug)]
struct Agreed {
    key: [u8; 32],
    max_outstanding: u32,
    disks: Vec<Option<Disk>>,
    summaries: Vec<DiskSummary>,
}

/// One verdict.
type Verdict = (u64, Result<(), Refusal>);

/// What the filter has to say to the source.
#[derive(Debug)]
enum Saying {
    Verdicts(Vec<Verdict>),
    Synced(u64),
}

/// The side channel's threads.
#[derive(Debug)]
struct Side {
    agreed: Receiver<Agreed>,
    sayings: Sender<Saying>,
    lost: Arc<AtomicBool>,
    socket: UnixStream,
}

impl Side {
    fn start(fd: OwnedFd, config: &Config, ringer: &Ringer) -> std::io::Result<Self> {
        // Any stream socket will do: only read, write, timeouts and shutdown are used, which all of them share.
        let socket = UnixStream::from(fd);
        let serving = socket.try_clone()?;
        let (agreed_tx, agreed) = bounded(1);
        // Not more verdicts than references are outstanding, which the hello has bounded.
        let (sayings, sayings_rx) = unbounded();
        let lost = Arc::new(AtomicBool::new(false));
        let (config, ringer, lost_flag) = (config.clone(), ringer.clone(), Arc::clone(&lost));
        std::thread::Builder::new().name("target-side".into()).spawn(move || {
            if let Err(error) = serve(serving, &config, &agreed_tx, &sayings_rx, &lost_flag, &ringer) {
                tracing::warn!(%error, "side channel lost");
            }
            lost_flag.store(true, Ordering::Release);
            ringer.ring();
        })?;
        Ok(Self { agreed, sayings, lost, socket })
    }

    /// Ends the threads, and does not wait for them: nothing depends on them any more, since a source that has come to END
    /// has had every verdict that it needed. In peace what is still queued is sent first.
    fn close(self, in_peace: bool) {
        drop(self.sayings);
        if !in_peace {
            let _ = self.socket.shutdown(Shutdown::Both);
        }
    }
}

/// The side channel's life: hello, answer, verdicts.
fn serve(
    mut socket: UnixStream,
    config: &Config,
    agreed: &Sender<Agreed>,
    sayings: &Receiver<Saying>,
    lost: &Arc<AtomicBool>,
    ringer: &Ringer,
) -> Result<(), SideError> {
    let failed = |what| move |source| SideError::Io { what, source };
    socket.set_write_timeout(Some(VERDICT_TIMEOUT)).map_err(failed("setting a timeout"))?;
    let hello = Hello::read(&mut socket)?;
    let max_outstanding = hello.window_pages.min(config.max_outstanding);
    let opened: Vec<_> = hello.disks.iter().map(|disk| open_disk(disk, config)).collect();
    let summaries: Vec<_> = opened
        .iter()
        .zip(&hello.disks)
        .map(|(opened, name)| DiskSummary {
            vdev: name.vdev.0,
            size_bytes: opened.as_ref().map_or(0, Disk::size),
            problem: opened.as_ref().err().map(ToString::to_string),
        })
        .collect();
    let answer = Answer { max_outstanding, disks: summaries.clone() };
    let disks = opened.into_iter().map(Result::ok).collect();
    // The filter must have it before the source can send the first memory record.
    let _ = agreed.send(Agreed { key: hello.key, max_outstanding, disks, summaries });
    answer.write(&mut socket)?;

    // The source says nothing more; what a read brings is the end.
    let mut incoming = socket.try_clone().map_err(failed("copying the descriptor"))?;
    let (lost, ringer) = (Arc::clone(lost), ringer.clone());
    let watcher = std::thread::Builder::new()
        .name("target-side-end".into())
        .spawn(move || {
            let _ = incoming.read(&mut [0]);
            lost.store(true, Ordering::Release);
            ringer.ring();
        })
        .map_err(failed("starting the side channel's thread"))?;
    let result = write_sayings(&mut socket, sayings);
    let _ = socket.shutdown(Shutdown::Both);
    let _ = watcher.join();
    result
}

fn open_disk(name: &DiskName, config: &Config) -> Result<Disk, DiskError> {
    let path = match &config.own_disks {
        None => &name.path,
        Some(own) => {
            let own = own.iter().find(|own| own.vdev == name.vdev);
            &own.ok_or(DiskError::Unknown { vdev: name.vdev.0 })?.path
        }
    };
    let opened = Disk::open(path);
    match &opened {
        Ok(disk) => {
            tracing::info!(vdev = name.vdev.0, path = %path.display(), bytes = disk.size(), "disk opened")
        }
        Err(error) => tracing::warn!(vdev = name.vdev.0, %error, "disk not opened"),
    }
    opened
}

/// Sends what there is to say until the filter has ended, as many verdicts at once as are there.
fn write_sayings(socket: &mut UnixStream, sayings: &Receiver<Saying>) -> Result<(), SideError> {
    let mut accepted = Vec::new();
    let mut message = Verdicts::default();
    while let Ok(first) = sayings.recv() {
        accepted.clear();
        message.refused.clear();
        // A later sync number says all that an earlier one does, and what was said before it goes before it.
        let mut synced = None;
        let mut some = Some(first);
        while let Some(saying) = some {
            match saying {
                Saying::Synced(number) => synced = Some(number),
                Saying::Verdicts(verdicts) => {
                    for (number, outcome) in verdicts {
                        match outcome {
                            Ok(()) => accepted.push(number),
                            Err(reason) => message.refused.push((number, reason)),
                        }
                    }
                }
            }
            let full = accepted.len().max(message.refused.len()) >= MAX_VERDICTS;
            some = if full { None } else { sayings.try_recv().ok() };
        }
        accepted.sort_unstable();
        message.accepted.clear();
        for &number in &accepted {
            match message.accepted.last_mut() {
                Some((first, count)) if *first + u64::from(*count) == number => *count += 1,
                _ => message.accepted.push((number, 1)),
            }
        }
        message.write(socket)?;
        if let Some(number) = synced {
            Report::Synced(number).write(socket)?;
        }
    }
    Ok(())
}

/// Where the stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Memory may come in any form.
    Memory,
    /// After VERIFY: every page travels.
    Verify,
}

/// A side channel that has said hello.
#[derive(Debug)]
struct Session {
    restorer: Restorer,
    max_outstanding: u32,
    lost: bool,
}

/// A reference for which libxenguest has nothing yet.
#[derive(Clone, Copy, Debug)]
struct Held {
    number: u64,
    disk: u8,
    offset: u64,
    waits_for_reader: bool,
}

struct Filter {
    input: Input,
    output: Output,
    bell: Bell,
    ringer: Ringer,
    aborted: Arc<AtomicBool>,
    phase: Phase,
    placeholders: bool,
    side: Option<Side>,
    session: Option<Session>,
    held: HashMap<u64, Held>,
    next_number: u64,
    config: Config,
    stats: TargetStats,
    shared: Arc<Mutex<TargetStats>>,
    disks: Vec<DiskSummary>,
    body: Vec<u8>,
    head: Vec<u8>,
}

impl Filter {
    fn run(&mut self) -> Result<(), EngineError> {
        let mut headers = [0; IMAGE_HEADER + DOMAIN_HEADER];
        self.input.read_exact(&mut headers, "the image and domain headers")?;
        check_headers(&headers).map_err(EngineError::Header)?;
        self.output.write_all(&headers)?;
        self.placeholders = domain_type(&headers) == DOMAIN_HVM;
        loop {
            self.wait_for_input()?;
            let offset = self.input.offset();
            let mut bytes = [0; RECORD_HEADER];
            self.input.read_exact(&mut bytes, "a record's header")?;
            let header = RecordHeader::parse(&bytes, offset);
            if header.length > MAX_RECORD {
                let (length, expected) = (u64::from(header.length), u64::from(MAX_RECORD));
                return Err(header.error(StreamProblem::Length { length, expected }));
            }
            match header.kind {
                record::PAGE_DATA => self.page_data(header)?,
                memory_record::RECORD_TYPE => self.private_record(header)?,
                record::CHECKPOINT | record::CHECKPOINT_DIRTY_PFN_LIST => {
                    return Err(header.error(StreamProblem::Checkpoint));
                }
                kind => self.other_record(header, kind)?,
            }
            if header.kind == record::END {
                return Ok(());
            }
        }
    }

    fn publish(&mut self) {
        self.stats.bytes_in = self.input.offset();
        self.stats.bytes_out = self.output.bytes();
        self.stats.references_outstanding = self.held.len() as u64;
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&self.stats);
    }

    /// Between records: hands loaded pages on until there is something to read.
    fn wait_for_input(&mut self) -> Result<(), EngineError> {
        loop {
            if self.aborted.load(Ordering::Relaxed) {
                return Err(EngineError::Aborted);
            }
            self.notice_agreement()?;
            self.notice_loss();
            self.take_loaded()?;
            self.publish();
            if self.input.wait(&self.bell, None)? {
                return Ok(());
            }
        }
    }

    fn notice_agreement(&mut self) -> Result<(), EngineError> {
        if self.session.is_some() {
            return Ok(());
        }
        let Some(agreed) = self.side.as_ref().and_then(|side| side.agreed.try_recv().ok()) else {
            return Ok(());
        };
        self.disks = agreed.summaries;
        let restorer = Restorer::start(agreed.key, agreed.disks, &self.config, &self.ringer);
        self.session = Some(Session {
            restorer: restorer.map_err(EngineError::Start)?,
            max_outstanding: agreed.max_outstanding,
            lost: false,
        });
        Ok(())
    }

    /// Without a side channel no verdict can be given: the source sends all pages that are not settled, and reading stops.
    fn notice_loss(&mut self) {
        let Some((side, session)) = self.side.as_ref().zip(self.session.as_mut()) else { return };
        // A source that is done closes the side channel too; that is no loss.
        if side.lost.load(Ordering::Acquire) && !session.lost && !self.held.is_empty() {
            session.lost = true;
            session.restorer.cancel_all();
            self.stats.side_channel_lost = true;
            tracing::warn!(held = self.held.len(), "side channel lost: waiting for the pages themselves");
        }
    }

    /// Hands on what the readers have brought.
    fn take_loaded(&mut self) -> Result<(), EngineError> {
        loop {
            let Some(session) = &self.session else { return Ok(()) };
            let Ok(batch) = session.restorer.results.try_recv() else { return Ok(()) };
            self.hand_on(&batch)?;
            if let Some(session) = &self.session {
                session.restorer.recycle(batch);
            }
        }
    }

    fn hand_on(&mut self, batch: &Batch) -> Result<(), EngineError> {
        self.stats.disk_reads += 1;
        self.stats.disk_bytes += batch.bytes;
        self.stats.disk_seconds += batch.read_seconds;
        self.stats.hashing_seconds += batch.hash_seconds;
        let mut verdicts = Vec::with_capacity(batch.loaded.len());
        let mut pages = PageDataOut::default();
        for loaded in &batch.loaded {
            let Some(held) = self.held.get_mut(&loaded.pfn).filter(|held| held.number == loaded.number)
            else {
                continue;
            };
            match loaded.outcome {
                Ok(at) => {
                    self.held.remove(&loaded.pfn);
                    pages.push(Entry { pfn: loaded.pfn, page_type: NOTAB }, Some(batch.page(at)));
                    self.stats.references_accepted += 1;
                    verdicts.push((loaded.number, Ok(())));
                }
                Err(reason) => {
                    held.waits_for_reader = false;
                    count_refusal(&mut self.stats.refused, reason);
                    verdicts.push((loaded.number, Err(reason)));
                }
            }
        }
        pages.write(&mut self.head, &mut self.output)?;
        self.give_verdicts(verdicts);
        Ok(())
    }

    fn give_verdicts(&self, verdicts: Vec<Verdict>) {
        if !verdicts.is_empty() {
            self.say(Saying::Verdicts(verdicts));
        }
    }

    fn say(&self, saying: Saying) {
        // A side channel that is lost is noticed elsewhere.
        if let Some(side) = &self.side {
            let _ = side.sayings.send(saying);
        }
    }

    /// Drops the reference held for the PFN, since something newer has come.
    fn supersede(&mut self, pfn: u64, cancelled: &mut Vec<Key>) {
        if self.held.is_empty() {
            return;
        }
        if let Some(held) = self.held.remove(&pfn)
            && held.waits_for_reader
        {
            self.stats.references_superseded += 1;
            cancelled.push(Key { disk: held.disk, offset: held.offset, number: held.number });
        }
    }

    fn cancel(&self, cancelled: &[Key]) {
        if let Some(session) = &self.session {
            session.restorer.cancel(cancelled);
        }
    }

    fn other_record(&mut self, header: RecordHeader, kind: u32) -> Result<(), EngineError> {
        if self.side.is_some() {
            if kind > record::LAST_KNOWN && kind & record::OPTIONAL == 0 {
                return Err(header.error(StreamProblem::Unknown));
            }
            if !self.held.is_empty() {
                return Err(header.error(StreamProblem::Unsettled(self.held.len() as u64)));
            }
        }
        if kind == record::VERIFY {
            self.phase = Phase::Verify;
        }
        self.output.write_all(&RecordHeader::bytes(header.kind, header.length as usize))?;
        let mut left = header.padded();
        self.body.resize(left.min(1 << 20) as usize, 0);
        while left > 0 {
            let Some(piece) = self.body.get_mut(..left.min(1 << 20) as usize) else { break };
            self.input.read_exact(piece, "a record's body")?;
            self.output.write_all(piece)?;
            left -= piece.len() as u64;
        }
        Ok(())
    }

    /// Reads a body of bounded length into the buffer, which is taken out so that its borrow does not stand in the way.
    fn read_body(
        &mut self,
        header: RecordHeader,
        most: usize,
        what: &'static str,
    ) -> Result<Vec<u8>, EngineError> {
        let padded = header.padded();
        if padded > most as u64 {
            let (length, expected) = (u64::from(header.length), most as u64);
            return Err(header.error(StreamProblem::Length { length, expected }));
        }
        let mut body = std::mem::take(&mut self.body);
        body.resize(padded as usize, 0);
        self.input.read_exact(&mut body, what)?;
        Ok(body)
    }

    fn page_data(&mut self, header: RecordHeader) -> Result<(), EngineError> {
        let body = self.read_body(header, MAX_PAGE_DATA, "PAGE_DATA")?;
        // A PAGE_DATA that parses has a length of whole words, so `body` has no padding in it.
        let pages = PageData::parse(body.get(..header.length as usize).unwrap_or(&body))
            .map_err(|problem| header.error(problem))?;
        let mut cancelled = Vec::new();
        for entry in pages.entries() {
            self.supersede(entry.pfn, &mut cancelled);
        }
        self.cancel(&cancelled);
        if self.phase == Phase::Memory {
            self.stats.pages_raw += pages.pages() as u64;
            self.stats.pages_without_data += (pages.count() - pages.pages()) as u64;
        }
        let head = RecordHeader::bytes(header.kind, header.length as usize);
        self.output.write_slices(&mut [IoSlice::new(&head), IoSlice::new(&body)])?;
        self.body = body;
        Ok(())
    }

    fn private_record(&mut self, header: RecordHeader) -> Result<(), EngineError> {
        if self.phase == Phase::Verify {
            return Err(header.error(StreamProblem::Forbidden("after VERIFY every page travels as it is")));
        }
        self.notice_agreement()?;
        if self.session.is_none() {
            return Err(header.error(StreamProblem::Forbidden("no hello has been answered")));
        }
        let body = self.read_body(header, memory_record::MAX_BODY, "a private record")?;
        let record = PrivateRecord::parse(body.get(..header.length as usize).unwrap_or(&body))
            .map_err(|problem| header.error(problem))?;
        match record {
            PrivateRecord::Memory(record) => self.rebuild(header, &record)?,
            // What came before has been handed on before this record was read.
            PrivateRecord::Sync(number) => self.say(Saying::Synced(number)),
        }
        self.body = body;
        Ok(())
    }

    fn rebuild(&mut self, header: RecordHeader, record: &MemoryRecord<'_>) -> Result<(), EngineError> {
        if record.first_reference != self.next_number {
            let (found, expected) = (record.first_reference, self.next_number);
            return Err(header.error(StreamProblem::Sequence { found, expected }));
        }
        let mut pages = record.data.chunks_exact(PAGE);
        let mut hashes = record.hashes();
        let mut out = PageDataOut::default();
        let (mut cancelled, mut verdicts) = (Vec::new(), Vec::new());
        let mut wanted = Vec::with_capacity(record.references());
        for span in record.spans() {
            for (index, entry) in span.entries().enumerate() {
                self.supersede(entry.pfn, &mut cancelled);
                match span.kind {
                    SpanKind::Raw => {
                        out.push(entry, pages.next());
                        self.stats.pages_raw += 1;
                    }
                    SpanKind::Zero => {
                        out.push(entry, Some(&ZERO_PAGE));
                        self.stats.pages_zero += 1;
                    }
                    SpanKind::NoData => {
                        out.push(entry, None);
                        self.stats.pages_without_data += 1;
                    }
                    SpanKind::Reference { disk, offset } => {
                        let Some(hash) = hashes.next() else { continue };
                        // The parser has checked that the span's end does not overflow.
                        let offset = offset + (index * PAGE) as u64;
                        let number = self.next_number;
                        self.next_number += 1;
                        if self.placeholders {
                            out.push(Entry { pfn: entry.pfn, page_type: XALLOC }, None);
                        }
                        let refused = self.hold(header, entry.pfn, number, disk, offset)?;
                        match refused {
                            Some(reason) => verdicts.push((number, Err(reason))),
                            None => {
                                wanted.push((Key { disk, offset, number }, Wanted { pfn: entry.pfn, hash }))
                            }
                        }
                    }
                }
            }
        }
        self.cancel(&cancelled);
        out.write(&mut self.head, &mut self.output)?;
        let peak = &mut self.stats.references_outstanding_peak;
        *peak = (*peak).max(self.held.len() as u64);
        if let Some(session) = self.session.as_ref().filter(|session| !session.lost && !wanted.is_empty()) {
            // A PFN may stand twice in a record: the later entry has superseded the earlier.
            let held = &self.held;
            session.restorer.push(
                wanted.into_iter().filter(|(key, wanted)| {
                    held.get(&wanted.pfn).is_some_and(|held| held.number == key.number)
                }),
            );
        }
        self.give_verdicts(verdicts);
        Ok(())
    }

    /// Holds a reference; `Some` when it is refused at once.
    fn hold(
        &mut self,
        header: RecordHeader,
        pfn: u64,
        number: u64,
        disk: u8,
        offset: u64,
    ) -> Result<Option<Refusal>, EngineError> {
        self.stats.references += 1;
        let Some(session) = &self.session else { return Ok(Some(Refusal::UnknownDisk)) };
        if self.held.len() as u64 >= u64::from(session.max_outstanding) {
            return Err(header.error(StreamProblem::Outstanding(self.held.len() as u64 + 1)));
        }
        let refused = session.restorer.check(disk, offset).err();
        if let Some(reason) = refused {
            count_refusal(&mut self.stats.refused, reason);
        }
        self.held.insert(pfn, Held { number, disk, offset, waits_for_reader: refused.is_none() });
        Ok(refused)
    }
}

fn count_refusal(counts: &mut RefusalCounts, reason: Refusal) {
    match reason {
        Refusal::Hash => counts.hash += 1,
        Refusal::IoError => counts.io_error += 1,
        Refusal::OutOfBounds => counts.out_of_bounds += 1,
        Refusal::UnknownDisk => counts.unknown_disk += 1,
    }
}

/// A PAGE_DATA record in the making, out of pages that lie anywhere.
#[derive(Default)]
struct PageDataOut<'a> {
    entries: Vec<Entry>,
    pages: Vec<&'a [u8]>,
}

impl<'a> PageDataOut<'a> {
    fn push(&mut self, entry: Entry, page: Option<&'a [u8]>) {
        self.entries.push(entry);
        self.pages.extend(page);
    }

    /// Writes the record, unless it is empty. It has at most 1,024 entries, since memory records and batches have.
    fn write(self, head: &mut Vec<u8>, output: &mut Output) -> Result<(), EngineError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let length = PAGE_DATA_HEAD + self.entries.len() * 8 + self.pages.len() * PAGE;
        head.clear();
        head.extend_from_slice(&RecordHeader::bytes(record::PAGE_DATA, length));
        head.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        for entry in &self.entries {
            head.extend_from_slice(&entry.word().to_le_bytes());
        }
        let pages = self.pages.iter().map(|page| IoSlice::new(page));
        let mut slices: Vec<_> = std::iter::once(IoSlice::new(head)).chain(pages).collect();
        output.write_slices(&mut slices)
    }
}
