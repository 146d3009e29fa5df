//! The stream and what goes beside it, as the filters take them.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use arbitrary::{Arbitrary, Result, Unstructured};
use enlightenment::Vdev;

use crate::engine::late_writes::LateWrites;
use crate::engine::memory_record::{self, Builder, MemoryRecord, PrivateRecord, SpanKind};
use crate::engine::side_message::{Answer, Hello, Refusal, Verdicts};
use crate::engine::xen_stream::{
    DOMAIN_HEADER, Entry, IMAGE_HEADER, MAX_BATCH, MAX_PFN, NOTAB, PAGE, PageData, RECORD_HEADER,
    RecordHeader, check_headers, has_data, is_known_type, record,
};
use crate::engine::{Config, DiskName, SourceFilter, SourceParts, TargetFilter, TargetParts};
use crate::fake_guest::guest_stream::{
    Sent, beginning, beginning_pvh, disk_page, ending, page_data as page_data_of, record as record_of,
};
use crate::fake_guest::{XVDA, disk_of_64_pages, map};

/// What [`PageData`] lets through is what libxc would write.
pub fn page_data(data: &[u8]) {
    if let Some(headers) = data.first_chunk::<{ IMAGE_HEADER + DOMAIN_HEADER }>() {
        let _ = check_headers(headers);
    }
    if let Some(header) = data.first_chunk::<RECORD_HEADER>() {
        let header = RecordHeader::parse(header, 0);
        assert!(header.padded().is_multiple_of(8) && header.padded() - u64::from(header.length) < 8);
    }
    let Ok(pages) = PageData::parse(data) else { return };
    assert!((1..=MAX_BATCH).contains(&pages.count()));
    let mut body = (pages.count() as u64).to_le_bytes().to_vec();
    let mut bytes = 0;
    for (entry, page) in pages.pages_by_entry() {
        assert!(is_known_type(entry.page_type) && entry.pfn <= MAX_PFN);
        assert_eq!(page.map(<[u8]>::len), has_data(entry.page_type).then_some(PAGE));
        bytes += page.map_or(0, <[u8]>::len);
        body.extend(entry.word().to_le_bytes());
    }
    assert_eq!(bytes, pages.data.len());
    body.extend(pages.data);
    assert_eq!(body.len(), data.len());
    assert!(PageData::parse(&body).is_ok());
}

/// Looks at everything in a record.
fn check(record: &MemoryRecord<'_>) -> usize {
    let (mut entries, mut raw, mut references) = (0, 0, 0);
    for span in record.spans() {
        let disk_end = match span.kind {
            SpanKind::Reference { offset, .. } => offset.checked_add(u64::from(span.count) * PAGE as u64),
            _ => Some(0),
        };
        assert!(disk_end.is_some());
        for entry in span.entries() {
            entries += 1;
            assert!(entry.pfn <= MAX_PFN);
            match span.kind {
                SpanKind::Raw => raw += 1,
                SpanKind::Reference { .. } => references += 1,
                SpanKind::Zero | SpanKind::NoData => {}
            }
        }
    }
    assert!((1..=MAX_BATCH).contains(&entries));
    assert_eq!(record.data.len(), raw * PAGE);
    assert_eq!((record.references(), record.hashes().count()), (references, references));
    assert!(record.first_reference.checked_add(references as u64).is_some());
    entries
}

/// Our own records from bytes as they are.
pub fn private_record(data: &[u8]) {
    match PrivateRecord::parse(data) {
        Ok(PrivateRecord::Memory(record)) => {
            check(&record);
        }
        Ok(PrivateRecord::Sync(number)) => assert_eq!(memory_record::sync_body(number), data),
        Ok(PrivateRecord::LateWrites(body)) => late_writes(body),
        Err(_) => {}
    }
    let mut body = b"PsMe\x03\0\x01\0".to_vec();
    body.extend(data);
    late_writes(&body);
}

fn late_writes(body: &[u8]) {
    let mut late = LateWrites::default();
    if late.add(body).is_ok() {
        let mut again = LateWrites::default();
        for body in late.bodies() {
            assert!(again.add(&body).is_ok());
        }
        assert_eq!(again.len(), late.len());
        assert_eq!(again.is_empty(), late.is_empty());
    }
}

/// A span as choices have it: mostly right.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Piece {
    gap: u8,
    count: u8,
    kind: u8,
    page_type: u8,
    disk: u8,
    offset: u32,
}

