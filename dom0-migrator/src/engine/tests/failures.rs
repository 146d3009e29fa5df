//! What goes wrong, and what then must hold.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use enlightenment::Vdev;
use proptest::prelude::*;

use super::guest_stream::{Sent, beginning, disk_page, ending, other_page, page_data, record, restore};
use super::pair::{Pair, XVDA, collect, config, disk, map, only, plain_source, plain_target};
use crate::engine::fault::{self, Point, Strike};
use crate::engine::memory_record::{self, Builder, SpanKind};
use crate::engine::page_hash::PageHasher;
use crate::engine::side_message::{Answer, Hello, Refusal, Report, Verdicts};
use crate::engine::summary::DiskSummary;
use crate::engine::xen_stream::{Entry, NOTAB, PAGE, record as kinds};
use crate::engine::{
    Config, DiskName, EngineError, SourceFilter, SourceParts, StreamProblem, TargetFilter, TargetParts,
    TargetSummary,
};

/// 32 pages, all of them on the disk.
fn clean_pages() -> Vec<Sent> {
    (0..32).map(|pfn| Sent::page(pfn, disk_page(pfn))).collect()
}

/// A source filter whose target is the test itself.
pub struct LoneSource {
    pub save: UnixStream,
    pub source: SourceFilter,
    pub wire: UnixStream,
    pub side: UnixStream,
}

impl LoneSource {
    fn start(config: Config) -> Self {
        Self::with_pages(32, config)
    }

    /// One in whose map so many pages are.
    pub fn with_pages(pages: u64, config: Config) -> Self {
        let [save, wire, side] = std::array::from_fn(|_| UnixStream::pair().unwrap());
        let mut target_side = side.1;
        let answering = std::thread::spawn(move || {
            let hello = Hello::read(&mut target_side).unwrap();
            let disks = hello
                .disks
                .iter()
                .map(|disk| DiskSummary { vdev: disk.vdev.0, size_bytes: 1 << 30, problem: None })
                .collect();
            Answer { max_outstanding: hello.window_pages, disks }.write(&mut target_side).unwrap();
            target_side
        });
        let source = SourceFilter::start(SourceParts {
            from_save: OwnedFd::from(save.1),
            to_wire: OwnedFd::from(wire.0),
            side: Some(OwnedFd::from(side.0)),
            map: map((0..pages).map(|pfn| (pfn, pfn))),
            disks: vec![DiskName { vdev: Vdev(XVDA), path: "/disk".into() }],
            config,
        })
        .unwrap();
        Self { save: save.0, source, wire: wire.1, side: answering.join().unwrap() }
    }

