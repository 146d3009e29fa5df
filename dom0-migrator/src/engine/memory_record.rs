//! The private records: the one that stands in place of a PAGE_DATA record, and the one that asks how far the target is.
//!
//! Their type lies in the space of optional records, so that a reader which does not know it would skip it; none ever sees it,
//! since it is sent only after a target has answered on the side channel. All integers are little-endian.
//!
//! ```text
//!      0     1     2     3     4     5     6     7 octet
//!     +-----------------------+-----------+-----------+
//!   0 | magic "PsMe"          | kind (1)  | version   |
//!     +-----------------------+-----------+-----------+
//!   8 | spans (S)             | references (R)        |
//!     +-----------------------+-----------------------+
//!  16 | number of the first reference in this record  |
//!     +-----------------------------------------------+
//!  24 | span[0] … span[S-1], 24 octets each           |
//!     +-----------------------------------------------+
//!     | hash[0] … hash[R-1], 16 octets each           |
//!     +-----------------------------------------------+
//!     | page_data[0] … page_data[N-1]                 |
//!     +-----------------------------------------------+
//!
//!     a span: entries with consecutive PFNs that are alike
//!     +-----------------------------------------------+
//!   0 | bits 63-60 page type, bits 51-0 first PFN     |  as in PAGE_DATA
//!     +-----------------------+-----+-----+-----------+
//!   8 | count                 |kind | disk| 0         |
//!     +-----------------------+-----+-----+-----------+
//!  16 | byte offset on the disk, 0 but for references |
//!     +-----------------------------------------------+
//!
//!     kind 1 raw         count pages follow in page_data
//!          2 zero        ordinary pages of zeros
//!          3 no data     entries of a type without data
//!          4 reference   ordinary pages; page i lies at offset + i × 4096 of the disk that the
//!                        hello named in this place, and its hash is the next one in hash[]
//! ```
//!
//! A sync record has the same magic, kind 2 and version, and a number in octets 8 to 15; the target sends the number back on
//! the side channel (SYNCED) when everything before it in the stream has been handed to libxenguest. A record of kind 3 may come after
//! VERIFY ([`late_writes`](super::late_writes)).
//!
//! The spans stand in the order of the entries of the PAGE_DATA record that this one replaces, at most 1,024 entries in all.
//! References are numbered from 0 without a gap, through all records. N is the sum of the counts of raw spans, R that
//! of reference spans.
//!
//! A hash is the 16 octets of AEGIS-128L's MAC ([`page_hash`](super::page_hash)) under the migration's random key: who chooses page contents, but does
//! not know the key, cannot make two pages with the same hash.

use super::error::StreamProblem;
use super::late_writes;
use super::page_hash::PageHasher;
use super::xen_stream::{Entry, MAX_BATCH, MAX_PFN, NOTAB, PAGE, has_data, is_known_type, u32_at, u64_at};

/// Type of the record.
pub const RECORD_TYPE: u32 = 0x8050_736b;
/// Its first four bytes: `PsMe`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"PsMe");
/// The kind that is drawn above.
const KIND: u16 = 1;
/// Kind of a sync record.
const KIND_SYNC: u16 = 2;
/// Bytes of a sync record's body.
const SYNC: usize = 16;
/// Version of the layout.
pub const VERSION: u16 = 1;
/// Bytes before the spans.
pub const HEAD: usize = 24;
/// Bytes of a span.
pub const SPAN: usize = 24;
/// Bytes of a hash.
pub const HASH: usize = 16;
/// Longest body.
pub const MAX_BODY: usize = HEAD + MAX_BATCH * (SPAN + HASH + PAGE);

/// A page's hash.
pub type Hash = [u8; HASH];

/// Hashes a page.
pub fn hash(key: &[u8; 32], page: &[u8]) -> Hash {
    PageHasher::new(key).hash(page)
}

/// What the entries of a span are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// Pages follow.
    Raw,
    /// Pages of zeros.
    Zero,
    /// Entries of a type that has no data.
    NoData,
    /// Pages that lie on a disk.
    Reference {
        /// Index of the disk in the hello.
        disk: u8,
        /// Where the first one lies.
        offset: u64,
    },
}

/// Entries with consecutive PFNs that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// PFN of the first entry, and the type of all.
    pub first: Entry,
    /// Entries.
    pub count: u32,
    /// What they are.
    pub kind: SpanKind,
}

