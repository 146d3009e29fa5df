//! How each page of a PAGE_DATA record goes: raw, as a marker, or by reference.

use std::io::IoSlice;
use std::time::Instant;

use super::filter::Filter;
use crate::engine::error::EngineError;
use crate::engine::memory_record::{self, Hash, Span, SpanKind};
use crate::engine::travel::Way;
use crate::engine::xen_stream::{
    NOTAB, PAGE, PAGE_DATA_HEAD, PageData, RecordHeader, ZERO_PAGE, is_page_table,
};

/// Pages that one thread hashes at least. Hashing them takes several times as long (2.7 us each, measured) as starting a thread.
const PAGES_A_THREAD: usize = 64;

impl Filter {
    /// Decides for every entry how it goes, and fills the builder. False: the record is best sent as it is (nothing of it
    /// goes by reference then).
    pub(super) fn plan(&mut self, pages: &PageData<'_>) -> bool {
        self.builder.clear();
        // libxenguest never names a PFN twice in a record; if it did, the later entry would have to supersede the earlier one.
        let is_ascending = pages.entries().is_sorted_by(|a, b| a.pfn < b.pfn);
        let refer = self.may_refer && is_ascending && self.pass.number <= self.config.reference_passes;
        let mut zeros = 0;
        let mut referred = Vec::new();
        for (entry, page) in pages.pages_by_entry() {
            self.stats.references_superseded += u64::from(self.window.supersede(entry.pfn));
            let kind = match page {
                None => SpanKind::NoData,
                Some(page) if entry.page_type == NOTAB && page == ZERO_PAGE => {
                    zeros += 1;
                    SpanKind::Zero
                }
                Some(page) if entry.page_type == NOTAB && refer => {
                    match self.place(entry.pfn, referred.len()) {
                        Some(kind) => {
                            referred.push((entry.pfn, page));
                            kind
                        }
                        None => SpanKind::Raw,
                    }
                }
                Some(_) => SpanKind::Raw,
            };
            self.builder.push(entry, kind);
        }
        self.retain(&referred);
        zeros + referred.len() > 0 || self.builder.head_len() < PAGE_DATA_HEAD + 8 * pages.count()
    }

    /// Where the page lies, if it may go by reference; `before` pages of this record go by reference already.
    fn place(&mut self, pfn: u64, before: usize) -> Option<SpanKind> {
        let place = self.map.lookup(enlightenment::Pfn(pfn))?;
        let side = self.side.as_ref()?;
        let Some(disk) = side.disks.get(place.disk as usize).copied().flatten() else {
            self.stats.pages_disk_missing += 1;
            return None;
        };
        if before >= self.window.room() {
            self.stats.pages_window_full += 1;
            return None;
        }
        Some(SpanKind::Reference { disk, offset: place.offset })
    }

    /// Hashes the pages that go by reference and keeps copies of them; there is room, as `place` has seen.
    fn retain(&mut self, referred: &[(u64, &[u8])]) {
        let Some(side) = self.side.as_ref().filter(|_| !referred.is_empty()) else { return };
        let began = Instant::now();
        self.builder.hashes.resize(referred.len(), [0; memory_record::HASH]);
        hash_all(&side.key, referred, &mut self.builder.hashes, self.config.hashers);
        self.stats.hashing_seconds += began.elapsed().as_secs_f64();
        for (pfn, page) in referred {
            self.window.retain(*pfn, page);
        }
        let peak = &mut self.stats.references_outstanding_peak;
        *peak = (*peak).max(self.window.outstanding() as u64);
    }

    /// Sends what was planned.
    pub(super) fn send_memory_record(&mut self, pages: &PageData<'_>) -> Result<(), EngineError> {
        let mut slices = vec![IoSlice::new(&[])];
        let (mut at, mut raw) = (0, 0);
        for span in &self.builder.spans {
            let count = span.count as usize;
            self.travel.span(span.first.pfn, u64::from(span.count), way(span, self.pass.number > 1));
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

/// The way that a span goes; `again`: in a pass after the first.
fn way(span: &Span, again: bool) -> Way {
    match span.kind {
        SpanKind::NoData => Way::NoData,
        SpanKind::Zero => Way::Zero,
        SpanKind::Reference { .. } => Way::Referenced,
        SpanKind::Raw if is_page_table(span.first.page_type) => Way::PageTable,
        SpanKind::Raw if again => Way::Resent,
        SpanKind::Raw => Way::Raw,
    }
}

/// Hashes pages on up to `threads` threads, this one among them.
fn hash_all(key: &[u8; 32], pages: &[(u64, &[u8])], hashes: &mut [Hash], threads: usize) {
    let hash_some = |pages: &[(u64, &[u8])], hashes: &mut [Hash]| {
        for ((_, page), hash) in pages.iter().zip(hashes) {
            *hash = memory_record::hash(key, page);
        }
    };
    let threads = threads.min(pages.len() / PAGES_A_THREAD).max(1);
    let each = pages.len().div_ceil(threads).max(1);
    let all_began = std::thread::scope(|scope| {
        let mut shares = pages.chunks(each).zip(hashes.chunks_mut(each));
        let own = shares.next();
        let all_began = shares.all(|(pages, hashes)| {
            std::thread::Builder::new().spawn_scoped(scope, move || hash_some(pages, hashes)).is_ok()
        });
        if let Some((pages, hashes)) = own {
            hash_some(pages, hashes);
        }
        all_began
    });
    if !all_began {
        hash_some(pages, hashes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_gets_its_own_hash_however_many_threads_there_are() {
        let contents: Vec<Vec<u8>> = (0..1024_u32).map(|i| i.to_le_bytes().repeat(PAGE / 4)).collect();
        let expected: Vec<Hash> = contents.iter().map(|page| memory_record::hash(&[3; 32], page)).collect();
        for (count, threads) in [(0, 4), (1, 4), (63, 4), (129, 2), (1000, 3), (1024, 8), (1024, 0)] {
            let pages: Vec<(u64, &[u8])> =
                contents[..count].iter().map(|page| (0, page.as_slice())).collect();
            let mut hashes = vec![[0; memory_record::HASH]; count];
            hash_all(&[3; 32], &pages, &mut hashes, threads);
            assert_eq!(hashes, expected[..count]);
        }
    }
}