    /// Has the filter send all clean pages by reference.
    fn refer_to_clean_pages(&mut self) {
        self.save.write_all(&beginning()).unwrap();
        self.save.write_all(&page_data(&clean_pages())).unwrap();
        while self.source.stats().references_outstanding < 32 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Reads the wire up to the next sync record and answers it, from a thread of its own.
    fn answer_sync(&self) -> std::thread::JoinHandle<Vec<u8>> {
        let (mut wire, mut side) = (self.wire.try_clone().unwrap(), self.side.try_clone().unwrap());
        std::thread::spawn(move || {
            let sync = record(memory_record::RECORD_TYPE, &memory_record::sync_body(1));
            let mut seen = Vec::new();
            while !seen.ends_with(&sync) {
                let mut bytes = [0; 1];
                wire.read_exact(&mut bytes).unwrap();
                seen.extend(bytes);
            }
            Report::Synced(1).write(&mut side).unwrap();
            seen
        })
    }

    /// Everything that was on the wire, with references resolved as a target would that has accepted none: only pages that
    /// travelled count.
    fn pages_on_wire(mut self, seen: Vec<u8>) -> std::collections::BTreeMap<u64, Vec<u8>> {
        drop(self.save);
        self.source.finish().unwrap();
        let mut bytes = seen;
        self.wire.read_to_end(&mut bytes).unwrap();
        let mut pages = std::collections::BTreeMap::new();
        let mut at = 40;
        while at < bytes.len() {
            let header =
                crate::engine::xen_stream::RecordHeader::parse(bytes[at..at + 8].try_into().unwrap(), 0);
            let body = &bytes[at + 8..at + 8 + header.length as usize];
            at += 8 + header.padded() as usize;
            if header.kind == kinds::PAGE_DATA {
                let data = crate::engine::xen_stream::PageData::parse(body).unwrap();
                let with_data =
                    data.pages_by_entry().filter_map(|(entry, page)| Some((entry.pfn, page?.to_vec())));
                pages.extend(with_data);
            }
        }
        pages
    }
}

/// The key of a source that is the test itself.
const KEY: [u8; 32] = [1; 32];

/// A target filter whose source is the test itself, and has said hello.
struct LoneTarget {
    target: TargetFilter,
    wire: UnixStream,
    side: UnixStream,
    restored: JoinHandle<Vec<u8>>,
}

impl LoneTarget {
    fn start(disks: Vec<DiskName>, window_pages: u32, config: Config) -> Self {
        let [wire, mut side] = std::array::from_fn(|_| UnixStream::pair().unwrap());
        let (restored, to_restore) = std::io::pipe().unwrap();
        let target = TargetFilter::start(TargetParts {
            from_wire: OwnedFd::from(wire.1),
            to_restore: to_restore.into(),
            side: Some(OwnedFd::from(side.1)),
            config,
        })
        .unwrap();
        Hello { key: KEY, window_pages, disks }.write(&mut side.0).unwrap();
        Answer::read(&mut side.0).unwrap();
        Self { target, wire: wire.0, side: side.0, restored: collect(restored) }
    }