impl Piece {
    fn push(self, pfn: &mut u64, builder: &mut Builder, pages: &mut usize) {
        *pfn += u64::from(self.gap);
        let types: &[u8] = if self.kind % 4 == 2 { &[13, 14, 15] } else { &[0, 1, 2, 3, 4, 9, 10, 11, 12] };
        let page_type = types[usize::from(self.page_type) % types.len()];
        for i in 0..u64::from(self.count % 32) {
            let entry = |page_type| Entry { pfn: *pfn, page_type };
            match self.kind % 4 {
                0 => {
                    builder.push(entry(page_type), SpanKind::Raw);
                    *pages += 1;
                }
                1 => builder.push(entry(NOTAB), SpanKind::Zero),
                2 => builder.push(entry(page_type), SpanKind::NoData),
                _ => {
                    let offset = u64::from(self.offset) * 512 + i * PAGE as u64;
                    builder.push(entry(NOTAB), SpanKind::Reference { disk: self.disk, offset });
                    builder.hashes.push([self.disk; 16]);
                }
            }
            *pfn += 1;
        }
    }
}

/// A body of the pieces, and how many entries it has.
fn body(pieces: &[Piece], first_reference: u64) -> (Vec<u8>, usize) {
    let (mut builder, mut pages, mut pfn) = (Builder::default(), 0, 0);
    for piece in pieces {
        piece.push(&mut pfn, &mut builder, &mut pages);
    }
    let mut body = Vec::new();
    builder.write_head(first_reference, &mut body);
    assert_eq!(body.len(), builder.head_len());
    body.resize(body.len() + pages * PAGE, 7);
    (body, pieces.iter().map(|piece| usize::from(piece.count % 32)).sum())
}

/// What the builder makes is what the parser reads; with a few words changed it is read or refused.
pub fn built_record(data: &[u8]) {
    let mut choices = Unstructured::new(data);
    let Ok(pieces) = choices.arbitrary_iter::<Piece>().map(|it| it.take(30).collect::<Result<Vec<_>>>())
    else {
        return;
    };
    let Ok(pieces) = pieces else { return };
    let (mut body, entries) = body(&pieces, 9);
    match MemoryRecord::parse(&body) {
        Ok(record) => assert_eq!(check(&record), entries),
        Err(problem) => assert!(entries == 0 || entries > MAX_BATCH, "{problem}"),
    }
    for byte in data.chunks_exact(3).take(8) {
        let at = usize::from(u16::from_le_bytes([byte[0], byte[1]])) % body.len();
        body[at] = byte[2];
    }
    private_record(&body);
}

/// Settings of a filter that is not to be waited for.
fn impatient() -> Config {
    Config {
        window_bytes: 64 << 10,
        drain_timeout: Duration::from_millis(5),
        // The peer speaks or goes; the machine may be asleep meanwhile.
        hello_timeout: Duration::from_secs(24 * 3600),
        hashers: 1,
        io_uring: false,
        readers: 1,
        in_flight_bytes: 256 << 10,
        max_outstanding: 64,
        ..Config::default()
    }
}

/// A hostile source: a hello, records in any order and of any making. The target's filter ends, and libxenguest is handed nothing but records
/// that it knows, each of them whole.
pub fn wire(data: &[u8]) {
    let _ = try_wire(&mut Unstructured::new(data));
}

fn try_wire(choices: &mut Unstructured<'_>) -> Result<()> {
    let disk = disk_of_64_pages();
    let [wire, restore, side] =
        [UnixStream::pair(), UnixStream::pair(), UnixStream::pair()].map(std::result::Result::unwrap);
    let filter = TargetFilter::start(TargetParts {
        from_wire: OwnedFd::from(wire.1),
        to_restore: OwnedFd::from(restore.0),
        side: Some(OwnedFd::from(side.1)),
        config: Config {
            own_disks: Some(vec![DiskName { vdev: Vdev(XVDA), path: disk.to_owned() }]),
            ..impatient()
        },
    })
    .unwrap();
    let mut side = side.0;
    let (stream, says_hello) = hostile_stream(choices)?;
    if says_hello {
        let hello = Hello {
            key: [7; 32],
            window_pages: u32::from(choices.arbitrary::<u8>()?),
            disks: vec![DiskName { vdev: Vdev(XVDA), path: "/somewhere".into() }],
        };
        hello.write(&mut side).unwrap();
        Answer::read(&mut side).unwrap();
    } else {
        // Whatever comes in place of a hello.
        let _ = side.write_all(choices.peek_bytes(choices.len().min(64)).unwrap_or_default());
        let _ = side.shutdown(Shutdown::Both);
    }
    let verdicts = std::thread::spawn(move || std::io::copy(&mut side, &mut std::io::sink()));
    let mut end = wire.0;
    let writer = std::thread::spawn(move || {
        // A filter that refuses closes its end.
        let _ = end.write_all(&stream);
    });
    let mut restored = Vec::new();
    let _ = { restore.1 }.read_to_end(&mut restored);
    let result = filter.finish();
    writer.join().unwrap();
    let _ = verdicts.join().unwrap();
    check_restored(&restored, result.is_ok());
    Ok(())
}

