//! How each page of a PAGE_DATA record goes: raw, as a marker, or by reference.

use std::sync::atomic::Ordering;

use super::backlog::Pages;
use super::filter::Filter;
use super::work::{Class, Record};
use crate::engine::error::EngineError;
use crate::engine::memory_record::{self, Span, SpanKind};
use crate::engine::outlet::{Parcel, add_range};
use crate::engine::reference_map::Place;
use crate::engine::travel::Way;
use crate::engine::xen_stream::{
    Entry, PAGE, PAGE_DATA_HEAD, PageData, RECORD_HEADER, RecordHeader, XALLOC, is_page_table,
};

impl Filter {
    /// Decides for every entry how it goes, fills the builder, and retains the pages that go by reference: in the record itself, if the
    /// window has room for all of it. False: the record is best sent as it is (nothing of it goes by reference then).
    ///
    /// `refer`: pages may go by reference. Not those of a record that names PFNs out of order, perhaps twice, which libxenguest never does:
    /// the later entry would have to supersede the earlier one.
    ///
    /// `leave`: pages may be left out; not those of such a record either.
    pub(super) fn plan(&mut self, pages: &PageData<'_>, record: &Record, refer: bool, leave: bool) -> bool {
        self.builder.clear();
        self.raw.clear();
        let refer = refer && self.may_refer;
        let mut hashes = record.hashes.iter();
        let in_place = refer && self.keep_record(pages, record);
        let (mut zeros, mut left, mut data_page) = (0, 0, 0);
        let mut at = record.header.length as usize - record_pages(record) * PAGE;
        for ((entry, page), class) in pages.pages_by_entry().zip(&record.classes) {
            let here = at..at + page.map_or(0, |_| PAGE);
            at = here.end;
            let index = data_page;
            data_page += usize::from(page.is_some());
            let is_short = matches!(class, Class::NoData | Class::Zero);
            if leave && !is_short && self.left_out.may_leave(entry.pfn) {
                if matches!(class, Class::Hashed(_)) {
                    hashes.next();
                }
                left += 1;
                self.leave(entry, record.pass);
                continue;
            }
            self.left_out.sent(entry.pfn);
            self.stats.references_superseded += u64::from(self.window.supersede(entry.pfn));
            let kind = match (*class, page) {
                (Class::NoData, _) => SpanKind::NoData,
                (Class::Zero, _) => {
                    zeros += 1;
                    SpanKind::Zero
                }
                (Class::Listed(place), _) if refer => {
                    self.count_unreferred(place);
                    SpanKind::Raw
                }
                (Class::Hashed(place), Some(page)) => {
                    let hash = hashes.next();
                    let hash = hash.filter(|_| refer);
                    let window = &mut self.window;
                    let mut retain = || match in_place {
                        true => window.retain_here(entry.pfn, index),
                        false => window.retain(entry.pfn, page),
                    };
                    let disk = self.side.as_ref().and_then(|side| side.disk(place));
                    match (hash, disk) {
                        (Some(hash), Some(disk)) if retain().is_some() => {
                            self.builder.hashes.push(*hash);
                            SpanKind::Reference { disk, offset: place.offset }
                        }
                        (hash, _) => {
                            if hash.is_some() {
                                self.count_unreferred(place);
                            }
                            SpanKind::Raw
                        }
                    }
                }
                (Class::Plain | Class::Listed(_) | Class::Hashed(_), _) => SpanKind::Raw,
            };
            if kind == SpanKind::Raw {
                add_range(&mut self.raw, 0, here);
            }
            self.builder.push(entry, kind);
        }
        self.stats.pages_left_out += left;
        self.window.end_record();
        self.stats.hashing_seconds += record.hashing_seconds;
        let peak = &mut self.stats.references_outstanding_peak;
        *peak = (*peak).max(self.window.outstanding() as u64);
        zeros + self.builder.hashes.len() > 0
            || left > 0
            || self.builder.head_len() < PAGE_DATA_HEAD + 8 * pages.count()
    }

