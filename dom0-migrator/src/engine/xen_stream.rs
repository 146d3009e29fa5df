//! Xen's own stream, as far as the filters look into it.
//!
//! Specified in Xen's `docs/specs/libxc-migration-stream.pandoc`: an image header, a domain header, then records of
//! `{u32 type, u32 length, body, padding to 8}`, END the last. All integers but those of the image header are little-endian,
//! since a big-endian image is refused.

use super::error::{EngineError, HeaderProblem, StreamProblem};

/// Bytes in a guest page.
pub const PAGE: usize = enlightenment::PAGE_SIZE;
/// The page of zeros.
pub static ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// Bytes of the image header.
pub const IMAGE_HEADER: usize = 24;
/// Bytes of the domain header.
pub const DOMAIN_HEADER: usize = 16;
/// Bytes of a record's header.
pub const RECORD_HEADER: usize = 8;
/// Longest record that libxc reads (`REC_LENGTH_MAX`).
pub const MAX_RECORD: u32 = 128 << 20;
/// PFNs in one PAGE_DATA at most (`MAX_BATCH_SIZE`).
pub const MAX_BATCH: usize = 1024;
/// Bytes of PAGE_DATA's head: count and reserved.
pub const PAGE_DATA_HEAD: usize = 8;
/// Longest PAGE_DATA that libxc writes.
pub const MAX_PAGE_DATA: usize = PAGE_DATA_HEAD + MAX_BATCH * (8 + PAGE);
/// Highest PFN that an entry can hold.
pub const MAX_PFN: u64 = (1 << 52) - 1;

/// Record types.
pub mod record {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const END: u32 = 0;
    pub const PAGE_DATA: u32 = 1;
    pub const VERIFY: u32 = 0xd;
    pub const CHECKPOINT: u32 = 0xe;
    pub const CHECKPOINT_DIRTY_PFN_LIST: u32 = 0xf;
    /// The last one that the specification knows: X86_MSR_POLICY.
    pub const LAST_KNOWN: u32 = 0x12;
    /// Set in the types of records that a reader may ignore.
    pub const OPTIONAL: u32 = 0x8000_0000;
    /// Ours: where the target finds a side channel ([`crate::offer`]); the first record, if it is there. Whoever does not know it, ignores it.
    pub const OFFER: u32 = OPTIONAL | 0x0050_736f;
}

/// Type of an ordinary page.
pub const NOTAB: u8 = 0;
/// Type of a page that is to be allocated, and whose contents do not come with the entry.
pub const XALLOC: u8 = 14;
/// Domain type of PVH and HVM guests.
pub const DOMAIN_HVM: u32 = 2;

/// Whether libxc knows the page type.
pub fn is_known_type(page_type: u8) -> bool {
    page_type <= 4 || (9..=15).contains(&page_type)
}

/// Whether an entry of this type carries a page.
pub fn has_data(page_type: u8) -> bool {
    page_type <= 4 || (9..=12).contains(&page_type)
}

/// Whether it is a page table's.
pub fn is_page_table(page_type: u8) -> bool {
    has_data(page_type) && page_type != NOTAB
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

/// A little-endian u32, if it is there.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// A little-endian u64, if it is there.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Checks image and domain header.
pub fn check_headers(bytes: &[u8; IMAGE_HEADER + DOMAIN_HEADER]) -> Result<(), HeaderProblem> {
    let big_u32 = |at| u32_at(bytes, at).map_or(0, u32::swap_bytes);
    let marker = u64_at(bytes, 0).unwrap_or(0);
    if marker != u64::MAX {
        return Err(HeaderProblem::Marker(marker));
    }
    if big_u32(8) != 0x5845_4e46 {
        return Err(HeaderProblem::Id(big_u32(8)));
    }
    if !(2..=3).contains(&big_u32(12)) {
        return Err(HeaderProblem::Version(big_u32(12)));
    }
    if u16_at(bytes, 16).map_or(0, u16::swap_bytes) & 1 != 0 {
        return Err(HeaderProblem::BigEndian);
    }
    let page_shift = u16_at(bytes, IMAGE_HEADER + 4).unwrap_or(0);
    if page_shift != 12 {
        return Err(HeaderProblem::PageShift(page_shift));
    }
    Ok(())
}

/// The domain header's type.
pub fn domain_type(headers: &[u8; IMAGE_HEADER + DOMAIN_HEADER]) -> u32 {
    u32_at(headers, IMAGE_HEADER).unwrap_or(0)
}

/// A record's header, and where it stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Its type.
    pub kind: u32,
    /// Length of the body, padding not included.
    pub length: u32,
    /// Where it begins in the stream.
    pub offset: u64,
}

impl RecordHeader {
    /// The header at `offset`.
    pub fn parse(bytes: &[u8; RECORD_HEADER], offset: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = *bytes;
        Self { kind: u32::from_le_bytes([a, b, c, d]), length: u32::from_le_bytes([e, f, g, h]), offset }
    }