/// What libxenguest was handed: whole records that it knows, but for the last.
fn check_restored(stream: &[u8], complete: bool) {
    let mut at = IMAGE_HEADER + DOMAIN_HEADER;
    let mut last = None;
    while let Some(header) = stream.get(at..at + RECORD_HEADER) {
        let header = RecordHeader::parse(header.try_into().unwrap(), at as u64);
        let body = stream.get(at + RECORD_HEADER..at + RECORD_HEADER + header.length as usize);
        let known = header.kind <= record::LAST_KNOWN || header.kind & record::OPTIONAL != 0;
        assert!(
            known && header.kind != memory_record::RECORD_TYPE,
            "record {:#x} reaches libxenguest",
            header.kind
        );
        if let (record::PAGE_DATA, Some(body)) = (header.kind, body) {
            assert!(PageData::parse(body).is_ok());
        }
        at += RECORD_HEADER + header.padded() as usize;
        last = Some(header.kind);
    }
    assert!(
        !complete || (at == stream.len() && last == Some(record::END)),
        "a stream that ended well is not whole"
    );
}

fn hostile_stream(choices: &mut Unstructured<'_>) -> Result<(Vec<u8>, bool)> {
    let mut stream = if choices.arbitrary()? { beginning_pvh() } else { beginning() };
    let says_hello = choices.ratio(7, 8)?;
    let mut references = 0;
    for _ in 0..choices.int_in_range(0..=24)? {
        match choices.int_in_range(0..=9)? {
            0..=2 => {
                let pieces = choices.arbitrary::<[Piece; 3]>()?;
                let wrong = u64::from(choices.ratio(1, 32)?);
                let (body, _) = body(&pieces, references + wrong);
                references += MemoryRecord::parse(&body).map_or(0, |record| record.references() as u64);
                stream.extend(record_of(memory_record::RECORD_TYPE, &body));
            }
            3 | 4 => {
                let pfn = u64::from(choices.arbitrary::<u8>()?);
                let batch: Vec<Sent> = (pfn..pfn + choices.int_in_range(1..=4)?)
                    .map(|pfn| Sent::typed(pfn, [NOTAB, 1, 13, 15][pfn as usize % 4], disk_page(pfn)))
                    .collect();
                stream.extend(page_data_of(&batch));
            }
            5 => stream.extend(record_of(
                memory_record::RECORD_TYPE,
                &memory_record::sync_body(choices.arbitrary()?),
            )),
            6 => {
                let kind = choices.arbitrary::<u8>()?;
                let optional = if choices.arbitrary()? { record::OPTIONAL } else { 0 };
                stream.extend(record_of(u32::from(kind) | optional, &[1; 24][..usize::from(kind % 24)]));
            }
            7 => stream.extend(record_of(record::VERIFY, &[])),
            8 => {
                let late = LateWrites::new(vec![u64::from(choices.arbitrary::<u8>()?)]);
                let bodies = late.bodies().collect::<Vec<_>>();
                bodies.iter().for_each(|body| stream.extend(record_of(memory_record::RECORD_TYPE, body)));
            }
            _ => {
                let length = choices.int_in_range(0..=40)?.min(choices.len());
                stream.extend(choices.bytes(length)?);
            }
        }
    }
    if choices.ratio(3, 4)? {
        stream.extend(ending());
    }
    for _ in 0..choices.int_in_range(0..=2)? {
        let at = choices.choose_index(stream.len())?;
        stream[at] = choices.arbitrary()?;
    }
    Ok((stream, says_hello))
}

/// A hostile target: any answer to the hello, any verdicts. The source's filter ends, and its stream has every page that was not accepted.
pub fn verdicts(data: &[u8]) {
    let _ = try_verdicts(&mut Unstructured::new(data));
}

