//! The target's filter at work: what comes in, record by record, and what the readers bring.

use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, never, select};

use super::held::{Held, HeldReferences};
use super::page_data_out::{PageDataOut, Pages};
use super::side::{Agreed, Saying, Side, Verdict};
use crate::engine::config::Config;
use crate::engine::error::{EngineError, StreamProblem};
use crate::engine::intake::{Arrived, Dispatch, Incoming, Intake};
use crate::engine::late_writes::{self, LateWrites};
use crate::engine::memory;
use crate::engine::memory_record::{self, MemoryRecord, PrivateRecord, SpanKind};
use crate::engine::outlet::{Outlet, Parcel};
use crate::engine::pool::{Buffer, Pool};
use crate::engine::restorer::{Batch, Key, Restorer, Wanted};
use crate::engine::side_message::Refusal;
use crate::engine::summary::{DiskSummary, RefusalCounts, TargetStats, TargetSummary};
use crate::engine::waiting::Length;
use crate::engine::xen_stream::{
    DOMAIN_HVM, Entry, MAX_BATCH, MAX_PAGE_DATA, NOTAB, PAGE, PageData, RecordHeader, XALLOC, domain_type,
    record,
};

/// Longest body of a record of ours.
pub(super) const MAX_PRIVATE: usize = memory_record::MAX_BODY;
const _: () = assert!(late_writes::MAX_BODY <= MAX_PRIVATE);

/// Where the stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Memory may come in any form.
    Memory,
    /// After VERIFY: every page travels, and late writes may be named.
    Verify,
}

/// A side channel that has said hello.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) restorer: Restorer,
    pub(super) max_outstanding: u32,
    pub(super) lost: bool,
}

/// What several reads have brought, on its way into one record.
#[derive(Default)]
struct Joined {
    batches: Vec<Batch>,
    pages: PageDataOut,
    verdicts: Vec<Verdict>,
}

/// The reading thread's part: none, records go to the filter as they are.
#[derive(Debug)]
pub(super) struct AsTheyAre;

/// Nothing is asked of this filter from outside.
#[derive(Debug)]
pub(super) enum NoRequest {}

impl Dispatch for AsTheyAre {
    type Request = NoRequest;
    type Record = (RecordHeader, Buffer);

    fn longest(&self, kind: u32) -> Option<usize> {
        match kind {
            record::PAGE_DATA => Some(MAX_PAGE_DATA),
            memory_record::RECORD_TYPE => Some(MAX_PRIVATE),
            _ => None,
        }
    }

    fn record(&mut self, header: RecordHeader, body: Buffer) -> Self::Record {
        (header, body)
    }

    fn other(&mut self, _: RecordHeader) {}

    fn asks_for_silence(request: &NoRequest) -> bool {
        match *request {}
    }
}

pub(super) struct Filter {
    pub(super) arrived: Receiver<Arrived<AsTheyAre>>,
    pub(super) outlet: Outlet<Pages, Saying>,
    pub(super) phase: Phase,
    pub(super) placeholders: bool,
    pub(super) side: Option<Side>,
    /// The side channel has ended, in peace or not.
    pub(super) side_ended: bool,
    pub(super) session: Option<Session>,
    pub(super) held: HeldReferences,
    pub(super) next_number: u64,
    pub(super) config: Config,
    pub(super) stats: TargetStats,
    /// Bytes handed to the outlet.
    pub(super) bytes_sent: u64,
    pub(super) shared: Arc<Mutex<TargetStats>>,
    pub(super) disks: Vec<DiskSummary>,
    pub(super) late_writes: LateWrites,
    /// The input's buffers.
    pub(super) pool: Pool,
}

