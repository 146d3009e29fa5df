//! The source's filter at work: what comes in, record by record.

use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::Request;
use super::settle::Drain;
use super::side::Side;
use crate::engine::config::Config;
use crate::engine::descriptor::{Bell, Input, Output};
use crate::engine::error::{EngineError, StreamProblem};
use crate::engine::late_writes::LateWrites;
use crate::engine::memory_record::{self, Builder};
use crate::engine::reference_map::ReferenceMap;
use crate::engine::summary::{DrainReport, SourceStats};
use crate::engine::travel::Travel;
use crate::engine::window::Window;
use crate::engine::xen_stream::{MAX_PAGE_DATA, PageData, RecordHeader, is_page_table, record};

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

/// Where the stream is in memory. Within a pass PFNs ascend, and the first pass ends with the last PFN of all, so a PFN that
/// is not above the one before begins a new pass.
#[derive(Debug, Default)]
pub(super) struct Pass {
    pub(super) number: u32,
    pub(super) last_pfn: Option<u64>,
}

/// What the filter's thread owns.
pub(super) struct Filter {
    pub(super) input: Input,
    pub(super) output: Output,
    pub(super) bell: Bell,
    pub(super) requests: Receiver<Request>,
    pub(super) aborted: Arc<AtomicBool>,
    pub(super) side: Option<Side>,
    pub(super) mode: Mode,
    pub(super) may_refer: bool,
    /// Whether the target has answered, so that it knows our records, even if the side channel was lost since.
    pub(super) target_knows_us: bool,
    pub(super) late_writes: Option<LateWrites>,
    pub(super) map: ReferenceMap,
    pub(super) window: Window,
    pub(super) config: Config,
    pub(super) drain: Option<Drain>,
    /// Number of the last sync record sent, and of the last one answered.
    pub(super) syncs: (u64, u64),
    pub(super) pass: Pass,
    pub(super) stats: SourceStats,
    pub(super) travel: Travel,
    pub(super) shared: Arc<Mutex<SourceStats>>,
    pub(super) body: Vec<u8>,
    pub(super) builder: Builder,
    pub(super) head: Vec<u8>,
}

impl Filter {
    pub(super) fn run(&mut self) -> Result<(), EngineError> {
        let headers = self.input.read_stream_headers()?;
        self.output.write_all(&headers)?;
        loop {
            self.wait_for_input()?;
            let header = self.input.read_record_header()?;
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

    pub(super) fn publish(&mut self) {
        self.stats.bytes_in = self.input.offset();
        self.stats.bytes_out = self.output.bytes();
        let classes = self.stats.bytes_page_data + self.stats.bytes_references + self.stats.bytes_markers;
        self.stats.bytes_other = self.stats.bytes_out.saturating_sub(classes);
        self.stats.references_outstanding = self.window.outstanding() as u64;
        self.stats.ways = self.travel.counts();
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&self.stats);
    }

    /// Between records: handles requests and verdicts until there is something to read.
    pub(super) fn wait_for_input(&mut self) -> Result<(), EngineError> {
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

    pub(super) fn handle_request(&mut self, request: Request) {
        match request {
            Request::Round(iteration) => {
                self.stats.rounds = self.stats.rounds.max(iteration.saturating_add(1));
            }
            Request::Suspended => self.may_refer = false,
            Request::LateWrites(writes) => self.late_writes = Some(writes),
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

    /// A record that is not memory: nothing may be outstanding past it once memory has begun.
    pub(super) fn other_record(&mut self, header: RecordHeader, kind: u32) -> Result<(), EngineError> {
        let known = kind <= record::LAST_KNOWN || kind & record::OPTIONAL != 0;
        if self.mode == Mode::Filter && (!known || kind == memory_record::RECORD_TYPE) {
            return Err(header.error(StreamProblem::Unknown));
        }
        self.settle()?;
        if self.mode == Mode::Verify {
            self.tell_late_writes()?;
        }
        if kind == record::VERIFY {
            self.mode = Mode::Verify;
        }
        self.copy_record(header)
    }

    /// The pages of VERIFY are through: says which of them were written since the suspension.
    fn tell_late_writes(&mut self) -> Result<(), EngineError> {
        // Told before libxenguest wrote the record whose header has just been read.
        while let Ok(request) = self.requests.try_recv() {
            self.handle_request(request);
        }
        let Some(writes) = self.late_writes.take().filter(|_| self.target_knows_us) else { return Ok(()) };
        self.stats.pages_written_late = writes.len();
        for body in writes.bodies() {
            let head = RecordHeader::bytes(memory_record::RECORD_TYPE, body.len());
            self.output.write_slices(&mut [IoSlice::new(&head), IoSlice::new(&body)])?;
        }
        Ok(())
    }

    /// Passes a record on, in pieces.
    pub(super) fn copy_record(&mut self, header: RecordHeader) -> Result<(), EngineError> {
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

    pub(super) fn page_data(&mut self, header: RecordHeader) -> Result<(), EngineError> {
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

    pub(super) fn page_data_in(&mut self, header: RecordHeader, body: &mut [u8]) -> Result<(), EngineError> {
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
            self.travel.record(&pages, self.pass.number > 1);
        }
        self.stats.bytes_page_data += pages.data.len() as u64;
        let head = RecordHeader::bytes(header.kind, header.length as usize);
        self.output.write_slices(&mut [IoSlice::new(&head), IoSlice::new(body)])
    }

    pub(super) fn follow_pass(&mut self, pages: &PageData<'_>) {
        let first = pages.entries().next().map_or(0, |entry| entry.pfn);
        if self.pass.last_pfn.is_none_or(|last| first <= last) {
            self.pass.number += 1;
            self.stats.rounds = self.stats.rounds.max(self.pass.number);
        }
        self.pass.last_pfn = pages.entries().last().map(|entry| entry.pfn);
    }
}
