//! The source's filter: between libxenguest and the network.
//!
//! One thread owns the window and both ends of the stream, so that the order in which it handles things *is* the order of
//! truth: what it writes later is newer. A second thread only reads the side channel and hands verdicts over.
//!
//! # The rule for a page that goes by reference
//! What one would like is to forget a page once its reference is sent. But the target may refuse it, much later, when the
//! guest has long written to the page and libxenguest will not send it again before the next pass, or, after suspension,
//! never. So the bytes that were hashed are kept (the [`Window`]) until one of these comes to pass, whichever is first:
//!
//! * the target accepts: the bytes are in libxenguest's hands there; forget them;
//! * the target refuses: send the bytes, as ordinary PAGE_DATA, and forget them;
//! * an entry of any type for the same PFN comes: it is newer; forget them. A verdict that is already on its way names the
//!   reference by number, and a number that is settled is not looked at again;
//! * time is over, or the side channel is lost: send the bytes, as if refused.
//!
//! In every case what the target knows last about the PFN is what libxenguest sent last.

use std::io::IoSlice;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::config::{Config, DiskName};
use super::descriptor::{Bell, Input, Output, Ringer, bell};
use super::error::{EngineError, SideError, StreamProblem};
use super::memory_record::{self, Builder, SpanKind};
use super::reference_map::ReferenceMap;
use super::side_message::{Answer, Hello, Refusal, Report, Verdicts};
use super::summary::{DrainReport, SourceStats, SourceSummary};
use super::window::{Retained, Window};
use super::xen_stream::{
    DOMAIN_HEADER, Entry, IMAGE_HEADER, MAX_BATCH, MAX_PAGE_DATA, MAX_RECORD, NOTAB, PAGE, PAGE_DATA_HEAD,
    PageData, RECORD_HEADER, RecordHeader, ZERO_PAGE, check_headers, is_page_table, record,
};

/// What a [`SourceFilter`] stands between, and what it knows.
#[derive(Debug)]
pub struct SourceParts {
    /// Where libxenguest's stream comes out: the reading end of a pipe or a socket pair.
    pub from_save: OwnedFd,
    /// The way to the target.
    pub to_wire: OwnedFd,
    /// The side channel, a connected socket; `None`: the stream passes through unchanged.
    pub side: Option<OwnedFd>,
    /// Where pages lie.
    pub map: ReferenceMap,
    /// The domain's disks, as the target is to find them.
    pub disks: Vec<DiskName>,
    /// Settings.
    pub config: Config,
}

/// What libxenguest's thread asks of the filter's.
#[derive(Debug)]
enum Request {
    Round(u32),
    Drain(Sender<DrainReport>),
    Suspended,
}

/// The source's filter.
#[derive(Debug)]
pub struct SourceFilter {
    requests: Sender<Request>,
    ringer: Ringer,
    aborted: Arc<AtomicBool>,
    stats: Arc<Mutex<SourceStats>>,
    thread: JoinHandle<Result<SourceSummary, EngineError>>,
}