impl Filter {
    pub(super) fn run(&mut self) -> Result<(), EngineError> {
        loop {
            self.notice_agreement()?;
            self.notice_loss();
            self.publish();
            let loaded = self.session.as_ref().map_or_else(never, |session| session.restorer.results.clone());
            let agreed = match &self.side {
                Some(side) if self.session.is_none() && !self.side_ended => side.agreed.clone(),
                _ => never(),
            };
            let lost = match &self.side {
                Some(side) if !self.side_ended => side.lost.clone(),
                _ => never(),
            };
            // Network and disks take turns: if one always went first, the other would stand still while libxenguest is slower than that one.
            let arrived = select! {
                recv(loaded) -> batches => {
                    if let Ok(batches) = batches {
                        self.hand_on(batches)?;
                    }
                    continue;
                }
                recv(lost) -> _ => {
                    self.side_ended = true;
                    continue;
                }
                recv(agreed) -> agreed => {
                    match agreed {
                        Ok(agreed) => self.begin_session(agreed)?,
                        // Without an answer the side channel is as good as none.
                        Err(_) => self.side_ended = true,
                    }
                    continue;
                }
                recv(self.outlet.gone) -> _ => return Err(EngineError::Gone),
                recv(self.arrived) -> arrived => arrived.map_err(|_| EngineError::Panicked)?,
            };
            self.stats.bytes_in = arrived.offset;
            match arrived.what {
                Incoming::Headers(headers) => {
                    self.placeholders = domain_type(&headers) == DOMAIN_HVM;
                    self.send(Parcel::bytes(headers.to_vec()))?;
                }
                Incoming::Record((header, body)) if header.kind == record::PAGE_DATA => {
                    self.page_data(header, body)?;
                }
                Incoming::Record((header, body)) => self.private_record(header, body)?,
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
                Incoming::Request(request) => match request {},
                Incoming::Failed(error) => return Err(error),
            }
        }
    }

