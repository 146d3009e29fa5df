//! PAGE_DATA records for libxenguest.

use std::io::IoSlice;

use crate::engine::descriptor::Output;
use crate::engine::error::EngineError;
use crate::engine::xen_stream::{Entry, PAGE, PAGE_DATA_HEAD, RecordHeader, record};

/// A PAGE_DATA record in the making, out of pages that lie anywhere.
#[derive(Default)]
pub(super) struct PageDataOut<'a> {
    entries: Vec<Entry>,
    pages: Vec<&'a [u8]>,
}

impl<'a> PageDataOut<'a> {
    pub(super) fn push(&mut self, entry: Entry, page: Option<&'a [u8]>) {
        self.entries.push(entry);
        self.pages.extend(page);
    }

    /// Writes the record, unless it is empty. It has at most 1,024 entries, since memory records and batches have.
    pub(super) fn write(self, head: &mut Vec<u8>, output: &mut Output) -> Result<(), EngineError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let length = PAGE_DATA_HEAD + self.entries.len() * 8 + self.pages.len() * PAGE;
        head.clear();
        head.extend_from_slice(&RecordHeader::bytes(record::PAGE_DATA, length));
        head.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        for entry in &self.entries {
            head.extend_from_slice(&entry.word().to_le_bytes());
        }
        let pages = self.pages.iter().map(|page| IoSlice::new(page));
        let mut slices: Vec<_> = std::iter::once(IoSlice::new(head)).chain(pages).collect();
        output.write_slices(&mut slices)
    }
}
