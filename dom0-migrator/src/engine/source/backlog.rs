//! What waits for the wire, and what overtakes it.
//!
//! In a pass libxenguest comes to regions whose pages all go by reference, where the processor sets the pace and the wire has little to do, and
//! to others whose pages all go as they are, where it is the other way round. So the filter runs ahead of the wire: the pages of a record
//! that would have to wait are copied, so that its buffer is free for the next one, and references overtake them, so that the
//! target reads its disks meanwhile. Copies and window share one budget, [`Config::window_bytes`](crate::engine::Config::window_bytes).
//!
//! # What may overtake
//! A page's reference or marker may overtake other pages, never another entry of the same PFN. Within a pass PFNs ascend, so
//! since the last fence each PFN was sent once as long as they ascend; when they do not, there is a fence. Retained pages that are
//! sent after all go with the references: nothing newer of their PFN has been sent, or they would have been superseded, and what is
//! newer comes behind them, in either lane.
//!
//! Between two passes libxenguest is held up until the wire has caught up: what the log of dirty pages says would be old otherwise by
//! the time its pages are sent, and be said again.

use std::time::Duration;

use crossbeam_channel::{Sender, after, never, select_biased};

use super::filter::{Filter, Mode};
use super::work::{Class, Record};
use crate::engine::error::EngineError;
use crate::engine::memory_record::SpanKind;
use crate::engine::outlet::{Body, Parcel, Piece};
use crate::engine::pool::Buffer;
use crate::engine::xen_stream::{PAGE, PAGE_DATA_HEAD, PageData, RecordHeader, XALLOC, record};

/// Bytes that may still wait for the wire when it counts as having caught up: what it sends until libxenguest has begun the next pass.
const CAUGHT_UP: u64 = 1 << 20;
/// How long to wait at most before looking again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Where pages lie on their way to the wire.
#[derive(Debug)]
pub(super) enum Pages {
    /// In the record's own buffer, or one like it.
    Record(Buffer),
    /// In a copy.
    Copy(Vec<u8>),
}

impl Body for Pages {
    fn part(&self, number: usize) -> &[u8] {
        match self {
            Self::Record(buffer) => buffer.part(number),
            Self::Copy(bytes) if number == 0 => bytes,
            Self::Copy(_) => &[],
        }
    }
}

/// What was sent since the last fence.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum SinceFence {
    /// Nothing.
    #[default]
    Nothing,
    /// Memory, up to this PFN.
    Memory(u64),
    /// Something that memory must not overtake.
    Other,
}

impl Filter {
    /// Whether pages would have to wait for the wire for so long that they had better be copied and overtaken.
    pub(super) fn is_behind(&self) -> bool {
        self.outlet.backlog() > self.config.ahead_bytes
    }

    /// Makes sure that an entry of the record overtakes no older one of its PFN. False: the entries do not ascend, so none of them
    /// may overtake another.
    pub(super) fn keep_order(&mut self, pages: &PageData<'_>) -> bool {
        let is_ascending = pages.entries().is_sorted_by(|a, b| a.pfn < b.pfn);
        let first = pages.entries().next().map_or(0, |entry| entry.pfn);
        let goes_on = match self.since_fence {
            SinceFence::Nothing => true,
            SinceFence::Memory(last) => last < first,
            SinceFence::Other => false,
        };
        if !is_ascending || !goes_on {
            self.outlet.fence();
        }
        self.since_fence = match pages.entries().last() {
            Some(last) if is_ascending => SinceFence::Memory(last.pfn),
            _ => SinceFence::Other,
        };
        is_ascending
    }