    /// Ends the threads beside this one, and closes both ends. On success libxenguest has everything.
    pub(super) fn end(
        mut self,
        intake: Intake<AsTheyAre>,
        result: Result<(), EngineError>,
    ) -> Result<TargetSummary, EngineError> {
        self.publish();
        intake.stop();
        let poolskip = self.session.take().is_some();
        let Self { arrived, outlet, side, mut stats, bytes_sent, shared, disks, late_writes, .. } = self;
        drop(arrived);
        let written = outlet.end(result.is_err());
        if let Some(side) = side {
            side.close(poolskip && result.is_ok() && written.is_ok());
        }
        intake.end();
        if written.is_ok() && result.is_ok() {
            stats.bytes_out = bytes_sent;
        }
        shared.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&stats);
        match (result, written) {
            // The filter noticed only that the outlet had gone.
            (Ok(()) | Err(EngineError::Gone), Err(error)) => Err(error),
            (result, _) => result.map(|()| TargetSummary { stats, poolskip, disks, late_writes }),
        }
    }

    fn send(&mut self, parcel: Parcel<Pages, Saying>) -> Result<(), EngineError> {
        self.bytes_sent += parcel.length();
        self.outlet.send(parcel)
    }

    fn publish(&mut self) {
        self.stats.bytes_out = self.outlet.written();
        self.stats.references_outstanding = self.held.len() as u64;
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&self.stats);
    }

    fn notice_agreement(&mut self) -> Result<(), EngineError> {
        if self.session.is_some() {
            return Ok(());
        }
        match self.side.as_ref().and_then(|side| side.agreed.try_recv().ok()) {
            Some(agreed) => self.begin_session(agreed),
            None => Ok(()),
        }
    }

    fn begin_session(&mut self, agreed: Agreed) -> Result<(), EngineError> {
        self.disks = agreed.summaries;
        let restorer = Restorer::start(agreed.key, agreed.disks, &self.config);
        self.session = Some(Session {
            restorer: restorer.map_err(EngineError::Start)?,
            max_outstanding: agreed.max_outstanding,
            lost: false,
        });
        Ok(())
    }

    /// Without a side channel no verdict can be given: the source sends all pages that are not settled, and reading stops.
    fn notice_loss(&mut self) {
        let Some(session) = self.session.as_mut() else { return };
        // A source that is done closes the side channel too; that is no loss.
        if self.side_ended && !session.lost && !self.held.is_empty() {
            session.lost = true;
            session.restorer.cancel_all();
            self.stats.side_channel_lost = true;
            tracing::warn!(held = self.held.len(), "side channel lost: waiting for the pages themselves");
        }
    }

    /// Hands on what disks have brought: these, and all that is there beside them, in records as long as libxenguest's own may be, since it
    /// maps and unmaps the guest's pages for each record. The verdicts are given once libxenguest has the pages in its pipe.
    fn hand_on(&mut self, first: Vec<Batch>) -> Result<(), EngineError> {
        let results = self.session.as_ref().map_or_else(never, |session| session.restorer.results.clone());
        let mut joined = Joined::default();
        let mut next = Some(first);
        while let Some(batches) = next {
            let mut was_full = false;
            for batch in batches {
                if joined.pages.len() + batch.loaded.len() > MAX_BATCH {
                    self.send_joined(std::mem::take(&mut joined))?;
                    was_full = true;
                }
                self.join(&mut joined, batch);
            }
            // What comes over the network is to have its turn too.
            next = if was_full { None } else { results.try_recv().ok() };
        }
        self.send_joined(joined)
    }

    /// Adds what is still wanted of a batch.
    fn join(&mut self, joined: &mut Joined, batch: Batch) {
        self.stats.disk_reads += 1;
        self.stats.disk_bytes += batch.read_bytes;
        self.stats.disk_seconds += batch.read_seconds;
        self.stats.hashing_seconds += batch.hash_seconds;
        for loaded in &batch.loaded {
            match loaded.outcome {
                Ok(at) => {
                    if self.held.take(loaded.number).is_none() {
                        continue;
                    }
                    let entry = Entry { pfn: loaded.pfn, page_type: NOTAB };
                    joined.pages.push_page(entry, joined.batches.len(), at..at + PAGE);
                    self.stats.references_accepted += 1;
                    joined.verdicts.push((loaded.number, Ok(())));
                }
                Err(reason) => {
                    let Some(held) = self.held.get_mut(loaded.number) else { continue };
                    held.waits_for_reader = false;
                    count_refusal(&mut self.stats.refused, reason);
                    joined.verdicts.push((loaded.number, Err(reason)));
                }
            }
        }
        joined.batches.push(batch);
    }

    fn send_joined(&mut self, joined: Joined) -> Result<(), EngineError> {
        let Joined { batches, pages, verdicts } = joined;
        match pages.parcel(Pages::Batches(batches)) {
            Some(parcel) => self.send(Parcel { then: Some(Saying::Verdicts(verdicts)), ..parcel }),
            None => {
                self.give_verdicts(verdicts);
                Ok(())
            }
        }
    }

    fn give_verdicts(&self, verdicts: Vec<Verdict>) {
        if !verdicts.is_empty() {
            self.say(Saying::Verdicts(verdicts));
        }
    }

    fn say(&self, saying: Saying) {
        if let Some(side) = &self.side {
            side.sayings.say(saying);
        }
    }

    /// Drops the reference held for the PFN, since something newer has come.
    fn supersede(&mut self, pfn: u64, cancelled: &mut Vec<Key>) {
        if let Some((number, held)) = self.held.supersede(pfn)
            && held.waits_for_reader
        {
            self.stats.references_superseded += 1;
            cancelled.push(Key { disk: held.disk, offset: held.offset, number });
        }
    }

    fn cancel(&self, cancelled: &[Key]) {
        if let Some(session) = &self.session {
            session.restorer.cancel(cancelled);
        }
    }

    /// The head of a record whose body follows in pieces.
    fn other_record(&mut self, header: RecordHeader) -> Result<(), EngineError> {
        let kind = header.kind;
        if matches!(kind, record::CHECKPOINT | record::CHECKPOINT_DIRTY_PFN_LIST) {
            return Err(header.error(StreamProblem::Checkpoint));
        }
        if let Some(longest) = AsTheyAre.longest(kind) {
            let (length, expected) = (u64::from(header.length), longest as u64);
            return Err(header.error(StreamProblem::Length { length, expected }));
        }
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
        self.send(Parcel::bytes(RecordHeader::bytes(kind, header.length as usize).to_vec()))
    }

    fn page_data(&mut self, header: RecordHeader, body: Buffer) -> Result<(), EngineError> {
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
        let head = RecordHeader::bytes(header.kind, header.length as usize).to_vec();
        self.send(Parcel::whole(head, Pages::Record(body)))
    }

    fn private_record(&mut self, header: RecordHeader, body: Buffer) -> Result<(), EngineError> {
        self.notice_agreement()?;
        if self.session.is_none() {
            return Err(header.error(StreamProblem::Forbidden("no hello has been answered")));
        }
        let record = PrivateRecord::parse(body.get(..header.length as usize).unwrap_or(&body))
            .map_err(|problem| header.error(problem))?;
        match (record, self.phase) {
            (PrivateRecord::LateWrites(body), Phase::Verify) => {
                self.late_writes.add(body).map_err(|problem| header.error(problem))
            }
            (PrivateRecord::LateWrites(_), Phase::Memory) => {
                Err(header.error(StreamProblem::Forbidden("late writes are named after VERIFY")))
            }
            (_, Phase::Verify) => {
                Err(header.error(StreamProblem::Forbidden("after VERIFY every page travels as it is")))
            }
            (PrivateRecord::Memory(record), Phase::Memory) => {
                let out = self.rebuild(header, &record)?;
                match out.parcel(Pages::Record(body)) {
                    Some(parcel) => self.send(parcel),
                    None => Ok(()),
                }
            }
            // Said once all that came before is in libxenguest's pipe; whoever hears it may look at the counters.
            (PrivateRecord::Sync(number), Phase::Memory) => {
                self.publish();
                // Most likely the domain is suspended next: what follows is little.
                self.pool.let_go_of_free();
                self.send(Parcel { then: Some(Saying::Synced(number)), ..Parcel::bytes(Vec::new()) })
            }
        }
    }

    /// The entries as libxenguest is to have them now; the pages lie in the record's own body.
    fn rebuild(
        &mut self,
        header: RecordHeader,
        record: &MemoryRecord<'_>,
    ) -> Result<PageDataOut, EngineError> {
        if record.first_reference != self.next_number {
            let (found, expected) = (record.first_reference, self.next_number);
            return Err(header.error(StreamProblem::Sequence { found, expected }));
        }
        // The raw pages stand at the end of the body.
        let mut raw_at = header.length as usize - record.data.len();
        let mut hashes = record.hashes();
        let mut out = PageDataOut::default();
        let (mut cancelled, mut verdicts) = (Vec::new(), Vec::new());
        let mut wanted = Vec::with_capacity(record.references());
        let (mut ascend, mut behind) = (true, 0);
        for span in record.spans() {
            ascend &= span.first.pfn >= behind;
            behind = span.first.pfn + u64::from(span.count);
            for (index, entry) in span.entries().enumerate() {
                self.supersede(entry.pfn, &mut cancelled);
                match span.kind {
                    SpanKind::Raw => {
                        out.push_page(entry, 0, raw_at..raw_at + PAGE);
                        raw_at += PAGE;
                        self.stats.pages_raw += 1;
                    }
                    SpanKind::Zero => {
                        out.push_zeros(entry);
                        self.stats.pages_zero += 1;
                    }
                    SpanKind::NoData => {
                        out.push(entry);
                        self.stats.pages_without_data += 1;
                    }
                    SpanKind::Reference { disk, offset } => {
                        let Some(hash) = hashes.next() else { continue };
                        // The parser has checked that the span's end does not overflow.
                        let offset = offset + (index * PAGE) as u64;
                        let number = self.next_number;
                        self.next_number += 1;
                        if self.placeholders {
                            out.push(Entry { pfn: entry.pfn, page_type: XALLOC });
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
        let peak = &mut self.stats.references_outstanding_peak;
        *peak = (*peak).max(self.held.len() as u64);
        if let Some(session) = self.session.as_ref().filter(|session| !session.lost && !wanted.is_empty()) {
            // Unless they ascend, a PFN may stand twice in a record: the later entry has superseded the earlier.
            let held = &self.held;
            session.restorer.push(wanted.into_iter().filter(|(key, _)| ascend || held.contains(key.number)));
        }
        self.give_verdicts(verdicts);
        Ok(out)
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
        self.held.hold(number, Held { pfn, offset, disk, waits_for_reader: refused.is_none() });
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