impl Span {
    /// Takes the entry in if it continues the span in every respect.
    pub fn try_extend(&mut self, entry: Entry, kind: SpanKind) -> bool {
        let count = u64::from(self.count);
        let kind_continues = match (self.kind, kind) {
            (
                SpanKind::Reference { disk, offset },
                SpanKind::Reference { disk: next_disk, offset: next_offset },
            ) => disk == next_disk && offset.checked_add(count * PAGE as u64) == Some(next_offset),
            (mine, next) => mine == next,
        };
        let joins =
            kind_continues && entry.page_type == self.first.page_type && self.first.pfn + count == entry.pfn;
        self.count += u32::from(joins);
        joins
    }

    /// The entries.
    pub fn entries(self) -> impl Iterator<Item = Entry> {
        (0..u64::from(self.count))
            .map(move |i| Entry { pfn: self.first.pfn + i, page_type: self.first.page_type })
    }

    fn bytes(self) -> [u8; SPAN] {
        let (kind, disk, offset) = match self.kind {
            SpanKind::Raw => (1, 0, 0),
            SpanKind::Zero => (2, 0, 0),
            SpanKind::NoData => (3, 0, 0),
            SpanKind::Reference { disk, offset } => (4, disk, offset),
        };
        let mut out = [0; SPAN];
        out[..8].copy_from_slice(&self.first.word().to_le_bytes());
        out[8..12].copy_from_slice(&self.count.to_le_bytes());
        out[12] = kind;
        out[13] = disk;
        out[16..].copy_from_slice(&offset.to_le_bytes());
        out
    }

    fn parse(bytes: &[u8], index: u32) -> Result<Self, StreamProblem> {
        let first = Entry::from_word(u64_at(bytes, 0).unwrap_or(0));
        let count = u32_at(bytes, 8).unwrap_or(0);
        let number = bytes.get(12).copied().unwrap_or(0);
        let disk = bytes.get(13).copied().unwrap_or(0);
        let offset = u64_at(bytes, 16).unwrap_or(0);
        let bad =
            StreamProblem::Span { index, kind: number, page_type: first.page_type, count, pfn: first.pfn };
        let (kind, type_fits) = match number {
            1 => (SpanKind::Raw, has_data(first.page_type)),
            2 => (SpanKind::Zero, first.page_type == NOTAB),
            3 => (SpanKind::NoData, is_known_type(first.page_type) && !has_data(first.page_type)),
            4 => (SpanKind::Reference { disk, offset }, first.page_type == NOTAB),
            _ => return Err(bad),
        };
        let ends = first.pfn.checked_add(u64::from(count)).is_some_and(|end| end <= MAX_PFN + 1)
            && offset.checked_add(u64::from(count) * PAGE as u64).is_some();
        if !type_fits || !ends || count == 0 || count as usize > MAX_BATCH {
            return Err(bad);
        }
        Ok(Self { first, count, kind })
    }
}

/// Collects spans and hashes of one record; reused from record to record.
#[derive(Debug, Default)]
pub struct Builder {
    /// The spans so far.
    pub spans: Vec<Span>,
    /// The hashes so far.
    pub hashes: Vec<Hash>,
}

impl Builder {
    /// Forgets the last record.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.hashes.clear();
    }

    /// Adds an entry.
    pub fn push(&mut self, entry: Entry, kind: SpanKind) {
        if !self.spans.last_mut().is_some_and(|last| last.try_extend(entry, kind)) {
            self.spans.push(Span { first: entry, count: 1, kind });
        }
    }

    /// Bytes of head, spans and hashes.
    pub fn head_len(&self) -> usize {
        HEAD + SPAN * self.spans.len() + HASH * self.hashes.len()
    }

    /// Writes head, spans and hashes at the end of `out`; the raw pages are to follow.
    pub fn write_head(&self, first_reference: u64, out: &mut Vec<u8>) {
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&KIND.to_le_bytes());
        out.extend_from_slice(&VERSION.to_le_bytes());
        // At most MAX_BATCH each.
        out.extend_from_slice(&(self.spans.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.hashes.len() as u32).to_le_bytes());
        out.extend_from_slice(&first_reference.to_le_bytes());
        for span in &self.spans {
            out.extend_from_slice(&span.bytes());
        }
        for hash in &self.hashes {
            out.extend_from_slice(hash);
        }
    }
}

