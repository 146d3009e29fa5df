//! PAGE_DATA records for libxenguest.

use std::ops::Range;

use crate::engine::outlet::{Body, Parcel, Piece, add_range, add_zeros};
use crate::engine::pool::Buffer;
use crate::engine::restorer::Batch;
use crate::engine::xen_stream::{Entry, PAGE, PAGE_DATA_HEAD, RECORD_HEADER, RecordHeader, record};

/// What pages lie in on their way to libxenguest.
#[derive(Debug)]
pub(super) enum Pages {
    /// A record that came over the network.
    Record(Buffer),
    /// What a disk brought, a part for each read.
    Batches(Vec<Batch>),
}

impl Body for Pages {
    fn part(&self, number: usize) -> &[u8] {
        match self {
            Self::Record(record) => record.part(number),
            Self::Batches(batches) => batches.get(number).map_or(&[], Batch::bytes),
        }
    }
}

/// A PAGE_DATA record in the making, out of pages that lie anywhere in one body. It has at most 1,024 entries: memory records have no more,
/// and whoever joins batches looks at [`len`](Self::len).
#[derive(Debug, Default)]
pub(super) struct PageDataOut {
    entries: Vec<Entry>,
    pieces: Vec<Piece>,
    pages: usize,
}

impl PageDataOut {
    /// An entry without data.
    pub(super) fn push(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// Entries so far.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// An entry whose page lies there.
    pub(super) fn push_page(&mut self, entry: Entry, part: usize, range: Range<usize>) {
        self.entries.push(entry);
        self.pages += 1;
        add_range(&mut self.pieces, part, range);
    }

    /// An entry whose page is zeros.
    pub(super) fn push_zeros(&mut self, entry: Entry) {
        self.entries.push(entry);
        self.pages += 1;
        add_zeros(&mut self.pieces);
    }

    /// The record, unless it is empty.
    pub(super) fn parcel<T>(self, body: Pages) -> Option<Parcel<Pages, T>> {
        if self.entries.is_empty() {
            return None;
        }
        let length = PAGE_DATA_HEAD + self.entries.len() * 8 + self.pages * PAGE;
        let mut head = Vec::with_capacity(RECORD_HEADER + PAGE_DATA_HEAD + self.entries.len() * 8);
        head.extend_from_slice(&RecordHeader::bytes(record::PAGE_DATA, length));
        head.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        for entry in &self.entries {
            head.extend_from_slice(&entry.word().to_le_bytes());
        }
        Some(Parcel { head, pieces: self.pieces, body: Some(body), then: None })
    }
}