    /// The stream ends here: what the filter says of it, and what libxenguest could read.
    fn finish(self) -> (Result<TargetSummary, EngineError>, Vec<u8>) {
        drop(self.wire);
        (self.target.finish(), self.restored.join().unwrap())
    }
}

#[test]
fn what_is_not_settled_in_time_is_sent() {
    let mut lone = LoneSource::start(Config { drain_timeout: Duration::from_millis(100), ..config() });
    lone.refer_to_clean_pages();
    // The target accepts ten, refuses one, and says nothing more.
    let verdicts = Verdicts { accepted: vec![(0, 10)], refused: vec![(10, Refusal::IoError)] };
    verdicts.write(&mut lone.side).unwrap();
    let report = lone.source.drain().unwrap();
    assert!(report.replaced == 21 && report.seconds >= 0.1, "{report:?}");
    // It says something later, which no longer matters.
    Verdicts { accepted: vec![(11, 10)], refused: vec![(21, Refusal::Hash), (0, Refusal::Hash)] }
        .write(&mut lone.side)
        .unwrap();
    lone.save.write_all(&ending()).unwrap();
    let pages = lone.pages_on_wire(Vec::new());
    assert_eq!(pages.keys().copied().collect::<Vec<_>>(), (10..32).collect::<Vec<_>>());
    assert!(pages.iter().all(|(&pfn, page)| *page == disk_page(pfn)));
}

#[test]
fn a_refusal_of_something_superseded_sends_nothing() {
    let mut lone = LoneSource::start(config());
    lone.refer_to_clean_pages();
    lone.save.write_all(&page_data(&[Sent::page(3, other_page(3)), Sent::typed(4, 15, Vec::new())])).unwrap();
    while lone.source.stats().references_superseded < 2 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let verdicts =
        Verdicts { accepted: vec![(0, 3), (5, 27)], refused: vec![(3, Refusal::Hash), (4, Refusal::Hash)] };
    verdicts.write(&mut lone.side).unwrap();
    let sync = lone.answer_sync();
    let report = lone.source.drain().unwrap();
    assert_eq!((report.refused, report.replaced, report.synced), (0, 0, true));
    assert_eq!(lone.source.stats().references_accepted, 30);
    lone.save.write_all(&ending()).unwrap();
    // PFN 4 has no data, so its record went as a marker or as PAGE_DATA; only PFN 3's page may have travelled.
    let pages = lone.pages_on_wire(sync.join().unwrap());
    assert_eq!(pages.into_iter().collect::<Vec<_>>(), [(3, other_page(3))]);
}

#[test]
fn a_verdict_on_something_never_sent_ends_the_side_channel() {
    let mut lone = LoneSource::start(config());
    lone.refer_to_clean_pages();
    Verdicts { accepted: vec![(0, 33)], refused: Vec::new() }.write(&mut lone.side).unwrap();
    let report = lone.source.drain().unwrap();
    assert_eq!(
        (report.accepted, report.replaced),
        (0, 0),
        "it was all sent before the drain looked: {report:?}"
    );
    assert_eq!(lone.source.stats().references_replaced, 32);
    lone.save.write_all(&ending()).unwrap();
    assert_eq!(lone.pages_on_wire(Vec::new()).len(), 32);
}

#[test]
fn a_target_that_says_it_over_and_over_is_given_up() {
    let mut lone = LoneSource::start(config());
    lone.refer_to_clean_pages();
    Verdicts { accepted: vec![(0, 31)], refused: Vec::new() }.write(&mut lone.side).unwrap();
    while lone.source.stats().references_accepted < 31 {
        std::thread::sleep(Duration::from_millis(5));
    }
    // All but the last again: it was heard, and so was more than was ever sent.
    Verdicts { accepted: vec![(0, 31)], refused: Vec::new() }.write(&mut lone.side).unwrap();
    let report = lone.source.drain().unwrap();
    assert!(lone.source.stats().side_channel_lost && !report.synced, "{report:?}");
    assert_eq!(lone.source.stats().references_replaced, 1);
    lone.save.write_all(&ending()).unwrap();
    assert_eq!(lone.pages_on_wire(Vec::new()).into_iter().collect::<Vec<_>>(), [(31, disk_page(31))]);
}

#[test]
fn a_lost_side_channel_costs_only_bytes() {
    let disk = disk(64);
    let mut pair = Pair::simple(map((0..64).map(|pfn| (pfn, pfn))), &disk, config());
    let mut stream = beginning();
    stream.extend(page_data(&clean_pages()));
    pair.write(&stream);
    pair.side.shutdown(Shutdown::Both).unwrap();
    pair.source.drain().unwrap();
    let more: Vec<_> = (32..64).map(|pfn| Sent::page(pfn, disk_page(pfn))).collect();
    let mut rest = page_data(&more);
    rest.extend(record(kinds::VERIFY, &[]));
    rest.extend(page_data(&more));
    rest.extend(ending());
    pair.write(&rest);
    stream.extend(rest);
    let outcome = pair.finish();
    let found = restore(&outcome.stream);
    assert_eq!(found, restore(&stream));
    assert!(found.verify_mismatches.is_empty());
    assert!(outcome.source.unwrap().stats.side_channel_lost);
}

/// It does not wait for a drain, whose time may be long: what is retained takes room in the window, and the pages are wanted.
#[test]
fn what_is_retained_is_sent_as_soon_as_the_side_channel_is_lost() {
    let mut lone = LoneSource::start(Config { drain_timeout: Duration::from_secs(24 * 3600), ..config() });
    lone.refer_to_clean_pages();
    lone.side.shutdown(Shutdown::Both).unwrap();
    let began = Instant::now();
    while lone.source.stats().references_outstanding > 0 {
        assert!(began.elapsed() < Duration::from_secs(120), "nobody sends what was retained");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(lone.source.stats().references_replaced, 32);
    lone.save.write_all(&ending()).unwrap();
    let pages = lone.pages_on_wire(Vec::new());
    assert!((0..32).all(|pfn| pages[&pfn] == disk_page(pfn)) && pages.len() == 32);
}

/// A PFN goes by reference a second time while the first read is under way, which nobody can take back: what it brings is right by its
/// own hash, and is not what the PFN has any more.
#[test]
fn what_an_older_reference_brings_is_not_handed_on_in_place_of_a_newer_one() {
    let file = disk(64);
    // One read after the other, and what they bring in that order.
    let one = Config { io_uring: false, readers: 1, hashers: 1, ..config() };
    let mut lone = LoneTarget::start(only(&file), 64, one);
    let reference = |number: u64, page: u64| {
        let mut builder = Builder::default();
        let kind = SpanKind::Reference { disk: 0, offset: page * PAGE as u64 };
        builder.push(Entry { pfn: 5, page_type: NOTAB }, kind);
        PageHasher::new(&KEY).hash_all(&[&disk_page(page)], &mut builder.hashes);
        let mut body = Vec::new();
        builder.write_head(number, &mut body);
        record(memory_record::RECORD_TYPE, &body)
    };
    fault::strike(file.path(), Point::DiskRead, Strike::Held);
    lone.wire.write_all(&beginning()).unwrap();
    lone.wire.write_all(&reference(0, 20)).unwrap();
    fault::wait_for_held(file.path(), Point::DiskRead, 1);
    lone.wire.write_all(&reference(1, 21)).unwrap();
    while lone.target.stats().references < 2 {
        std::thread::sleep(Duration::from_millis(5));
    }
    fault::lift(file.path(), Point::DiskRead);
    // The second is what the verdict is on.
    let Report::Verdicts(verdicts) = Report::read(&mut lone.side).unwrap() else { panic!("no verdict") };
    assert_eq!((verdicts.accepted, verdicts.refused), (vec![(1, 1)], vec![]));
    lone.wire.write_all(&ending()).unwrap();
    let (ended, restored) = lone.finish();
    let stats = ended.unwrap().stats;
    assert_eq!((stats.references_superseded, stats.references_accepted), (1, 1));
    let found = restore(&restored);
    assert_eq!(found.memory[&5].1, Some(disk_page(21)));
}

#[test]
fn without_an_answer_everything_goes_raw() {
    let [save, wire, side] = std::array::from_fn(|_| UnixStream::pair().unwrap());
    let source = SourceFilter::start(SourceParts {
        from_save: OwnedFd::from(save.1),
        to_wire: OwnedFd::from(wire.0),
        side: Some(OwnedFd::from(side.0)),
        map: map((0..32).map(|pfn| (pfn, pfn))),
        disks: Vec::new(),
        config: Config { hello_timeout: Duration::from_millis(50), ..config() },
    })
    .unwrap();
    let stream = [beginning(), page_data(&clean_pages()), ending()].concat();
    let (mut from, mut to) = (save.0, wire.1);
    let expected = stream.clone();
    let writer = std::thread::spawn(move || from.write_all(&stream).unwrap());
    let mut found = Vec::new();
    to.read_to_end(&mut found).unwrap();
    writer.join().unwrap();
    let summary = source.finish().unwrap();
    assert!(found == expected && summary.stats.side_channel_lost && !summary.poolskip);
}

#[test]
fn disks_that_cannot_be_opened_leave_pages_raw() {
    let disks = vec![DiskName { vdev: Vdev(XVDA), path: "/no/such/disk".into() }];
    let pair = Pair::start(map((0..32).map(|pfn| (pfn, pfn))), disks, config(), config());
    let stream = [beginning(), page_data(&clean_pages()), ending()].concat();
    let source = pair.carry(&stream).source.unwrap();
    assert_eq!((source.stats.pages_disk_missing, source.stats.pages_raw), (32, 32));
    assert!(source.disks[0].problem.as_ref().unwrap().contains("/no/such/disk"));
}

#[test]
fn a_target_that_names_its_own_disks_opens_no_other() {
    let (wrong, right) = (disk(1), disk(64));
    let named = |vdev, file: &tempfile::NamedTempFile| DiskName { vdev, path: file.path().to_owned() };
    let pair = Pair::start(
        map((0..32).map(|pfn| (pfn, pfn))),
        vec![named(Vdev(XVDA + 16), &right), named(Vdev(XVDA), &wrong)],
        config(),
        Config { own_disks: Some(only(&right)), ..config() },
    );
    let stream = [beginning(), page_data(&clean_pages()), ending()].concat();
    let source = pair.carry(&stream).source.unwrap();
    assert_eq!(source.stats.references_accepted, 32);
    assert!(source.disks[0].problem.is_some() && source.disks[1].problem.is_none());
}

#[test]
fn a_save_that_stops_early_is_an_error_on_both_sides() {
    let disk = disk(64);
    let mut pair = Pair::simple(map((0..32).map(|pfn| (pfn, pfn))), &disk, config());
    let mut stream = beginning();
    stream.extend(page_data(&clean_pages()));
    stream.truncate(stream.len() - 100);
    pair.write(&stream);
    let source = {
        drop(pair.save);
        pair.source.finish()
    };
    assert!(matches!(source, Err(EngineError::Truncated { what: "PAGE_DATA", .. })), "{source:?}");
    pair.target.abort();
    assert!(matches!(pair.target.finish(), Err(EngineError::Aborted | EngineError::Truncated { .. })));
}

#[test]
fn an_abort_ends_a_waiting_filter_and_its_drain() {
    let mut lone = LoneSource::start(config());
    lone.refer_to_clean_pages();
    let source = std::sync::Arc::new(lone.source);
    let drain = std::thread::spawn({
        let source = std::sync::Arc::clone(&source);
        move || source.drain()
    });
    // Long enough for the drain to have begun; had it not, it would find the filter gone all the same.
    std::thread::sleep(Duration::from_millis(20));
    source.abort();
    assert!(matches!(drain.join().unwrap(), Err(EngineError::Gone)));
    let source = std::sync::Arc::into_inner(source).unwrap();
    assert!(matches!(source.finish(), Err(EngineError::Aborted)));
}

/// More than a socket holds, in few enough records behind it, so that what a filter has sent off last waits when it has seen END.
fn long_stream() -> Vec<u8> {
    let mut stream = beginning();
    stream.extend(page_data(&(0..256).map(|pfn| Sent::page(pfn, other_page(pfn))).collect::<Vec<_>>()));
    stream.extend(record(kinds::END, &[]));
    stream
}

/// Waits until a filter has read so much.
fn until_read(bytes: usize, bytes_in: impl Fn() -> u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while bytes_in() < bytes as u64 {
        assert!(Instant::now() < deadline, "{} of {bytes}", bytes_in());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A filter has seen END, and whoever is behind it is gone before it has all: that is no success.
#[test]
fn what_was_sent_off_last_and_is_not_taken_is_an_error_on_either_side() {
    let stream = long_stream();
    let (mut save, source, wire) = plain_source(map([]), config());
    save.write_all(&stream).unwrap();
    until_read(stream.len(), || source.stats().bytes_in);
    drop(wire);
    let ended = source.finish();
    assert!(matches!(ended, Err(EngineError::Io { .. })), "{ended:?}");

    let mut wire = UnixStream::pair().unwrap();
    let (target, restored) = plain_target(wire.1);
    wire.0.write_all(&stream).unwrap();
    until_read(stream.len(), || target.stats().bytes_in);
    drop(restored);
    let ended = target.finish();
    assert!(matches!(ended, Err(EngineError::Io { .. })), "{ended:?}");
}

/// Feeds bytes to a target filter that has been told hello; what it says of them.
fn target_says(stream: &[u8], window_pages: u32) -> Result<TargetSummary, EngineError> {
    let file = disk(64);
    let mut lone = LoneTarget::start(only(&file), window_pages, config());
    // A filter that has refused the stream no longer reads it.
    let _ = lone.wire.write_all(stream);
    lone.finish().0
}

fn references(first: u64, pfns: std::ops::Range<u64>) -> Vec<u8> {
    let mut builder = Builder::default();
    for pfn in pfns {
        let kind = SpanKind::Reference { disk: 0, offset: pfn * PAGE as u64 };
        builder.push(Entry { pfn, page_type: NOTAB }, kind);
        builder.hashes.push([0; 16]);
    }
    let mut body = Vec::new();
    builder.write_head(first, &mut body);
    record(memory_record::RECORD_TYPE, &body)
}

fn problem(result: Result<TargetSummary, EngineError>) -> StreamProblem {
    match result {
        Err(EngineError::Stream { problem, .. }) => problem,
        other => panic!("expected a stream error, not {other:?}"),
    }
}

#[test]
fn a_hostile_source_is_told_what_is_wrong() {
    let stream = |parts: &[Vec<u8>]| [beginning(), parts.concat(), ending()].concat();
    let after_verify = stream(&[record(kinds::VERIFY, &[]), references(0, 0..1)]);
    assert!(matches!(problem(target_says(&after_verify, 8)), StreamProblem::Forbidden(_)));
    let late_writes = crate::engine::LateWrites::new(vec![1]).bodies().next().unwrap();
    let early = stream(&[record(memory_record::RECORD_TYPE, &late_writes)]);
    assert!(matches!(problem(target_says(&early, 8)), StreamProblem::Forbidden(_)));
    let gap = stream(&[references(0, 0..1), references(2, 1..2)]);
    assert_eq!(problem(target_says(&gap, 8)), StreamProblem::Sequence { found: 2, expected: 1 });
    let unsettled = stream(&[references(0, 0..3)]);
    assert_eq!(problem(target_says(&unsettled, 8)), StreamProblem::Unsettled(3));
    let too_many = stream(&[references(0, 0..9)]);
    assert_eq!(problem(target_says(&too_many, 8)), StreamProblem::Outstanding(9));
    let checkpoint = stream(&[record(kinds::CHECKPOINT, &[])]);
    assert_eq!(problem(target_says(&checkpoint, 8)), StreamProblem::Checkpoint);
    let unknown = stream(&[record(0x77, &[])]);
    assert_eq!(problem(target_says(&unknown, 8)), StreamProblem::Unknown);
    let mut long = stream(&[]);
    long.truncate(40);
    long.extend(kinds::PAGE_DATA.to_le_bytes());
    long.extend((120_u32 << 20).to_le_bytes());
    assert!(matches!(problem(target_says(&long, 8)), StreamProblem::Length { .. }));
    let end = stream(&[record(kinds::END, &[7; 8])]);
    assert_eq!(problem(target_says(&end, 8)), StreamProblem::Length { length: 8, expected: 0 });
    let mut big_endian = beginning();
    big_endian[17] = 1;
    assert!(matches!(target_says(&big_endian, 8), Err(EngineError::Header(_))));
}

/// Whoever has seen END reads on no further: with a body it would be handed on without it, and the stream would have ended well.
#[test]
fn an_end_with_a_body_is_no_end_on_either_side() {
    let [stream, longer] = [8, 40 << 20].map(|length: u32| {
        let mut stream = beginning();
        stream.extend([kinds::END.to_le_bytes(), length.to_le_bytes()].concat());
        (stream, u64::from(length))
    });
    for (stream, length) in [stream, longer] {
        let (mut save, source, wire) = plain_source(map([]), config());
        save.write_all(&stream).unwrap();
        let taken = collect(wire);
        let ended = source.finish();
        let Err(EngineError::Stream { problem: found, .. }) = ended else { panic!("{ended:?}") };
        assert_eq!(found, StreamProblem::Length { length, expected: 0 });
        assert!(beginning().starts_with(&taken.join().unwrap()), "END was handed on");

        let mut wire = UnixStream::pair().unwrap();
        let (target, restored) = plain_target(wire.1);
        wire.0.write_all(&stream).unwrap();
        let taken = collect(restored);
        assert_eq!(problem(target.finish()), StreamProblem::Length { length, expected: 0 });
        assert!(beginning().starts_with(&taken.join().unwrap()), "END was handed on");
    }
}

/// References that are refused at once, for one page again and again, whose verdicts nobody reads: the side channel is given up, and no more is
/// kept of them.
#[test]
fn a_source_that_reads_no_verdicts_is_given_up() {
    let few = Config { max_outstanding: 64, ..config() };
    let mut lone = LoneTarget::start(Vec::new(), 64, few);
    lone.wire.write_all(&beginning()).unwrap();
    let mut first = 0;
    while !lone.target.stats().side_channel_lost {
        assert!(first < 50_000_000, "verdicts are kept without end");
        lone.wire.write_all(&references(first, 0..64)).unwrap();
        first += 64;
    }
    // Its pages come all the same.
    let pages: Vec<_> = (0..64).map(|pfn| Sent::page(pfn, other_page(pfn))).collect();
    lone.wire.write_all(&page_data(&pages)).unwrap();
    lone.wire.write_all(&ending()).unwrap();
    let summary = lone.finish().0.unwrap();
    assert_eq!((summary.stats.references_outstanding, summary.stats.references), (0, first));
}

#[test]
fn optional_records_pass() {
    let stream = [beginning(), record(0x8000_1234, &[5; 11]), ending()].concat();
    let summary = target_says(&stream, 8).unwrap();
    assert_eq!(summary.stats.bytes_out, stream.len() as u64);
}

/// Places in a stream, and what stands there instead.
type Bends = Vec<(proptest::sample::Index, u8)>;

/// A stream with other bytes at some places of its beginning, rather than in page contents; and cut, or whole.
fn bent(mut stream: Vec<u8>, beginning: usize, bends: &Bends, cut: proptest::sample::Index) -> Vec<u8> {
    let whole = stream.len();
    for (at, value) in bends {
        stream[at.index(whole / 8) * 8 % beginning] = *value;
    }
    stream.truncate(cut.index(whole * 2).min(whole));
    stream
}

fn bends() -> impl Strategy<Value = Bends> {
    proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A stream that was cut or bent somewhere ends in an error or in a restore, never in a panic or a hang.
    #[test]
    fn bent_streams_never_panic(
        cut in any::<proptest::sample::Index>(),
        bends in bends(),
    ) {
        let stream = [
            beginning(),
            references(0, 0..4),
            page_data(&[Sent::page(0, other_page(0)), Sent::typed(1, 15, Vec::new())]),
            page_data(&[Sent::page(2, other_page(0)), Sent::page(3, other_page(1))]),
            ending(),
        ]
        .concat();
        if let Err(EngineError::Panicked) = target_says(&bent(stream, 1400, &bends, cut), 8) {
            prop_assert!(false, "panicked");
        }
    }

    /// The same at the source, where the save may stop anywhere.
    #[test]
    fn bent_saves_never_panic(
        cut in any::<proptest::sample::Index>(),
        bends in bends(),
        side in any::<bool>(),
    ) {
        let stream = [
            beginning(),
            page_data(&clean_pages()),
            page_data(&[Sent::page(0, other_page(0)), Sent::typed(1, 15, Vec::new())]),
            ending(),
        ]
        .concat();
        let whole = stream.len();
        let stream = bent(stream, 1600, &bends, cut);
        let quick = Config { drain_timeout: Duration::ZERO, ..config() };
        let result = if side {
            let lone = LoneSource::start(quick);
            feed(lone.save, lone.wire, lone.source, &stream)
        } else {
            let (save, source, wire) = plain_source(map([]), quick);
            feed(save, wire, source, &stream)
        };
        prop_assert!(!matches!(result, Err(EngineError::Panicked)), "panicked");
        if bends.is_empty() {
            prop_assert_eq!(result.is_ok(), stream.len() == whole);
        }
    }
}

fn feed(
    mut save: UnixStream,
    mut wire: UnixStream,
    source: SourceFilter,
    stream: &[u8],
) -> Result<crate::engine::SourceSummary, EngineError> {
    let reader = std::thread::spawn(move || wire.read_to_end(&mut Vec::new()));
    let _ = save.write_all(stream);
    drop(save);
    let result = source.finish();
    reader.join().unwrap().unwrap();
    result
}

/// A stream that has its first memory right behind its headers, while the threads of the filter have only begun: as often as it takes one of them to
/// be late.
#[test]
fn nothing_overtakes_the_headers() {
    for _ in 0..300 {
        let LoneSource { mut save, source, mut wire, side } = LoneSource::start(config());
        let headers = beginning()[..40].to_vec();
        save.write_all(&[headers.clone(), page_data(&[Sent::page(0, vec![0; PAGE])])].concat()).unwrap();
        let mut came = [0; 40];
        wire.read_exact(&mut came).unwrap();
        assert_eq!(came, headers[..]);
        drop((save, wire, side));
        assert!(source.finish().is_err());
    }
}