impl SourceFilter {
    /// Says hello on the side channel, if there is one, and starts the filter. A side channel that does not answer is as good
    /// as none: the stream passes through, and the summary says so.
    ///
    /// # Errors
    /// [`EngineError::Start`] when threads or sockets cannot be had.
    pub fn start(parts: SourceParts) -> Result<Self, EngineError> {
        let SourceParts { from_save, to_wire, side, mut map, disks, config } = parts;
        map.seal();
        let (ringer, bell) = bell().map_err(EngineError::Start)?;
        let (requests, requests_rx) = unbounded();
        let aborted = Arc::new(AtomicBool::new(false));
        let stats = Arc::new(Mutex::new(SourceStats::default()));
        let mut summary = SourceSummary { pages_mapped: map.len(), ..SourceSummary::default() };
        let side =
            side.map(|fd| Side::open(fd, &disks, &map, &config, &ringer)).and_then(|opened| match opened {
                Ok((side, answer)) => {
                    summary.poolskip = true;
                    summary.disks = answer.disks;
                    Some(side)
                }
                Err(error) => {
                    tracing::warn!(%error, "no side channel: everything goes raw");
                    summary.stats.side_channel_lost = true;
                    None
                }
            });
        let window = Window::new(side.as_ref().map_or(0, |side| side.window_pages));
        let mut filter = Filter {
            input: Input::new(from_save),
            output: Output::new(to_wire),
            bell,
            requests: requests_rx,
            aborted: Arc::clone(&aborted),
            mode: if side.is_some() { Mode::Filter } else { Mode::PassThrough },
            may_refer: side.is_some() && config.references,
            side,
            map,
            window,
            config,
            drain: None,
            syncs: (0, 0),
            pass: Pass::default(),
            stats: summary.stats.clone(),
            shared: Arc::clone(&stats),
            body: Vec::new(),
            builder: Builder::default(),
            head: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("source-filter".into())
            .spawn(move || {
                let result = filter.run();
                if let Some(side) = filter.side.take() {
                    side.close();
                }
                filter.publish();
                summary.stats = filter.stats;
                result.map(|()| summary)
            })
            .map_err(EngineError::Start)?;
        Ok(Self { requests, ringer, aborted, stats, thread })
    }

    fn ask(&self, request: Request) {
        // A filter that has ended is noticed by `drain` and `finish`.
        let _ = self.requests.send(request);
        self.ringer.ring();
    }

    /// Tells that libxenguest begins a pass over memory (0 is the first).
    pub fn enter_round(&self, iteration: u32) {
        self.ask(Request::Round(iteration));
    }

    /// Call from libxenguest's thread, in the precopy policy, just before the domain is suspended. Returns when everything
    /// written so far has been consumed and no reference is outstanding any more: what is not settled within
    /// [`Config::drain_timeout`] is sent as it is. It also waits until the target has handed all of that to libxenguest, so that
    /// nothing of it is still on the way while the domain is suspended. From then on nothing goes by reference.
    ///
    /// # Errors
    /// [`EngineError::Gone`] when the filter has ended; [`finish`](Self::finish) tells why.
    pub fn drain(&self) -> Result<DrainReport, EngineError> {
        let (reply, report) = bounded(1);
        self.ask(Request::Drain(reply));
        report.recv().map_err(|_| EngineError::Gone)
    }

    /// Tells that the domain is suspended: nothing goes by reference from here on, drained or not.
    pub fn suspended(&self) {
        self.ask(Request::Suspended);
    }

    /// The counters as they are now.
    pub fn stats(&self) -> SourceStats {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the filter's thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the end of the stream; the save side must have closed its end, or do so. On success everything up to the END
    /// record is on the wire.
    ///
    /// # Errors
    /// What ended the filter before END.
    pub fn finish(self) -> Result<SourceSummary, EngineError> {
        self.thread.join().map_err(|_| EngineError::Panicked)?
    }

    /// Ends the filter at the next record boundary. A filter that is blocked in a read or a write notices only when its
    /// other side closes.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
        self.ringer.ring();
    }
}

/// What came over the side channel.
#[derive(Debug)]
enum SideEvent {
    Report(Report),
    Lost(SideError),
}

/// The side channel, once it is open.
#[derive(Debug)]
struct Side {
    key: [u8; 32],
    window_pages: u32,
    /// For each disk of the map: its index in the hello, if the target has opened it.
    disks: Vec<Option<u8>>,
    events: Receiver<SideEvent>,
    socket: UnixStream,
    reader: JoinHandle<()>,
}

impl Side {
    fn open(
        fd: OwnedFd,
        disks: &[DiskName],
        map: &ReferenceMap,
        config: &Config,
        ringer: &Ringer,
    ) -> Result<(Self, Answer), SideError> {
        let failed = |what| move |source| SideError::Io { what, source };
        // Any stream socket will do: only read, write, timeouts and shutdown are used, which all of them share.
        let mut socket = UnixStream::from(fd);
        let timeout = Some(config.hello_timeout);
        socket.set_read_timeout(timeout).map_err(failed("setting a timeout"))?;
        socket.set_write_timeout(timeout).map_err(failed("setting a timeout"))?;
        let wanted = u32::try_from(config.window_bytes / PAGE as u64).unwrap_or(u32::MAX);
        let hello = Hello { key: random_key()?, window_pages: wanted, disks: disks.to_vec() };
        hello.write(&mut socket)?;
        let answer = Answer::read(&mut socket)?;
        if answer.disks.len() != disks.len()
            || answer.disks.iter().zip(disks).any(|(a, d)| a.vdev != d.vdev.0)
        {
            return Err(SideError::Malformed("the answer is about other disks"));
        }
        for disk in &answer.disks {
            match &disk.problem {
                None => tracing::info!(vdev = disk.vdev, bytes = disk.size_bytes, "target opened the disk"),
                Some(problem) => tracing::warn!(vdev = disk.vdev, problem, "target did not open the disk"),
            }
        }
        let opened = |vdev| {
            let index = answer.disks.iter().position(|disk| disk.vdev == vdev && disk.problem.is_none())?;
            u8::try_from(index).ok()
        };
        let usable = map.vdevs().iter().map(|vdev| opened(vdev.0)).collect();
        socket.set_read_timeout(None).map_err(failed("setting a timeout"))?;
        let mut incoming = socket.try_clone().map_err(failed("copying the descriptor"))?;
        let (events_tx, events) = bounded(256);
        let ringer = ringer.clone();
        let reader = std::thread::Builder::new()
            .name("source-side".into())
            .spawn(move || {
                loop {
                    let event = Report::read(&mut incoming).map_or_else(SideEvent::Lost, SideEvent::Report);
                    let lost = matches!(event, SideEvent::Lost(_));
                    let gone = events_tx.send(event).is_err();
                    ringer.ring();
                    if lost || gone {
                        return;
                    }
                }
            })
            .map_err(failed("starting the side channel's thread"))?;
        let window_pages = wanted.min(answer.max_outstanding);
        Ok((Self { key: hello.key, window_pages, disks: usable, events, socket, reader }, answer))
    }

