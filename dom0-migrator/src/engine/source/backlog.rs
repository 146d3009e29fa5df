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
use super::plan::way;
use super::work::{Class, Record};
use crate::engine::dirty_log::Look;
use crate::engine::error::EngineError;
use crate::engine::memory_record::{Span, SpanKind};
use crate::engine::outlet::{Body, Parcel, Piece};
use crate::engine::pool::Buffer;
use crate::engine::xen_stream::{
    Entry, PAGE, PAGE_DATA_HEAD, PageData, RecordHeader, XALLOC, has_data, is_page_table, record,
};

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
    /// In a copy, from which one may still be left out.
    Waiting(WaitingPages),
}

impl Body for Pages {
    fn part(&self, number: usize) -> &[u8] {
        match self {
            Self::Record(buffer) => buffer.part(number),
            Self::Copy(bytes) | Self::Waiting(WaitingPages { bytes, .. }) if number == 0 => bytes,
            Self::Copy(_) | Self::Waiting(_) => &[],
        }
    }
}

/// Raw pages that wait, as a record of their own.
#[derive(Debug)]
pub(super) struct WaitingPages {
    /// What the record says of each; the pages of those that have data follow each other in `bytes`.
    entries: Vec<Entry>,
    bytes: Vec<u8>,
    /// Whether a page that is left out is named all the same, as "allocate only": the target is to have memory for it, and no longer waits for an older
    /// reference to it, which was superseded when the page was sent off.
    keep_places: bool,
    /// Whether they were written to since they were sent first.
    again: bool,
}

impl WaitingPages {
    fn into_parcel(self) -> Parcel<Pages, Sender<()>> {
        let (head, pieces) = self.head();
        Parcel { head, pieces, body: Some(Pages::Waiting(self)), then: None }
    }

    /// The record's bytes before the pages, and where these lie. Nothing of a record without entries.
    fn head(&self) -> (Vec<u8>, Vec<Piece>) {
        if self.entries.is_empty() {
            return (Vec::new(), Vec::new());
        }
        let length = PAGE_DATA_HEAD + self.entries.len() * 8 + self.bytes.len();
        let mut head = RecordHeader::bytes(record::PAGE_DATA, length).to_vec();
        head.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        head.extend(self.entries.iter().flat_map(|entry| entry.word().to_le_bytes()));
        (head, vec![Piece::Body { part: 0, range: 0..self.bytes.len() }])
    }

    /// Leaves pages out, and tells `left` of each.
    fn leave_out(&mut self, may_leave: impl Fn(u64) -> bool, mut left: impl FnMut(Entry)) {
        let leaves = |entry: &Entry| has_data(entry.page_type) && may_leave(entry.pfn);
        if !self.entries.iter().any(leaves) {
            return;
        }
        let (mut entries, mut at, mut end) = (Vec::with_capacity(self.entries.len()), 0, 0);
        for &entry in &self.entries {
            let length = if has_data(entry.page_type) { PAGE } else { 0 };
            if leaves(&entry) {
                left(entry);
                if self.keep_places {
                    entries.push(Entry { page_type: XALLOC, ..entry });
                }
            } else {
                self.bytes.copy_within(at..at + length, end);
                end += length;
                entries.push(entry);
            }
            at += length;
        }
        self.bytes.truncate(end);
        self.bytes.shrink_to_fit();
        self.entries = entries;
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
        // The records that the window keeps come back to the pool, and what it has room for still may lie in free buffers there, so that the next one
        // that it keeps need not be taken from the system.
        let beside = (left * PAGE as u64).saturating_sub(self.window.arena_bytes());
        self.pool.hold_beside(if self.may_refer { beside } else { self.window.kept_bytes() });
    }