    /// Waits, when the wire is behind, until there is room for the record's pages: in the window for those that are to go by reference, in
    /// the budget for copies of the others. The wire has enough to do meanwhile, so nothing is lost by waiting; when it has not, the filter
    /// does not wait, and pages go raw if the window is full.
    pub(super) fn wait_for_room(&mut self, record: &Record, refer: bool) -> Result<(), EngineError> {
        let hashed = record.classes.iter().filter(|class| matches!(class, Class::Hashed(_))).count();
        while self.is_behind() && self.mode == Mode::Filter {
            self.limit_window();
            let total = self.window.bytes() + self.outlet.backlog() + record.body.len() as u64;
            let fits = total <= self.config.window_bytes && self.outlet.has_room();
            let enough = self.window.room().min(self.window.capacity());
            if fits && (!refer || !self.may_refer || hashed <= enough) {
                break;
            }
            self.wait_for_change()?;
        }
        self.limit_window();
        Ok(())
    }

    /// What waits for the wire takes its part of the budget.
    fn limit_window(&mut self) {
        let left = self.config.window_bytes.saturating_sub(self.outlet.backlog()) / PAGE as u64;
        self.window.limit(u32::try_from(left).unwrap_or(u32::MAX));
        // What the window has room for still may lie in free buffers, so that the next record that it keeps need not be taken from the system.
        let spare = (left * PAGE as u64).saturating_sub(self.window.bytes());
        self.pool.hold_spare(if self.may_refer { spare } else { 0 });
    }

    /// Waits until the target has said something, or the wire has taken something.
    fn wait_for_change(&mut self) -> Result<(), EngineError> {
        let events = self.side.as_ref().map_or_else(never, |side| side.events.clone());
        select_biased! {
            recv(events) -> event => self.handle_side_event(event.unwrap_or_else(|_| super::filter::side_is_gone())),
            recv(self.outlet.gone) -> _ => Err(EngineError::Gone),
            recv(self.outlet.progress) -> _ => Ok(()),
            recv(after(LOOK_AGAIN)) -> _ => Ok(()),
        }
    }

    /// Answers libxenguest's thread once the wire has caught up.
    pub(super) fn go_on_catching_up(&mut self) {
        if self.outlet.backlog() <= CAUGHT_UP
            && let Some(reply) = self.catching_up.take()
        {
            // Whoever asked may have given up.
            let _: Result<(), _> = Sender::send(&reply, ());
        }
    }

    /// Takes the raw pages out of the builder: a record of their own, PAGE_DATA, to be sent behind what waits already, and after the one of the
    /// other spans. These stay in the builder; for a PVH or HVM guest's first pass, so do the raw ones, as "allocate only".
    pub(super) fn part(&mut self, record: &Record, raw_at: usize) -> Option<Parcel<Pages, Sender<()>>> {
        let raw = self.builder.spans.iter().filter(|span| span.kind == SpanKind::Raw);
        let raw: usize = raw.map(|span| span.count as usize).sum();
        if raw == 0 {
            return None;
        }
        let length = PAGE_DATA_HEAD + raw * (8 + PAGE);
        let mut head = RecordHeader::bytes(record::PAGE_DATA, length).to_vec();
        head.extend_from_slice(&(raw as u64).to_le_bytes());
        let mut copy = Vec::with_capacity(raw * PAGE);
        let mut at = raw_at;
        for span in &self.builder.spans {
            let pages = if span.kind == SpanKind::NoData { 0 } else { span.count as usize };
            if span.kind == SpanKind::Raw {
                head.extend(span.entries().flat_map(|entry| entry.word().to_le_bytes()));
                copy.extend_from_slice(record.body.get(at..at + pages * PAGE).unwrap_or_default());
            }
            at += pages * PAGE;
        }
        if self.placeholders && record.pass == 1 {
            // Newer versions of libxenguest build superpages out of PFNs that come in order in the first pass.
            for span in self.builder.spans.iter_mut().filter(|span| span.kind == SpanKind::Raw) {
                (span.kind, span.first.page_type) = (SpanKind::NoData, XALLOC);
            }
        } else {
            self.builder.spans.retain(|span| span.kind != SpanKind::Raw);
        }
        let pieces = vec![Piece::Body { part: 0, range: 0..copy.len() }];
        Some(Parcel { head, pieces, body: Some(Pages::Copy(copy)), then: None })
    }
}
