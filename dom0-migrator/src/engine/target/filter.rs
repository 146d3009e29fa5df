//! The target's filter at work: what comes in, record by record, and what the readers bring.

use std::collections::HashMap;
use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::page_data_out::PageDataOut;
use super::side::{Saying, Side, Verdict};
use crate::engine::config::Config;
use crate::engine::descriptor::{Bell, Input, Output, Ringer};
use crate::engine::error::{EngineError, StreamProblem};
use crate::engine::late_writes::{self, LateWrites};
use crate::engine::memory_record::{self, MemoryRecord, PrivateRecord, SpanKind};
use crate::engine::restorer::{Batch, Key, Restorer, Wanted};
use crate::engine::side_message::Refusal;
use crate::engine::summary::{DiskSummary, RefusalCounts, TargetStats};
use crate::engine::xen_stream::{
    DOMAIN_HVM, Entry, MAX_PAGE_DATA, NOTAB, PAGE, PageData, RecordHeader, XALLOC, ZERO_PAGE, domain_type,
    record,
};

/// Longest body of a record of ours.
const MAX_PRIVATE: usize = memory_record::MAX_BODY;
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

/// A reference for which libxenguest has nothing yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) number: u64,
    pub(super) disk: u8,
    pub(super) offset: u64,
    pub(super) waits_for_reader: bool,
}

pub(super) struct Filter {
    pub(super) input: Input,
    pub(super) output: Output,
    pub(super) bell: Bell,
    pub(super) ringer: Ringer,
    pub(super) aborted: Arc<AtomicBool>,
    pub(super) phase: Phase,
    pub(super) placeholders: bool,
    pub(super) side: Option<Side>,
    pub(super) session: Option<Session>,
    pub(super) held: HashMap<u64, Held>,
    pub(super) next_number: u64,
    pub(super) config: Config,
    pub(super) stats: TargetStats,
    pub(super) shared: Arc<Mutex<TargetStats>>,
    pub(super) disks: Vec<DiskSummary>,
    pub(super) late_writes: LateWrites,
    pub(super) body: Vec<u8>,
    pub(super) head: Vec<u8>,
}

impl Filter {
    pub(super) fn run(&mut self) -> Result<(), EngineError> {
        let headers = self.input.read_stream_headers()?;
        self.output.write_all(&headers)?;
        self.placeholders = domain_type(&headers) == DOMAIN_HVM;
        loop {
            self.wait_for_input()?;
            let header = self.input.read_record_header()?;
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

    pub(super) fn publish(&mut self) {
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
        self.notice_agreement()?;
        if self.session.is_none() {
            return Err(header.error(StreamProblem::Forbidden("no hello has been answered")));
        }
        let body = self.read_body(header, MAX_PRIVATE, "a private record")?;
        let record = PrivateRecord::parse(body.get(..header.length as usize).unwrap_or(&body))
            .map_err(|problem| header.error(problem))?;
        match (record, self.phase) {
            (PrivateRecord::LateWrites(body), Phase::Verify) => {
                self.late_writes.add(body).map_err(|problem| header.error(problem))?;
            }
            (PrivateRecord::LateWrites(_), Phase::Memory) => {
                return Err(header.error(StreamProblem::Forbidden("late writes are named after VERIFY")));
            }
            (_, Phase::Verify) => {
                return Err(
                    header.error(StreamProblem::Forbidden("after VERIFY every page travels as it is"))
                );
            }
            (PrivateRecord::Memory(record), Phase::Memory) => self.rebuild(header, &record)?,
            // What came before has been handed on before this record was read.
            (PrivateRecord::Sync(number), Phase::Memory) => self.say(Saying::Synced(number)),
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
