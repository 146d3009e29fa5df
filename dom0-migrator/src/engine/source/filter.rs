//! The source's filter at work: what comes in, record by record.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, after, never, select_biased};

use super::Request;
use super::backlog::{Pages, SinceFence};
use super::coming::Awaited;
use super::left_out::LeftOut;
use super::settle::Drain;
use super::side::{Side, SideEvent};
use super::work::{Knowledge, Record, ToWorkers};
use crate::engine::config::Config;
use crate::engine::dirty_log::Look;
use crate::engine::error::{EngineError, StreamProblem};
use crate::engine::intake::{Arrived, Incoming, Intake};
use crate::engine::late_writes::LastSent;
use crate::engine::memory;
use crate::engine::memory_record::{self, Builder};
use crate::engine::outlet::{Outlet, Parcel, Piece};
use crate::engine::pool::Pool;
use crate::engine::summary::{DiskSummary, DrainReport, SourceStats};
use crate::engine::travel::Travel;
use crate::engine::waiting::Length;
use crate::engine::window::Window;
use crate::engine::xen_stream::{
    DOMAIN_HVM, MAX_PAGE_DATA, PageData, RecordHeader, domain_type, is_page_table, record,
};

/// How memory is treated now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// No side channel: every byte as it is.
    PassThrough,
    /// Markers and references.
    Filter,
    /// After VERIFY: every byte as it is, and counted apart.
    Verify,
}

/// What the filter's thread owns.
pub(super) struct Filter {
    pub(super) arrived: Receiver<Arrived<ToWorkers>>,
    pub(super) outlet: Outlet<Pages, Sender<()>>,
    /// Buffers for copies of retained pages. They are not the input's, for which the input might be waiting.
    pub(super) copies: Pool,
    /// The input's.
    pub(super) pool: Pool,
    pub(super) knowledge: Arc<Knowledge>,
    pub(super) side: Option<Side>,
    pub(super) mode: Mode,
    pub(super) may_refer: bool,
    /// Whether the target has answered, so that it knows our records, even if the side channel was lost since.
    pub(super) target_knows_us: bool,
    /// A side channel that is yet to come.
    pub(super) awaited: Option<Awaited>,
    /// The disks as the target answered, of one that has come.
    pub(super) met: Option<Vec<DiskSummary>>,
    /// What was sent last, when all is to be compared.
    pub(super) last_sent: Option<LastSent>,
    pub(super) window: Window,
    pub(super) config: Config,
    pub(super) drain: Option<Drain>,
    /// Who waits until the wire has caught up.
    pub(super) catching_up: Option<Sender<()>>,
    pub(super) since_fence: SinceFence,
    /// Looks at the log of dirty pages, as they are taken.
    pub(super) looks: Receiver<Look>,
    pub(super) left_out: LeftOut,
    /// Where the raw pages of the record that was planned lie in its body.
    pub(super) raw: Vec<Piece>,
    /// Whether PFNs are to be named in order, their pages present or not: for PVH and HVM guests.
    pub(super) placeholders: bool,
    /// Number of the last sync record sent, and of the last one answered.
    pub(super) syncs: (u64, u64),
    /// Verdicts so far, on references of any kind; one on each at most.
    pub(super) verdicts_heard: u64,
    pub(super) stats: SourceStats,
    pub(super) travel: Travel,
    /// Bytes handed to the outlet.
    pub(super) bytes_sent: u64,
    pub(super) shared: Arc<Mutex<SourceStats>>,
    pub(super) builder: Builder,
}