    fn close(self) {
        drop(self.events);
        let _ = self.socket.shutdown(Shutdown::Both);
        let _ = self.reader.join();
    }
}

fn random_key() -> Result<[u8; 32], SideError> {
    use std::io::Read as _;
    let mut key = [0; 32];
    let mut file = std::fs::File::open("/dev/urandom").map_err(SideError::Random)?;
    file.read_exact(&mut key).map_err(SideError::Random)?;
    Ok(key)
}

/// How memory is treated now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// No side channel: every byte as it is.
    PassThrough,
    /// Markers and references.
    Filter,
    /// After VERIFY: every byte as it is, and counted apart.
    Verify,
}

/// Where the stream is in memory. Within a pass PFNs ascend, and the first pass ends with the last PFN of all, so a PFN that
/// is not above the one before begins a new pass.
#[derive(Debug, Default)]
struct Pass {
    number: u32,
    last_pfn: Option<u64>,
}

/// A drain under way.
#[derive(Debug)]
struct Drain {
    reply: Sender<DrainReport>,
    began: Instant,
    report: DrainReport,
    /// Counters when it began: accepted, refused.
    before: (u64, u64),
    /// Number of the sync record that was sent when nothing was outstanding any more.
    sync: Option<u64>,
}

/// What the filter's thread owns.
struct Filter {
    input: Input,
    output: Output,
    bell: Bell,
    requests: Receiver<Request>,
    aborted: Arc<AtomicBool>,
    side: Option<Side>,
    mode: Mode,
    may_refer: bool,
    map: ReferenceMap,
    window: Window,
    config: Config,
    drain: Option<Drain>,
    /// Number of the last sync record sent, and of the last one answered.
    syncs: (u64, u64),
    pass: Pass,
    stats: SourceStats,
    shared: Arc<Mutex<SourceStats>>,
    body: Vec<u8>,
    builder: Builder,
    head: Vec<u8>,
}