    /// Leaves a page out. In the first pass the target is to have memory for it all the same, in the order of PFNs; and later the domain stands still.
    fn leave(&mut self, entry: Entry, pass: u32) {
        self.left_out.leave(entry.pfn);
        if pass == 1 {
            self.stats.references_superseded += u64::from(self.window.supersede(entry.pfn));
            self.builder.push(Entry { page_type: XALLOC, ..entry }, SpanKind::NoData);
        }
    }

    /// Has the window keep the record itself, if it has room for it. While the wire is behind it has none: what waits for the wire shares its
    /// budget.
    fn keep_record(&mut self, pages: &PageData<'_>, record: &Record) -> bool {
        if self.is_behind() {
            return false;
        }
        let Some(body) = record.body.keep() else { return false };
        let pages_at = record.header.length as usize - pages.data.len();
        let hashed = record.classes.iter().filter(|class| matches!(class, Class::Hashed(_))).count();
        self.window.begin_record(body, pages_at, hashed)
    }

    /// Counts a page that a list names and that goes raw all the same.
    fn count_unreferred(&mut self, place: Place) {
        match self.side.as_ref().and_then(|side| side.disk(place)) {
            None => self.stats.pages_disk_missing += 1,
            Some(_) => self.stats.pages_window_full += 1,
        }
    }

    /// Tells the workers what is worth their while.
    pub(super) fn advise_workers(&self) {
        // While the wire is behind the filter waits for room, so there will be some.
        let room = if self.is_behind() { self.window.capacity() } else { self.window.room() };
        self.knowledge.room.store(room, Ordering::Relaxed);
        self.knowledge.may_refer.store(self.may_refer, Ordering::Relaxed);
    }

    /// Sends what was planned; in two records when the wire is behind and the record may be parted.
    pub(super) fn send_memory_record(&mut self, record: Record, may_part: bool) -> Result<(), EngineError> {
        let mut pieces = std::mem::take(&mut self.raw);
        let mut raw = 0;
        for span in &self.builder.spans {
            let count = span.count as usize;
            self.travel.span(span.first.pfn, u64::from(span.count), way_of(span, record.pass > 1));
            match span.kind {
                SpanKind::Raw => {
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
                SpanKind::NoData => self.stats.bytes_markers += memory_record::SPAN as u64,
                SpanKind::Reference { .. } => {
                    self.stats.pages_referenced += count as u64;
                    self.stats.bytes_references += (memory_record::SPAN + count * memory_record::HASH) as u64;
                }
            }
        }
        self.stats.bytes_page_data += (raw * PAGE) as u64;
        let parted = may_part && self.is_behind();
        let apart = if parted { self.part(&record, &pieces) } else { None };
        if parted {
            (pieces, raw) = (Vec::new(), 0);
        }
        if self.builder.spans.is_empty() {
            return apart.map_or(Ok(()), |apart| self.send(apart));
        }
        let length = self.builder.head_len() + raw * PAGE;
        let mut head = Vec::with_capacity(RECORD_HEADER + self.builder.head_len());
        head.extend_from_slice(&RecordHeader::bytes(memory_record::RECORD_TYPE, length));
        let first = self.window.next_number() - self.builder.hashes.len() as u64;
        self.builder.write_head(first, &mut head);
        let body = (!parted).then_some(Pages::Record(record.body));
        let parcel = Parcel { head, pieces, body, then: None };
        // All records with references go in this lane, so that their numbers ascend.
        if may_part {
            self.send_first(parcel)?
        } else {
            self.send(parcel)?
        }
        apart.map_or(Ok(()), |apart| self.send(apart))
    }
}

/// The way that a span goes; `again`: in a pass after the first.
fn way_of(span: &Span, again: bool) -> Way {
    match span.kind {
        SpanKind::NoData => Way::NoData,
        SpanKind::Zero => Way::Zero,
        SpanKind::Reference { .. } => Way::Referenced,
        SpanKind::Raw => way(span.first.page_type, again),
    }
}

/// The way of a page that goes as it is.
pub(super) fn way(page_type: u8, again: bool) -> Way {
    match page_type {
        kind if is_page_table(kind) => Way::PageTable,
        _ if again => Way::Resent,
        _ => Way::Raw,
    }
}

/// Pages with data in a record whose entries were looked at.
fn record_pages(record: &Record) -> usize {
    record.classes.iter().filter(|class| **class != Class::NoData).count()
}
