//! Streams as libxenguest writes them for a PV guest, and a model of what it does with them.

use std::collections::BTreeMap;

use crate::engine::xen_stream::{
    Entry, NOTAB, PAGE, PAGE_DATA_HEAD, PageData, RECORD_HEADER, RecordHeader, has_data, record,
};

/// A page of the made-up disk: no two alike, none of zeros.
pub fn disk_page(index: u64) -> Vec<u8> {
    let mut page = vec![0xd1; PAGE];
    page[..8].copy_from_slice(&index.to_le_bytes());
    page[4088..].copy_from_slice(&(!index).to_le_bytes());
    page
}

/// A page that is nowhere on the disk.
pub fn other_page(seed: u64) -> Vec<u8> {
    let mut page = vec![0x07; PAGE];
    page[..8].copy_from_slice(&seed.to_le_bytes());
    page
}

/// What a save writes for one PFN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    pub entry: Entry,
    pub page: Option<Vec<u8>>,
}

impl Sent {
    pub fn page(pfn: u64, page: Vec<u8>) -> Self {
        Self { entry: Entry { pfn, page_type: NOTAB }, page: Some(page) }
    }
    pub fn typed(pfn: u64, page_type: u8, page: Vec<u8>) -> Self {
        Self { entry: Entry { pfn, page_type }, page: has_data(page_type).then_some(page) }
    }
}

/// A record's bytes.
pub fn record(kind: u32, body: &[u8]) -> Vec<u8> {
    let mut out = RecordHeader::bytes(kind, body.len()).to_vec();
    out.extend_from_slice(body);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

/// A PAGE_DATA record.
pub fn page_data(batch: &[Sent]) -> Vec<u8> {
    let mut body = (batch.len() as u64).to_le_bytes().to_vec();
    for sent in batch {
        body.extend(sent.entry.word().to_le_bytes());
    }
    for page in batch.iter().filter_map(|sent| sent.page.as_ref()) {
        body.extend(page);
    }
    record(record::PAGE_DATA, &body)
}

/// What precedes memory: headers, X86_PV_INFO, CPUID, MSR, STATIC_DATA_END, P2M_FRAMES.
pub fn beginning() -> Vec<u8> {
    let mut out = vec![0xff; 8];
    out.extend(0x5845_4e46_u32.to_be_bytes());
    out.extend(3_u32.to_be_bytes());
    out.extend([0; 8]);
    out.extend(1_u32.to_le_bytes());
    out.extend(12_u16.to_le_bytes());
    out.extend([0; 2]);
    out.extend(4_u32.to_le_bytes());
    out.extend(17_u32.to_le_bytes());
    for (kind, length) in [(2, 8), (0x11, 24 * 30), (0x12, 33), (0x10, 0), (3, 8 + 8 * 5)] {
        out.extend(record(kind, &vec![kind as u8; length]));
    }
    out
}

/// The same for a PVH guest: no X86_PV_INFO, no P2M_FRAMES.
pub fn beginning_pvh() -> Vec<u8> {
    let mut out = beginning();
    out.truncate(40);
    out[24] = 2;
    for (kind, length) in [(0x11, 24 * 30), (0x12, 33), (0x10, 0)] {
        out.extend(record(kind, &vec![kind as u8; length]));
    }
    out
}

/// What follows memory: TSC_INFO, SHARED_INFO, the VCPU's records, END.
pub fn ending() -> Vec<u8> {
    [(8, 24), (7, 4096), (4, 5168), (5, 128), (6, 841), (record::END, 0)]
        .into_iter()
        .flat_map(|(kind, length): (u32, usize)| record(kind, &vec![kind as u8; length]))
        .collect()
}

/// What libxenguest has at the end of a stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Last type, and last contents if that type has any, of every PFN.
    pub memory: BTreeMap<u64, (u8, Option<Vec<u8>>)>,
    /// Everything that is not memory, in order; memory between two of them is one empty element.
    pub others: Vec<Vec<u8>>,
    /// PFNs that differed after VERIFY.
    pub verify_mismatches: Vec<u64>,
    /// Pages seen after VERIFY.
    pub verified: u64,
}

/// Reads a stream up to its END, as libxenguest would. Panics on anything that it would refuse.
pub fn restore(stream: &[u8]) -> Restored {
    let mut restored = Restored::default();
    restored.others.push(stream[..40].to_vec());
    let (mut at, mut verify) = (40, false);
    loop {
        let header = RecordHeader::parse(stream[at..at + RECORD_HEADER].try_into().unwrap(), at as u64);
        let body = &stream[at + RECORD_HEADER..at + RECORD_HEADER + header.length as usize];
        at += RECORD_HEADER + header.padded() as usize;
        if header.kind != record::PAGE_DATA {
            assert!(header.kind <= record::LAST_KNOWN, "record {:#x} reaches libxenguest", header.kind);
            restored.others.push(stream[header.offset as usize..at].to_vec());
            verify |= header.kind == record::VERIFY;
            if header.kind == record::END {
                assert_eq!(at, stream.len(), "bytes after END");
                return restored;
            }
            continue;
        }
        if restored.others.last().is_none_or(|last| !last.is_empty()) {
            restored.others.push(Vec::new());
        }
        assert!(header.length as usize >= PAGE_DATA_HEAD);
        for (entry, page) in PageData::parse(body).unwrap().pages_by_entry() {
            let now = (entry.page_type, page.map(<[u8]>::to_vec));
            if !verify {
                restored.memory.insert(entry.pfn, now);
                continue;
            }
            restored.verified += u64::from(page.is_some());
            if page.is_some() && restored.memory.get(&entry.pfn) != Some(&now) {
                restored.verify_mismatches.push(entry.pfn);
            }
        }
    }
}