/// A private record's body, checked.
#[derive(Clone, Copy, Debug)]
pub enum PrivateRecord<'a> {
    /// Memory.
    Memory(MemoryRecord<'a>),
    /// A question with its number.
    Sync(u64),
    /// Pages written after the suspension: a body for [`LateWrites::add`](super::late_writes::LateWrites::add).
    LateWrites(&'a [u8]),
}

impl<'a> PrivateRecord<'a> {
    /// Parses a body of any kind.
    pub fn parse(body: &'a [u8]) -> Result<Self, StreamProblem> {
        let is = |kind: u16| {
            u32_at(body, 0) == Some(MAGIC)
                && u32_at(body, 4) == Some(u32::from(VERSION) << 16 | u32::from(kind))
        };
        if is(late_writes::KIND) {
            return Ok(Self::LateWrites(body));
        }
        if !is(KIND_SYNC) {
            return MemoryRecord::parse(body).map(Self::Memory);
        }
        match u64_at(body, 8) {
            Some(number) if body.len() == SYNC => Ok(Self::Sync(number)),
            _ => Err(StreamProblem::Length { length: body.len() as u64, expected: SYNC as u64 }),
        }
    }
}

/// A sync record's body.
pub fn sync_body(number: u64) -> [u8; SYNC] {
    let mut out = [0; SYNC];
    out[..4].copy_from_slice(&MAGIC.to_le_bytes());
    out[4..6].copy_from_slice(&KIND_SYNC.to_le_bytes());
    out[6..8].copy_from_slice(&VERSION.to_le_bytes());
    out[8..].copy_from_slice(&number.to_le_bytes());
    out
}

/// A body, checked: all spans can be, and there are as many hashes and pages as they ask for.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRecord<'a> {
    spans: &'a [u8],
    hashes: &'a [u8],
    /// The raw pages, in the order of the raw spans.
    pub data: &'a [u8],
    /// Number of its first reference.
    pub first_reference: u64,
}

impl<'a> MemoryRecord<'a> {
    /// Parses a body.
    pub fn parse(body: &'a [u8]) -> Result<Self, StreamProblem> {
        let length = body.len() as u64;
        let wrong = |expected: usize| StreamProblem::Length { length, expected: expected as u64 };
        if body.len() < HEAD {
            return Err(wrong(HEAD));
        }
        let magic = u32_at(body, 0).unwrap_or(0);
        let kind_version = u32_at(body, 4).unwrap_or(0);
        let (kind, version) = ((kind_version & 0xffff) as u16, (kind_version >> 16) as u16);
        if (magic, kind, version) != (MAGIC, KIND, VERSION) {
            return Err(StreamProblem::Private { magic, kind, version });
        }
        let spans = u32_at(body, 8).unwrap_or(0);
        let references = u32_at(body, 12).unwrap_or(0);
        for count in [spans, references] {
            if count as usize > MAX_BATCH {
                return Err(StreamProblem::Count(count));
            }
        }
        let spans_end = HEAD + spans as usize * SPAN;
        let hashes_end = spans_end + references as usize * HASH;
        let this = Self {
            spans: body.get(HEAD..spans_end).ok_or(wrong(spans_end))?,
            hashes: body.get(spans_end..hashes_end).ok_or(wrong(hashes_end))?,
            data: body.get(hashes_end..).ok_or(wrong(hashes_end))?,
            first_reference: u64_at(body, 16).unwrap_or(0),
        };
        let (mut entries, mut hashes, mut pages) = (0_u32, 0_u32, 0_usize);
        for (index, bytes) in this.spans.chunks_exact(SPAN).enumerate() {
            let span = Span::parse(bytes, index as u32)?;
            entries += span.count;
            match span.kind {
                SpanKind::Raw => pages += span.count as usize,
                SpanKind::Reference { .. } => hashes += span.count,
                SpanKind::Zero | SpanKind::NoData => {}
            }
        }
        if entries == 0 || entries as usize > MAX_BATCH {
            return Err(StreamProblem::Count(entries));
        }
        if hashes != references || this.data.len() != pages * PAGE {
            return Err(wrong(spans_end + hashes as usize * HASH + pages * PAGE));
        }
        if this.first_reference.checked_add(u64::from(references)).is_none() {
            return Err(StreamProblem::Sequence { found: this.first_reference, expected: 0 });
        }
        Ok(this)
    }