fn try_verdicts(choices: &mut Unstructured<'_>) -> Result<()> {
    let [save, wire, side] =
        [UnixStream::pair(), UnixStream::pair(), UnixStream::pair()].map(std::result::Result::unwrap);
    let answers_well = choices.ratio(7, 8)?;
    let said = hostile_verdicts(choices)?;
    let pages = u64::from(choices.arbitrary::<u8>()?);
    let raw = choices.bytes(choices.len().min(64))?.to_vec();
    let mut peer = side.1;
    let target = std::thread::spawn(move || {
        let Ok(hello) = Hello::read(&mut peer) else { return };
        if answers_well {
            let size_bytes = 1 << 30;
            let summary =
                |disk: &DiskName| crate::engine::DiskSummary { vdev: disk.vdev.0, size_bytes, problem: None };
            let disks = hello.disks.iter().map(summary).collect();
            let _ = Answer { max_outstanding: 64, disks }.write(&mut peer);
        }
        let _ = peer.write_all(&said);
        let _ = peer.write_all(&raw);
    });
    let wire_end = wire.1;
    let reader = std::thread::spawn(move || {
        let mut stream = Vec::new();
        let _ = { wire_end }.read_to_end(&mut stream);
        stream
    });
    let filter = SourceFilter::start(SourceParts {
        from_save: OwnedFd::from(save.1),
        to_wire: OwnedFd::from(wire.0),
        side: Some(OwnedFd::from(side.0)),
        map: map((0..pages).map(|pfn| (pfn, pfn))),
        disks: vec![DiskName { vdev: Vdev(XVDA), path: "/disk".into() }],
        config: impatient(),
    })
    .unwrap();
    let mut save = save.0;
    let first: Vec<Sent> = (0..96).map(|pfn| Sent::page(pfn, disk_page(pfn))).collect();
    save.write_all(&beginning()).unwrap();
    save.write_all(&page_data_of(&first[..48])).unwrap();
    save.write_all(&page_data_of(&first[48..])).unwrap();
    let report = filter.drain();
    save.write_all(&ending()).unwrap();
    drop(save);
    let summary = filter.finish().unwrap();
    target.join().unwrap();
    let stream = reader.join().unwrap();
    assert!(report.is_ok() && summary.stats.references_outstanding == 0);
    let stats = &summary.stats;
    let settled = stats.references_accepted
        + stats.references_refused
        + stats.references_superseded
        + stats.references_replaced;
    assert_eq!(stats.pages_referenced, settled);
    let sent = pages_on_wire(&stream);
    // Of what was referenced, only what the target claims to have may be missing.
    assert!(
        sent + stats.references_accepted >= 96,
        "{sent} pages travelled, {} were accepted",
        stats.references_accepted
    );
    Ok(())
}

/// Pages that travelled, by PFN.
fn pages_on_wire(stream: &[u8]) -> u64 {
    let mut pfns = std::collections::BTreeSet::new();
    let mut at = IMAGE_HEADER + DOMAIN_HEADER;
    while at < stream.len() {
        let header = RecordHeader::parse(stream[at..at + RECORD_HEADER].try_into().unwrap(), 0);
        let body = &stream[at + RECORD_HEADER..][..header.length as usize];
        at += RECORD_HEADER + header.padded() as usize;
        if header.kind == record::PAGE_DATA {
            pfns.extend(PageData::parse(body).unwrap().entries().map(|entry| entry.pfn));
        } else if let (memory_record::RECORD_TYPE, Ok(PrivateRecord::Memory(record))) =
            (header.kind, PrivateRecord::parse(body))
        {
            let raw = record.spans().filter(|span| span.kind == SpanKind::Raw);
            pfns.extend(raw.flat_map(|span| span.entries().map(|entry| entry.pfn)));
        }
    }
    pfns.len() as u64
}

fn hostile_verdicts(choices: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut said = Vec::new();
    for _ in 0..choices.int_in_range(0..=6)? {
        let mut verdicts = Verdicts::default();
        for _ in 0..choices.int_in_range(0..=6)? {
            let number = u64::from(choices.arbitrary::<u8>()?);
            if choices.arbitrary()? {
                verdicts.accepted.push((number, u32::from(choices.arbitrary::<u8>()? % 40)));
            } else {
                verdicts.refused.push((number, Refusal::Hash));
            }
        }
        verdicts.write(&mut said).unwrap();
        if choices.ratio(1, 4)? {
            let number = choices.int_in_range(0..=3)?;
            crate::engine::side_message::Report::Synced(number).write(&mut said).unwrap();
        }
    }
    Ok(said)
}