impl Filter {
    pub(super) fn run(&mut self) -> Result<(), EngineError> {
        loop {
            self.handle_side_events()?;
            let patience = self.go_on_draining()?;
            self.go_on_catching_up();
            self.advise_workers();
            self.publish();
            let events = self.side.as_ref().map_or_else(never, |side| side.events.clone());
            let opened = self.awaited.as_ref().map_or_else(never, Awaited::opened);
            let held = self.awaited.as_ref().and_then(Awaited::left);
            let arrivals = if held.is_some() { never() } else { self.arrived.clone() };
            let timeout = patience.into_iter().chain(held).min().map_or_else(never, after);
            let progress = match self.catching_up {
                Some(_) => self.outlet.progress.clone(),
                None => never(),
            };
            // What the target says goes first: it makes room.
            let arrived = select_biased! {
                recv(events) -> event => {
                    self.handle_side_event(event.unwrap_or_else(|_| side_is_gone()))?;
                    continue;
                }
                recv(self.outlet.gone) -> _ => return Err(EngineError::Gone),
                recv(self.looks) -> look => {
                    self.see(look.ok());
                    continue;
                }
                recv(opened) -> opened => {
                    self.meet(opened.ok());
                    continue;
                }
                recv(arrivals) -> arrived => arrived.map_err(|_| EngineError::Panicked)?,
                recv(timeout) -> _ => continue,
                recv(progress) -> _ => continue,
            };
            self.stats.bytes_in = arrived.offset;
            match arrived.what {
                Incoming::Headers(headers) => {
                    self.placeholders = domain_type(&headers) == DOMAIN_HVM;
                    self.send_alone(Parcel::bytes(headers.to_vec()))?;
                    self.offer_side()?;
                }
                Incoming::Request(request) => self.handle_request(request),
                Incoming::Record(ticket) => {
                    let record = ticket.recv().map_err(|_| EngineError::Panicked)?;
                    self.page_data(record)?;
                }
                Incoming::Other(header) => {
                    self.other_record(header)?;
                    if header.kind == record::END {
                        if self.config.process_ends {
                            memory::leave_to_exit();
                        }
                        return Ok(());
                    }
                }
                Incoming::Piece(piece) => self.send(Parcel::whole(Vec::new(), Pages::Record(piece)))?,
                Incoming::Failed(error) => return Err(error),
            }
        }
    }

    /// Sends something behind all that was sent before.
    pub(super) fn send(&mut self, parcel: Parcel<Pages, Sender<()>>) -> Result<(), EngineError> {
        self.bytes_sent += parcel.length();
        self.outlet.send(parcel)
    }

    /// Sends memory that may overtake other memory ([`backlog`](super::backlog)).
    pub(super) fn send_first(&mut self, parcel: Parcel<Pages, Sender<()>>) -> Result<(), EngineError> {
        self.bytes_sent += parcel.length();
        self.outlet.send_first(parcel)
    }

    /// Sends what overtakes nothing, and is overtaken by nothing.
    pub(super) fn send_alone(&mut self, parcel: Parcel<Pages, Sender<()>>) -> Result<(), EngineError> {
        self.outlet.fence();
        self.send(parcel)?;
        self.since_fence = SinceFence::Other;
        Ok(())
    }

    pub(super) fn publish(&mut self) {
        self.stats.bytes_out = self.outlet.written();
        let classes = self.stats.bytes_page_data + self.stats.bytes_references + self.stats.bytes_markers;
        // All classes are counted when they are sent off.
        self.stats.bytes_other = self.bytes_sent.saturating_sub(classes);
        self.stats.references_outstanding = self.window.outstanding() as u64;
        self.stats.ways = self.travel.counts();
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let before = (shared.bytes_page_data, shared.ways);
        shared.clone_from(&self.stats);
        // What is counted when it is sent off may be left out while it waits. A counter that others look at does not go down.
        shared.bytes_page_data = shared.bytes_page_data.max(before.0);
        shared.ways.keep(&before.1);
    }

    fn handle_request(&mut self, request: Request) {
        match request {
            Request::Round(iteration) => {
                self.stats.rounds = self.stats.rounds.max(iteration.saturating_add(1));
                self.left_out.enter(iteration);
            }
            Request::Suspending => self.left_out.end(),
            Request::Suspended => {
                // A side channel that comes now is of no more use.
                (self.may_refer, self.awaited) = (false, None);
                self.left_out.end();
            }
            Request::CatchUp(reply) => self.catching_up = Some(reply),
            Request::Drain { reply, arrive } => {
                (self.may_refer, self.awaited) = (false, None);
                let before = (self.stats.references_accepted, self.stats.references_refused);
                self.drain = Some(Drain {
                    reply,
                    arrive,
                    began: Instant::now(),
                    report: DrainReport::default(),
                    before,
                    sync: None,
                });
            }
        }
    }