    /// Waits until the target has said something, or the wire has taken something.
    fn wait_for_change(&mut self) -> Result<(), EngineError> {
        let looks = self.looks.clone();
        let events = self.side.as_ref().map_or_else(never, |side| side.events.clone());
        select_biased! {
            recv(events) -> event => self.handle_side_event(event.unwrap_or_else(|_| super::filter::side_is_gone())),
            recv(self.outlet.gone) -> _ => Err(EngineError::Gone),
            recv(looks) -> look => {
                self.see(look.ok());
                Ok(())
            }
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
    pub(super) fn part(&mut self, record: &Record, raw: &[Piece]) -> Option<Parcel<Pages, Sender<()>>> {
        let is_raw = |span: &&Span| span.kind == SpanKind::Raw;
        let entries: Vec<Entry> =
            self.builder.spans.iter().filter(is_raw).flat_map(|span| span.entries()).collect();
        if entries.is_empty() {
            return None;
        }
        let mut bytes = Vec::with_capacity(entries.len() * PAGE);
        for piece in raw {
            if let Piece::Body { range, .. } = piece {
                bytes.extend_from_slice(record.body.get(range.clone()).unwrap_or_default());
            }
        }
        let places_are_named = self.placeholders && record.pass == 1;
        if places_are_named {
            // Newer versions of libxenguest build superpages out of PFNs that come in order in the first pass.
            for span in self.builder.spans.iter_mut().filter(|span| span.kind == SpanKind::Raw) {
                (span.kind, span.first.page_type) = (SpanKind::NoData, XALLOC);
            }
        } else {
            self.builder.spans.retain(|span| span.kind != SpanKind::Raw);
        }
        let again = record.pass > 1;
        Some(WaitingPages { entries, bytes, keep_places: !places_are_named, again }.into_parcel())
    }

    /// A look at the log of dirty pages was taken: what waits and is marked again is left out, and so is what comes. None: there will be no more.
    pub(super) fn see(&mut self, look: Option<Look>) {
        let Some(look) = look else {
            self.looks = never();
            return;
        };
        if self.left_out.see(look) {
            self.leave_out_what_waits();
        }
    }

    /// Behind the last fence PFNs ascend, so nothing newer of these pages was sent, and that is all that one need know.
    fn leave_out_what_waits(&mut self) {
        let (left_out, stats, travel) = (&mut self.left_out, &mut self.stats, &mut self.travel);
        let Some(look) = left_out.look() else { return };
        let mut left = Vec::new();
        let less = self.outlet.revise(|parcel| {
            if let Some(Pages::Waiting(pages)) = &mut parcel.body {
                let again = pages.again;
                pages.leave_out(|pfn| look.is_marked(pfn), |entry| left.push((entry, again)));
                (parcel.head, parcel.pieces) = pages.head();
            }
        });
        self.bytes_sent -= less;
        for (entry, again) in left {
            left_out.leave(entry.pfn);
            stats.pages_left_out += 1;
            stats.pages_raw -= 1;
            stats.bytes_page_data -= PAGE as u64;
            stats.pages_page_table -= u64::from(is_page_table(entry.page_type));
            travel.take_back(way(entry.page_type, again));
        }
    }

    /// The memory ends: nothing may be missing.
    pub(super) fn account_for_left_out(&self) -> Result<(), EngineError> {
        match self.left_out.missing(self.placeholders) {
            None => Ok(()),
            Some((pages, first)) => Err(EngineError::LeftOut { pages, first }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::waiting::Length as _;
    use crate::engine::xen_stream::{NOTAB, RECORD_HEADER};

    #[test]
    fn a_page_that_is_left_out_while_it_waits_is_named_unless_it_was() {
        for keep_places in [true, false] {
            let entries: Vec<Entry> = (10..14)
                .zip([NOTAB, NOTAB, 1, NOTAB])
                .map(|(pfn, page_type)| Entry { pfn, page_type })
                .collect();
            let bytes = (10..14_u8).flat_map(|pfn| [pfn; PAGE]).collect();
            let mut pages = WaitingPages { entries, bytes, keep_places, again: true };
            let mut left = Vec::new();
            pages.leave_out(|pfn| pfn == 11 || pfn == 12, |entry| left.push((entry.pfn, entry.page_type)));
            assert_eq!(left, [(11, NOTAB), (12, 1)]);
            let parcel = pages.into_parcel();
            let body = [&parcel.head[RECORD_HEADER..], parcel.body.as_ref().unwrap().part(0)].concat();
            let parsed = PageData::parse(&body).unwrap();
            let found: Vec<_> = parsed
                .pages_by_entry()
                .map(|(entry, page)| (entry.pfn, entry.page_type, page.map(|page| page[0])))
                .collect();
            let named = [(11, XALLOC, None), (12, XALLOC, None)];
            let mut expected = vec![(10, NOTAB, Some(10)), (13, NOTAB, Some(13))];
            expected.splice(1..1, named.into_iter().filter(|_| keep_places));
            assert_eq!(found, expected);
            assert_eq!(parcel.length() as usize, RECORD_HEADER + body.len());
        }
    }

    #[test]
    fn a_record_of_which_nothing_is_left_is_none() {
        let entries = vec![Entry { pfn: 1, page_type: NOTAB }];
        let mut pages = WaitingPages { entries, bytes: vec![1; PAGE], keep_places: false, again: false };
        pages.leave_out(|_| true, drop);
        assert_eq!(pages.into_parcel().length(), 0);
    }
}