impl Filter {
    fn run(&mut self) -> Result<(), EngineError> {
        let mut headers = [0; IMAGE_HEADER + DOMAIN_HEADER];
        self.input.read_exact(&mut headers, "the image and domain headers")?;
        check_headers(&headers).map_err(EngineError::Header)?;
        self.output.write_all(&headers)?;
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
        let classes = self.stats.bytes_page_data + self.stats.bytes_references + self.stats.bytes_markers;
        self.stats.bytes_other = self.stats.bytes_out.saturating_sub(classes);
        self.stats.references_outstanding = self.window.outstanding() as u64;
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&self.stats);
    }

    /// Between records: handles requests and verdicts until there is something to read.
    fn wait_for_input(&mut self) -> Result<(), EngineError> {
        loop {
            if self.aborted.load(Ordering::Relaxed) {
                return Err(EngineError::Aborted);
            }
            while let Ok(request) = self.requests.try_recv() {
                self.handle_request(request);
            }
            self.handle_side_events()?;
            self.publish();
            if self.drain.is_none() {
                if self.input.wait(&self.bell, None)? {
                    return Ok(());
                }
                continue;
            }
            // libxenguest is blocked in its callback, so an input that is empty now has been consumed to the last byte.
            if self.input.wait(&self.bell, Some(Duration::ZERO))? {
                return Ok(());
            }
            self.go_on_draining()?;
        }
    }

    fn handle_request(&mut self, request: Request) {
        match request {
            Request::Round(iteration) => {
                self.stats.rounds = self.stats.rounds.max(iteration.saturating_add(1));
            }
            Request::Suspended => self.may_refer = false,
            Request::Drain(reply) => {
                self.may_refer = false;
                let before = (self.stats.references_accepted, self.stats.references_refused);
                self.drain = Some(Drain {
                    reply,
                    began: Instant::now(),
                    report: DrainReport::default(),
                    before,
                    sync: None,
                });
            }
        }
    }

    /// One step of a drain whose input is empty: ends it, or waits for what the target says next.
    ///
    /// Once nothing is outstanding the target is asked whether all has come through, and the drain ends with its answer: what
    /// still lies in buffers on the way would otherwise be sent while the domain is suspended.
    fn go_on_draining(&mut self) -> Result<(), EngineError> {
        let outstanding = self.window.outstanding() as u64;
        let (last_sync, answered) = self.syncs;
        let Some(drain) = &mut self.drain else { return Ok(()) };
        drain.report.outstanding = drain.report.outstanding.max(outstanding);
        let left = self.config.drain_timeout.saturating_sub(drain.began.elapsed());
        if outstanding > 0 && left.is_zero() {
            let replaced = self.replace_outstanding()?;
            if let Some(drain) = &mut self.drain {
                drain.report.replaced += replaced;
            }
            return Ok(());
        }
        if outstanding == 0 && self.side.is_some() && !left.is_zero() && drain.sync.is_none() {
            drain.sync = Some(last_sync + 1);
            self.syncs.0 += 1;
            let body = memory_record::sync_body(self.syncs.0);
            let head = RecordHeader::bytes(memory_record::RECORD_TYPE, body.len());
            return self.output.write_slices(&mut [IoSlice::new(&head), IoSlice::new(&body)]);
        }
        let is_synced = drain.sync.is_none_or(|number| number <= answered);
        if outstanding > 0 || (!is_synced && self.side.is_some() && !left.is_zero()) {
            if self.input.wait(&self.bell, Some(left))? {
                tracing::warn!("the save side writes while it is to wait for the drain");
            }
            return Ok(());
        }
        if let Some(mut drain) = self.drain.take() {
            let elapsed = drain.began.elapsed().as_secs_f64();
            drain.report.seconds = elapsed;
            drain.report.accepted = self.stats.references_accepted - drain.before.0;
            drain.report.refused = self.stats.references_refused - drain.before.1;
            drain.report.synced = drain.sync.is_some() && is_synced;
            self.stats.drain_seconds += elapsed;
            self.window.close();
            self.publish();
            let _ = drain.reply.send(drain.report);
        }
        Ok(())
    }

    fn handle_side_events(&mut self) -> Result<(), EngineError> {
        loop {
            let Some(side) = &self.side else { return Ok(()) };
            match side.events.try_recv() {
                Ok(event) => self.handle_side_event(event)?,
                Err(_) => return Ok(()),
            }
        }
    }

    fn handle_side_event(&mut self, event: SideEvent) -> Result<(), EngineError> {
        match event {
            SideEvent::Report(Report::Verdicts(verdicts)) => self.handle_verdicts(&verdicts),
            SideEvent::Report(Report::Synced(number)) if number <= self.syncs.0 => {
                self.syncs.1 = self.syncs.1.max(number);
                Ok(())
            }
            SideEvent::Report(Report::Synced(_)) => {
                self.lose_side(&SideError::Malformed("an answer to a sync record that was never sent"))
            }
            SideEvent::Lost(error) => self.lose_side(&error),
        }
    }

    fn lose_side(&mut self, error: &SideError) -> Result<(), EngineError> {
        tracing::warn!(%error, "side channel lost: no more references");
        self.may_refer = false;
        self.stats.side_channel_lost = true;
        if let Some(side) = self.side.take() {
            side.close();
        }
        self.replace_outstanding()?;
        Ok(())
    }

    fn handle_verdicts(&mut self, verdicts: &Verdicts) -> Result<(), EngineError> {
        let never_sent = SideError::Malformed("a verdict on a reference that was never sent");
        for &(first, count) in &verdicts.accepted {
            if first + u64::from(count) > self.window.next_number() {
                return self.lose_side(&never_sent);
            }
            for number in first..first + u64::from(count) {
                if let Ok(Some(retained)) = self.window.take(number) {
                    self.window.release(retained.slot);
                    self.stats.references_accepted += 1;
                }
            }
        }
        let mut refused = Vec::new();
        for &(number, reason) in &verdicts.refused {
            match self.window.take(number) {
                Ok(Some(retained)) => {
                    self.stats.references_refused += 1;
                    let counts = &mut self.stats.refused;
                    match reason {
                        Refusal::Hash => counts.hash += 1,
                        Refusal::IoError => counts.io_error += 1,
                        Refusal::OutOfBounds => counts.out_of_bounds += 1,
                        Refusal::UnknownDisk => counts.unknown_disk += 1,
                    }
                    refused.push(retained);
                }
                Ok(None) => {}
                Err(_) => {
                    self.send_retained(&refused)?;
                    return self.lose_side(&never_sent);
                }
            }
        }
        self.send_retained(&refused)
    }

    /// Sends the retained pages of all outstanding references.
    fn replace_outstanding(&mut self) -> Result<u64, EngineError> {
        let mut retained = Vec::with_capacity(self.window.outstanding());
        while let Some(number) = self.window.oldest() {
            match self.window.take(number) {
                Ok(Some(page)) => retained.push(page),
                _ => break,
            }
        }
        self.stats.references_replaced += retained.len() as u64;
        self.send_retained(&retained)?;
        Ok(retained.len() as u64)
    }

    /// Sends retained pages as ordinary PAGE_DATA and gives their slots back.
    fn send_retained(&mut self, retained: &[Retained]) -> Result<(), EngineError> {
        for batch in retained.chunks(MAX_BATCH) {
            let length = PAGE_DATA_HEAD + batch.len() * (8 + PAGE);
            self.head.clear();
            self.head.extend_from_slice(&RecordHeader::bytes(record::PAGE_DATA, length));
            self.head.extend_from_slice(&(batch.len() as u64).to_le_bytes());
            for page in batch {
                let entry = Entry { pfn: page.pfn, page_type: NOTAB };
                self.head.extend_from_slice(&entry.word().to_le_bytes());
            }
            let pages = batch.iter().map(|page| IoSlice::new(self.window.page(page.slot)));
            let mut slices: Vec<_> = std::iter::once(IoSlice::new(&self.head)).chain(pages).collect();
            self.output.write_slices(&mut slices)?;
            self.stats.bytes_page_data += (batch.len() * PAGE) as u64;
        }
        for page in retained {
            self.window.release(page.slot);
        }
        Ok(())
    }

    /// A record that is not memory: nothing may be outstanding past it once memory has begun.
    fn other_record(&mut self, header: RecordHeader, kind: u32) -> Result<(), EngineError> {
        let known = kind <= record::LAST_KNOWN || kind & record::OPTIONAL != 0;
        if self.mode == Mode::Filter && (!known || kind == memory_record::RECORD_TYPE) {
            return Err(header.error(StreamProblem::Unknown));
        }
        self.settle()?;
        if kind == record::VERIFY {
            self.mode = Mode::Verify;
        }
        self.copy_record(header)
    }

    /// Waits until nothing is outstanding. After a drain nothing is; without one (a save that never called the policy) this
    /// is where the stream waits.
    fn settle(&mut self) -> Result<(), EngineError> {
        let began = Instant::now();
        while self.window.outstanding() > 0 {
            self.handle_side_events()?;
            let left = self.config.drain_timeout.saturating_sub(began.elapsed());
            let side_channel = self.side.as_ref().map(|side| side.events.clone());
            match side_channel {
                Some(events) if self.window.outstanding() > 0 && !left.is_zero() => {
                    match events.recv_timeout(left) {
                        Ok(event) => self.handle_side_event(event)?,
                        Err(_) => {
                            self.replace_outstanding()?;
                        }
                    }
                }
                _ => {
                    self.replace_outstanding()?;
                }
            }
        }
        Ok(())
    }

    /// Passes a record on, in pieces.
    fn copy_record(&mut self, header: RecordHeader) -> Result<(), EngineError> {
        self.output.write_all(&RecordHeader::bytes(header.kind, header.length as usize))?;
        let mut left = header.padded();
        self.body.resize(left.min(1 << 20) as usize, 0);
        while left > 0 {
            let piece = left.min(1 << 20) as usize;
            let Some(piece) = self.body.get_mut(..piece) else { break };
            self.input.read_exact(piece, "a record's body")?;
            self.output.write_all(piece)?;
            left -= piece.len() as u64;
        }
        Ok(())
    }

    fn page_data(&mut self, header: RecordHeader) -> Result<(), EngineError> {
        let padded = header.padded() as usize;
        if padded > MAX_PAGE_DATA {
            if self.mode == Mode::PassThrough {
                return self.copy_record(header);
            }
            let (length, expected) = (u64::from(header.length), MAX_PAGE_DATA as u64);
            return Err(header.error(StreamProblem::Length { length, expected }));
        }
        let mut body = std::mem::take(&mut self.body);
        body.resize(padded, 0);
        let result = self.page_data_in(header, &mut body);
        self.body = body;
        result
    }

    fn page_data_in(&mut self, header: RecordHeader, body: &mut [u8]) -> Result<(), EngineError> {
        self.input.read_exact(body, "PAGE_DATA")?;
        // A PAGE_DATA that parses has a length of whole words, so `body` has no padding in it.
        let pages = PageData::parse(body.get(..header.length as usize).unwrap_or(body))
            .map_err(|problem| header.error(problem))?;
        let count = pages.pages() as u64;
        if self.mode == Mode::Verify {
            self.stats.pages_verified += count;
        } else {
            self.stats.pages_in += count;
            self.stats.pages_without_data += pages.count() as u64 - count;
            self.follow_pass(&pages);
            if self.pass.number > 1 {
                self.stats.pages_resent += count;
            }
        }
        if self.mode == Mode::Filter {
            let worth_it = self.plan(&pages);
            if worth_it {
                return self.send_memory_record(&pages);
            }
        }
        if self.mode != Mode::Verify {
            self.stats.pages_raw += count;
            self.stats.pages_page_table +=
                pages.entries().filter(|entry| is_page_table(entry.page_type)).count() as u64;
        }
        self.stats.bytes_page_data += pages.data.len() as u64;
        let head = RecordHeader::bytes(header.kind, header.length as usize);
        self.output.write_slices(&mut [IoSlice::new(&head), IoSlice::new(body)])
    }

    fn follow_pass(&mut self, pages: &PageData<'_>) {
        let first = pages.entries().next().map_or(0, |entry| entry.pfn);
        if self.pass.last_pfn.is_none_or(|last| first <= last) {
            self.pass.number += 1;
            self.stats.rounds = self.stats.rounds.max(self.pass.number);
        }
        self.pass.last_pfn = pages.entries().last().map(|entry| entry.pfn);
    }

    /// Decides for every entry how it goes, and fills the builder. False: the record is best sent as it is (nothing of it
    /// goes by reference then).
    fn plan(&mut self, pages: &PageData<'_>) -> bool {
        self.builder.clear();
        let mut replaced = 0;
        let refer = self.may_refer && self.pass.number <= self.config.reference_passes;
        for (entry, page) in pages.pages_by_entry() {
            self.stats.references_superseded += u64::from(self.window.supersede(entry.pfn));
            let kind = match page {
                None => SpanKind::NoData,
                Some(page) if entry.page_type == NOTAB => {
                    if page == ZERO_PAGE {
                        replaced += 1;
                        SpanKind::Zero
                    } else if let Some(kind) = refer.then(|| self.try_reference(entry.pfn, page)).flatten() {
                        replaced += 1;
                        kind
                    } else {
                        SpanKind::Raw
                    }
                }
                Some(_) => SpanKind::Raw,
            };
            self.builder.push(entry, kind);
        }
        let peak = &mut self.stats.references_outstanding_peak;
        *peak = (*peak).max(self.window.outstanding() as u64);
        replaced > 0 || self.builder.head_len() < PAGE_DATA_HEAD + 8 * pages.count()
    }

    fn try_reference(&mut self, pfn: u64, page: &[u8]) -> Option<SpanKind> {
        let place = self.map.lookup(enlightenment::Pfn(pfn))?;
        let side = self.side.as_ref()?;
        let Some(disk) = side.disks.get(place.disk as usize).copied().flatten() else {
            self.stats.pages_disk_missing += 1;
            return None;
        };
        if !self.window.has_room() {
            self.stats.pages_window_full += 1;
            return None;
        }
        let began = Instant::now();
        let hash = memory_record::hash(&side.key, page);
        self.stats.hashing_seconds += began.elapsed().as_secs_f64();
        self.window.retain(pfn, page)?;
        self.builder.hashes.push(hash);
        Some(SpanKind::Reference { disk, offset: place.offset })
    }

    /// Sends what was planned.
    fn send_memory_record(&mut self, pages: &PageData<'_>) -> Result<(), EngineError> {
        let mut slices = vec![IoSlice::new(&[])];
        let (mut at, mut raw) = (0, 0);
        for span in &self.builder.spans {
            let count = span.count as usize;
            match span.kind {
                SpanKind::Raw => {
                    slices.push(IoSlice::new(pages.data.get(at..at + count * PAGE).unwrap_or(&[])));
                    raw += count;
                    self.stats.pages_raw += count as u64;
                    if is_page_table(span.first.page_type) {
                        self.stats.pages_page_table += count as u64;
                    }
                }
                SpanKind::Zero => {
                    self.stats.pages_zero += count as u64;
                    self.stats.bytes_markers += memory_record::SPAN as u64;
                }
                SpanKind::NoData => {
                    self.stats.bytes_markers += memory_record::SPAN as u64;
                    continue;
                }
                SpanKind::Reference { .. } => {
                    self.stats.pages_referenced += count as u64;
                    self.stats.bytes_references += (memory_record::SPAN + count * memory_record::HASH) as u64;
                }
            }
            at += count * PAGE;
        }
        let length = self.builder.head_len() + raw * PAGE;
        self.head.clear();
        self.head.extend_from_slice(&RecordHeader::bytes(memory_record::RECORD_TYPE, length));
        let first = self.window.next_number() - self.builder.hashes.len() as u64;
        self.builder.write_head(first, &mut self.head);
        if let Some(slot) = slices.first_mut() {
            *slot = IoSlice::new(&self.head);
        }
        self.output.write_slices(&mut slices)?;
        self.stats.bytes_page_data += (raw * PAGE) as u64;
        Ok(())
    }
}