    /// A record that is not memory: nothing may be outstanding past it once memory has begun. Its body follows in pieces.
    fn other_record(&mut self, header: RecordHeader) -> Result<(), EngineError> {
        let kind = header.kind;
        if matches!(kind, record::CHECKPOINT | record::CHECKPOINT_DIRTY_PFN_LIST) {
            return Err(header.error(StreamProblem::Checkpoint));
        }
        if kind == record::PAGE_DATA && self.mode != Mode::PassThrough {
            let (length, expected) = (u64::from(header.length), MAX_PAGE_DATA as u64);
            return Err(header.error(StreamProblem::Length { length, expected }));
        }
        let known = kind <= record::LAST_KNOWN || kind & record::OPTIONAL != 0;
        if self.mode == Mode::Filter && (!known || kind == memory_record::RECORD_TYPE) {
            return Err(header.error(StreamProblem::Unknown));
        }
        self.settle()?;
        if self.left_out.is_over() || matches!(kind, record::VERIFY | record::END) {
            self.account_for_left_out()?;
        }
        if self.mode == Mode::Verify {
            self.tell_late_writes()?;
        }
        if kind == record::VERIFY {
            self.mode = Mode::Verify;
        }
        self.send_alone(Parcel::bytes(RecordHeader::bytes(kind, header.length as usize).to_vec()))
    }

    /// The pages of VERIFY are through: says which of them are not what was sent last.
    fn tell_late_writes(&mut self) -> Result<(), EngineError> {
        let Some(last_sent) = self.last_sent.take().filter(|_| self.target_knows_us) else { return Ok(()) };
        let writes = last_sent.into_late_writes();
        self.stats.pages_written_late = writes.len();
        for body in writes.bodies() {
            let mut bytes = RecordHeader::bytes(memory_record::RECORD_TYPE, body.len()).to_vec();
            bytes.extend_from_slice(&body);
            self.send(Parcel::bytes(bytes))?;
        }
        Ok(())
    }

    fn page_data(&mut self, mut record: Record) -> Result<(), EngineError> {
        if self.mode == Mode::Filter && record.classes.is_empty() && record.problem.is_none() {
            // The workers had it before there was a side channel: a few records, once.
            self.knowledge.work(&mut record);
        }
        let header = record.header;
        let parsed = match record.problem {
            Some(problem) => Err(problem),
            None => PageData::parse(record.body.get(..header.length as usize).unwrap_or(&record.body)),
        };
        let pages = parsed.map_err(|problem| header.error(problem))?;
        let count = pages.pages() as u64;
        if let Some(last_sent) = &mut self.last_sent {
            last_sent.see(&pages, self.mode == Mode::Verify);
        }
        if self.mode == Mode::Verify {
            self.stats.pages_verified += count;
        } else {
            self.stats.pages_in += count;
            self.stats.pages_without_data += pages.count() as u64 - count;
            self.stats.rounds = self.stats.rounds.max(record.pass);
            if record.pass > 1 {
                self.stats.pages_resent += count;
            }
        }
        let may_part = self.keep_order(&pages);
        if self.mode == Mode::Filter {
            let refer = self.may_refer && may_part && record.pass <= self.config.reference_passes;
            self.wait_for_room(&record, refer)?;
            // What has to wait is parted too, so that it may still be left out.
            if self.plan(&pages, &record, refer, may_part) || (may_part && self.is_behind()) {
                return self.send_memory_record(record, may_part);
            }
        }
        if self.mode != Mode::Verify {
            self.stats.pages_raw += count;
            self.stats.pages_page_table +=
                pages.entries().filter(|entry| is_page_table(entry.page_type)).count() as u64;
            self.travel.record(&pages, record.pass > 1);
        }
        self.stats.bytes_page_data += pages.data.len() as u64;
        let head = RecordHeader::bytes(header.kind, header.length as usize).to_vec();
        let body = if self.mode == Mode::Filter && self.is_behind() {
            Pages::Copy(record.body.to_vec())
        } else {
            Pages::Record(record.body)
        };
        self.send(Parcel::whole(head, body))
    }
}

/// The event of a side channel whose thread has ended.
pub(super) fn side_is_gone() -> SideEvent {
    SideEvent::lost("the side channel's thread has ended")
}

impl Filter {
    /// Ends the threads beside this one, and closes both ends. On success all is written.
    pub(super) fn end(
        mut self,
        intake: Intake<ToWorkers>,
        result: Result<(), EngineError>,
    ) -> Result<(SourceStats, Travel), EngineError> {
        self.publish();
        intake.stop();
        let Self { arrived, outlet, mut stats, travel, bytes_sent, shared, .. } = self;
        drop(arrived);
        let written = outlet.end(result.is_err());
        intake.end();
        if written.is_ok() && result.is_ok() {
            stats.bytes_out = bytes_sent;
        }
        shared.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&stats);
        match (result, written) {
            // The filter noticed only that the outlet had gone.
            (Ok(()) | Err(EngineError::Gone), Err(error)) => Err(error),
            (result, _) => result.map(|()| (stats, travel)),
        }
    }
}