    /// The spans, in order.
    pub fn spans(&self) -> impl Iterator<Item = Span> + 'a {
        // `parse` has checked every one.
        self.spans.chunks_exact(SPAN).filter_map(|bytes| Span::parse(bytes, 0).ok())
    }

    /// The hashes, in the order of the references.
    pub fn hashes(&self) -> impl Iterator<Item = Hash> + 'a {
        self.hashes.chunks_exact(HASH).map(|bytes| {
            let mut hash = [0; HASH];
            hash.copy_from_slice(bytes);
            hash
        })
    }

    /// References in it.
    pub fn references(&self) -> usize {
        self.hashes.len() / HASH
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_built_parses_to_the_same() {
        let mut builder = Builder::default();
        let entry = |pfn, page_type| Entry { pfn, page_type };
        for i in 0..3 {
            builder.push(entry(10 + i, NOTAB), SpanKind::Reference { disk: 2, offset: 512 + i * 4096 });
            builder.hashes.push([i as u8; HASH]);
        }
        builder.push(entry(13, NOTAB), SpanKind::Raw);
        builder.push(entry(14, NOTAB), SpanKind::Zero);
        builder.push(entry(15, 15), SpanKind::NoData);
        builder.push(entry(16, 13), SpanKind::NoData);
        assert_eq!(builder.spans.len(), 5);
        let mut body = Vec::new();
        builder.write_head(77, &mut body);
        assert_eq!(body.len(), builder.head_len());
        body.extend([9; PAGE]);
        let record = MemoryRecord::parse(&body).unwrap();
        assert_eq!(record.spans().collect::<Vec<_>>(), builder.spans);
        assert_eq!(record.hashes().collect::<Vec<_>>(), builder.hashes);
        assert_eq!((record.first_reference, record.references(), record.data.len()), (77, 3, PAGE));
    }

    #[test]
    fn a_page_table_is_never_a_reference() {
        let mut builder = Builder::default();
        builder.push(Entry { pfn: 1, page_type: 1 }, SpanKind::Reference { disk: 0, offset: 0 });
        builder.hashes.push([0; HASH]);
        let mut body = Vec::new();
        builder.write_head(0, &mut body);
        assert!(matches!(MemoryRecord::parse(&body), Err(StreamProblem::Span { page_type: 1, .. })));
    }

    #[test]
    fn a_sync_record_is_a_number() {
        let body = sync_body(0x0102_0304_0506_0708);
        assert!(matches!(PrivateRecord::parse(&body), Ok(PrivateRecord::Sync(0x0102_0304_0506_0708))));
        assert!(matches!(PrivateRecord::parse(&body[..12]), Err(StreamProblem::Length { .. })));
    }

    #[test]
    fn a_record_of_another_version_is_refused() {
        let (mut builder, mut memory) = (Builder::default(), Vec::new());
        builder.push(Entry { pfn: 1, page_type: NOTAB }, SpanKind::Zero);
        builder.write_head(0, &mut memory);
        let late_writes = late_writes::LateWrites::new(vec![1]).bodies().next().unwrap();
        for mut body in [memory, sync_body(1).to_vec(), late_writes] {
            assert!(PrivateRecord::parse(&body).is_ok());
            for other in [0, VERSION + 1, u16::MAX] {
                body[6..8].copy_from_slice(&other.to_le_bytes());
                let parsed = PrivateRecord::parse(&body);
                // What is shorter than a memory record is named by its length.
                assert!(
                    match parsed {
                        Err(StreamProblem::Private { version, .. }) => version == other,
                        Err(StreamProblem::Length { .. }) => body.len() < HEAD,
                        _ => false,
                    },
                    "{parsed:?}"
                );
            }
        }
    }

    #[test]
    fn the_key_changes_the_hash() {
        assert_ne!(hash(&[1; 32], &[0; PAGE]), hash(&[2; 32], &[0; PAGE]));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut body in proptest::collection::vec(any::<u8>(), 0..200), honest in any::<bool>()) {
            if honest && body.len() >= 16 {
                body[..4].copy_from_slice(b"PsMe");
                body[4..8].copy_from_slice(&[1, 0, 1, 0]);
                for at in [9, 10, 11, 13, 14, 15] {
                    body[at] = 0;
                }
            }
            if let Ok(PrivateRecord::Memory(record)) = PrivateRecord::parse(&body) {
                prop_assert!(record.spans().map(|s| s.count).sum::<u32>() <= 1024);
            }
        }
    }
}