    /// Length of the body with its padding.
    pub fn padded(&self) -> u64 {
        u64::from(self.length).next_multiple_of(8)
    }

    /// The error that this record is.
    pub fn error(&self, problem: StreamProblem) -> EngineError {
        EngineError::Stream { offset: self.offset, record: self.kind, problem }
    }

    /// The header's bytes for a body of this type and length.
    pub fn bytes(kind: u32, length: usize) -> [u8; RECORD_HEADER] {
        // Every record that we build is shorter than MAX_RECORD.
        let mut out = [0; RECORD_HEADER];
        out[..4].copy_from_slice(&kind.to_le_bytes());
        out[4..].copy_from_slice(&(length as u32).to_le_bytes());
        out
    }
}

/// One PFN of a PAGE_DATA record with its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The PFN.
    pub pfn: u64,
    /// The four bits of its type.
    pub page_type: u8,
}

impl Entry {
    /// The entry in these 64 bits; reserved bits are ignored, as libxc does.
    pub fn from_word(word: u64) -> Self {
        Self { pfn: word & MAX_PFN, page_type: (word >> 60) as u8 }
    }

    /// Its 64 bits.
    pub fn word(self) -> u64 {
        u64::from(self.page_type) << 60 | self.pfn
    }
}

/// A PAGE_DATA record's body, checked: the type of every entry is known, and there are as many pages as they ask for.
#[derive(Clone, Copy, Debug)]
pub struct PageData<'a> {
    words: &'a [u8],
    /// The pages.
    pub data: &'a [u8],
}

impl<'a> PageData<'a> {
    /// Parses a body.
    pub fn parse(body: &'a [u8]) -> Result<Self, StreamProblem> {
        let length = body.len() as u64;
        let short = |expected: usize| StreamProblem::Length { length, expected: expected as u64 };
        let count = u32_at(body, 0).ok_or(short(PAGE_DATA_HEAD))?;
        if count == 0 || count as usize > MAX_BATCH {
            return Err(StreamProblem::Count(count));
        }
        let head = PAGE_DATA_HEAD + count as usize * 8;
        let words = body.get(PAGE_DATA_HEAD..head).ok_or(short(head))?;
        let data = body.get(head..).ok_or(short(head))?;
        let this = Self { words, data };
        let mut pages = 0;
        for entry in this.entries() {
            if !is_known_type(entry.page_type) {
                return Err(StreamProblem::PageType { page_type: entry.page_type, pfn: entry.pfn });
            }
            pages += usize::from(has_data(entry.page_type));
        }
        if data.len() != pages * PAGE {
            return Err(short(head + pages * PAGE));
        }
        Ok(this)
    }

    /// The entries, in order.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + 'a {
        self.words.chunks_exact(8).map(|word| Entry::from_word(u64_at(word, 0).unwrap_or(0)))
    }

    /// Entries in it.
    pub fn count(&self) -> usize {
        self.words.len() / 8
    }

    /// Pages in it.
    pub fn pages(&self) -> usize {
        self.data.len() / PAGE
    }

    /// The entries with their pages, in order.
    pub fn pages_by_entry(&self) -> impl Iterator<Item = (Entry, Option<&'a [u8]>)> + 'a {
        let mut pages = self.data.chunks_exact(PAGE);
        self.entries().map(move |entry| (entry, if has_data(entry.page_type) { pages.next() } else { None }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_with_data_are_those_that_libxc_knows() {
        let known: Vec<u8> = (0..16).filter(|&t| is_known_type(t)).collect();
        let data: Vec<u8> = (0..16).filter(|&t| has_data(t)).collect();
        assert_eq!(known, [0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(data, [0, 1, 2, 3, 4, 9, 10, 11, 12]);
    }

    #[test]
    fn page_data_must_have_the_pages_it_lists() {
        let mut body = vec![2, 0, 0, 0, 0, 0, 0, 0];
        body.extend(Entry { pfn: 7, page_type: NOTAB }.word().to_le_bytes());
        body.extend(Entry { pfn: 8, page_type: 15 }.word().to_le_bytes());
        assert_eq!(
            PageData::parse(&body).unwrap_err(),
            StreamProblem::Length { length: 24, expected: 24 + 4096 }
        );
        body.extend([3; PAGE]);
        let parsed = PageData::parse(&body).unwrap();
        let pages: Vec<_> = parsed.pages_by_entry().map(|(e, p)| (e.pfn, p.map(|p| p[0]))).collect();
        assert_eq!(pages, [(7, Some(3)), (8, None)]);
        body[0] = 0;
        assert_eq!(PageData::parse(&body).unwrap_err(), StreamProblem::Count(0));
        body[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(PageData::parse(&body).unwrap_err(), StreamProblem::Count(u32::MAX));
    }
}
