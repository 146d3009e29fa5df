//! The fault matrix, as far as it needs no other process: in each phase of a migration each thing that can go wrong there.
//!
//! A cell is a test. It runs a whole migration through both filters, has the fault strike when its phase begins, and says what came of it in
//! a line that `cargo xtask test --faults` gathers into the table of `docs/reliability.md`:
//!
//! * *completed*: libxenguest at the target has what the one at the source wrote last, byte for byte;
//! * *source runs*: a helper has failed, so that xl fails on its side, before any permission was given: the domain runs on at the source, and
//!   nothing of it is kept at the target.
//!
//! Where a helper or a connection fails in the hand-over or after it, the commands themselves have to act: those cells are in
//! `tests/commands/faults.rs`, and those of connections that are not yet made.

mod link;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use enlightenment::{Pfn, Vdev};

use super::guest_stream::{Sent, beginning, disk_page, ending, other_page, page_data, restore};
use super::pair::{XVDA, config, disk, map};
use crate::control::Token;
use crate::engine::fault::{self, Point, Strike};
use crate::engine::{
    Config, DiskName, EngineError, ReferenceMap, SourceFilter, SourceParts, SourceSummary, TargetFilter,
    TargetParts, TargetSummary,
};
use crate::handover::record::{Record, Records};
use crate::handover::{Duty, SourceEvent, SourceState, State, TargetEvent, TargetState, Verdict};
use crate::lists::{GuestMemory, walk};
use link::Link;

/// Pages of the guest.
const PAGES: u64 = 256;
/// How long something is held up that goes on in the end.
const A_WHILE: Duration = Duration::from_millis(150);

/// What goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// The helpers begin, and the guest is asked for its lists.
    Offer,
    /// The hello, the lists in hand.
    Plan,
    FirstRound,
    LaterRounds,
    Drain,
    Suspend,
    LastPages,
    /// Both helpers are done; which side may run the domain is written down on both.
    HandOver,
    /// The domain runs at the target; the source's copy is removed, and the report written.
    After,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    SourceHelperGone,
    TargetHelperGone,
    StreamCut,
    StreamStalled,
    SideCut,
    SideStalled,
    /// What was sent on the one connection arrives after what was sent later on the other.
    Reordered,
    DiskEio,
    DiskShort,
    DiskSlow,
    ListsGone,
    MemoryRefused,
    /// Where the report would be written.
    ReportDiskFull,
    /// Where the records of migrations are.
    RecordDiskFull,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Completed,
    SourceRuns,
}

/// A guest whose lists are not there any more.
struct Withdrawn;

impl GuestMemory for Withdrawn {
    fn last_pfn(&self) -> Pfn {
        Pfn(4095)
    }
    fn pages(&mut self, pfns: &[Pfn]) -> std::io::Result<Vec<Option<Box<[u8]>>>> {
        Ok(vec![None; pfns.len()])
    }
}

/// A migration under way.
struct Migration {
    struck: (Phase, Fault),
    disk: tempfile::NamedTempFile,
    stream: Link,
    side: Link,
    /// Where the save writes; none once its process is gone.
    save: Option<UnixStream>,
    source: Option<SourceFilter>,
    target: Option<TargetFilter>,
    /// What libxenguest at the target reads, and all that it has read.
    restored: Option<(UnixStream, JoinHandle<Vec<u8>>)>,
    /// What the save has written.
    written: Vec<u8>,
    lists_gone: bool,
    begun: Option<(Record<SourceState>, Record<TargetState>)>,
    /// Where the records of both hosts lie; a directory that is not there takes none.
    records: tempfile::TempDir,
    report: PathBuf,
}

fn settings() -> Config {
    Config { drain_timeout: Duration::from_secs(1), hello_timeout: Duration::from_secs(5), ..config() }
}

/// Pages as they are in a round: each round some are others.
fn pages(round: u64) -> Vec<Sent> {
    let all = 0..PAGES;
    match round {
        0 => all
            .map(|pfn| Sent::page(pfn, if pfn % 8 == 7 { other_page(pfn) } else { disk_page(pfn) }))
            .collect(),
        _ => all
            .filter(|pfn| pfn % 5 == round % 5)
            .map(|pfn| Sent::page(pfn, other_page(pfn + 1000 * round)))
            .collect(),
    }
}

impl Migration {
    fn new(struck: (Phase, Fault)) -> Self {
        let (stream, _, _) = Link::new();
        let (side, _, _) = Link::new();
        let records = tempfile::tempdir().unwrap();
        Self {
            struck,
            disk: disk(PAGES),
            stream,
            side,
            save: None,
            source: None,
            target: None,
            restored: None,
            written: Vec::new(),
            lists_gone: false,
            begun: None,
            report: records.path().join("report.json"),
            records,
        }
    }

    /// The phase begins; what strikes in it does so now.
    fn enter(&mut self, phase: Phase) {
        let (when, fault) = self.struck;
        if when != phase {
            return;
        }
        match fault {
            Fault::SourceHelperGone => self.end_source(),
            // dom0's kernel ends a process that it has no memory for; so does Rust where an allocation fails.
            Fault::TargetHelperGone => self.end_target(),
            Fault::MemoryRefused if phase >= Phase::FirstRound => self.end_target(),
            Fault::MemoryRefused => {
                let point = if phase == Phase::Offer { Point::SourceStart } else { Point::RestorerStart };
                fault::strike(self.disk.path(), point, Strike::Errno(libc::ENOMEM));
            }
            Fault::StreamCut => self.stream.cut(),
            Fault::SideCut => self.side.cut(),
            Fault::StreamStalled | Fault::SideStalled | Fault::Reordered => {
                let link = if fault == Fault::StreamStalled { &self.stream } else { &self.side };
                // What is said on the side channel is held up until long after what follows it in the stream.
                let times = if fault == Fault::Reordered { 2 } else { 1 };
                link.hold_up();
                let link = link.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(A_WHILE * times);
                    link.go_on();
                });
            }
            Fault::DiskEio => fault::strike(self.disk.path(), Point::DiskRead, Strike::Errno(libc::EIO)),
            Fault::DiskSlow => {
                fault::strike(self.disk.path(), Point::DiskRead, Strike::Slow(Duration::from_millis(20)));
            }
            Fault::DiskShort => self.disk.as_file().set_len(PAGES / 4 * 4096).unwrap(),
            Fault::ListsGone => self.lists_gone = true,
            Fault::ReportDiskFull => self.report = "/dev/full".into(),
            // What is there stays, and nothing can be written to it any more.
            Fault::RecordDiskFull => {
                fault::strike(self.records.path(), Point::RecordWrite, Strike::Errno(libc::ENOSPC));
            }
        }
    }

    /// As when its process is killed: the kernel closes all that it has.
    fn end_source(&mut self) {
        self.save = None;
        if let Some(source) = &self.source {
            source.abort();
        }
        self.stream.cut();
        self.side.cut();
    }

    fn end_target(&mut self) {
        if let Some(target) = &self.target {
            target.abort();
        }
        if let Some((restored, _)) = &self.restored {
            let _ = restored.shutdown(std::net::Shutdown::Both);
        }
        self.stream.cut();
        self.side.cut();
    }

    fn lists(&self) -> ReferenceMap {
        if self.lists_gone {
            assert!(walk(&mut Withdrawn, Pfn(10)).is_err(), "there is no root page");
            return ReferenceMap::new(Pfn(4095));
        }
        // Of each eight hints one is wrong.
        map((0..PAGES).map(|pfn| (pfn, pfn)))
    }

    /// Starts both helpers' filters; the source's may be refused what it needs.
    fn start(&mut self) -> Result<(), EngineError> {
        let [save, restore] = std::array::from_fn(|_| UnixStream::pair().unwrap());
        let (stream, stream_near, stream_far) = Link::new();
        let (side, side_near, side_far) = Link::new();
        (self.stream, self.side) = (stream, side);
        let disks = vec![DiskName { vdev: Vdev(XVDA), path: self.disk.path().to_owned() }];
        let mut reading = restore.1.try_clone().unwrap();
        let collecting = std::thread::spawn(move || {
            let mut all = Vec::new();
            let _ = reading.read_to_end(&mut all);
            all
        });
        self.restored = Some((restore.1, collecting));
        self.target = Some(TargetFilter::start(TargetParts {
            from_wire: OwnedFd::from(stream_far),
            to_restore: OwnedFd::from(restore.0),
            side: Some(OwnedFd::from(side_far)),
            config: settings(),
        })?);
        self.enter(Phase::Plan);
        self.save = Some(save.0);
        self.source = Some(SourceFilter::start(SourceParts {
            from_save: OwnedFd::from(save.1),
            to_wire: OwnedFd::from(stream_near),
            side: Some(OwnedFd::from(side_near)),
            map: self.lists(),
            disks,
            config: settings(),
        })?);
        if self.struck == (Phase::Plan, Fault::SourceHelperGone) {
            self.end_source();
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) {
        self.written.extend(bytes);
        if let Some(save) = &mut self.save
            && save.write_all(bytes).is_err()
        {
            self.save = None;
        }
    }

    fn send(&mut self, round: u64) {
        if let Some(source) = &self.source {
            source.enter_round(round as u32);
        }
        for batch in pages(round).chunks(32) {
            self.write(&page_data(batch));
        }
    }

    fn run(mut self) -> Outcome {
        self.enter(Phase::Offer);
        // Before anything is begun, both sides write that it is.
        let (records, id) = (Records::open_at(self.records.path()), Token::random().unwrap());
        let source = records.begin(&id, SourceState::Sending, "db1", None, "b:8002");
        let target = records.begin(&id, TargetState::Receiving, "db1", None, "a");
        let (Ok(source), Ok(target)) = (source, target) else { return Outcome::SourceRuns };
        self.begun = Some((source, target));
        if self.struck.0 == Phase::Offer
            && matches!(self.struck.1, Fault::SourceHelperGone | Fault::TargetHelperGone)
        {
            // A helper that never comes: its xl fails, and the other helper finds its connections closed.
            return self.end(None);
        }
        if self.start().is_err() {
            self.end_source();
            return self.end(None);
        }
        self.write(&beginning());
        for (phase, rounds) in [(Phase::FirstRound, 0..1), (Phase::LaterRounds, 1..4)] {
            self.enter(phase);
            rounds.for_each(|round| self.send(round));
        }
        self.enter(Phase::Drain);
        if let Some(source) = &self.source
            && let Ok(report) = source.drain()
        {
            assert_eq!(source.stats().references_outstanding, 0, "{report:?}");
        }
        self.enter(Phase::Suspend);
        if let Some(source) = &self.source {
            source.suspended();
        }
        self.enter(Phase::LastPages);
        self.send(4);
        self.write(&ending());
        self.save = None;
        let source = self.source.take().map(SourceFilter::finish);
        self.end(source)
    }

    /// Waits for what is left, and says what came of it.
    fn end(mut self, source: Option<Result<SourceSummary, EngineError>>) -> Outcome {
        let source = source.or_else(|| self.source.take().map(SourceFilter::finish));
        let failed = !matches!(source, Some(Ok(_)));
        if failed {
            // libxl at the source ends its connection, as the kernel does for a process that is gone.
            self.stream.cut();
            self.side.cut();
        }
        let target: Option<Result<TargetSummary, EngineError>> = self.target.take().map(TargetFilter::finish);
        let restored = self.restored.take().map(|(end, collecting)| {
            let _ = end.shutdown(std::net::Shutdown::Write);
            collecting.join().unwrap()
        });
        let (Some(Ok(source)), Some(Ok(target))) = (&source, &target) else {
            let panicked = |result: &EngineError| matches!(result, EngineError::Panicked);
            assert!(!matches!(&source, Some(Err(error)) if panicked(error)), "{source:?}");
            assert!(!matches!(&target, Some(Err(error)) if panicked(error)), "{target:?}");
            self.nobody_is_misled(
                source.is_some_and(|it| it.is_ok()),
                target.is_some_and(|it| it.is_ok()),
                restored,
            );
            return Outcome::SourceRuns;
        };
        let (expected, found) = (restore(&self.written), restore(&restored.unwrap()));
        let differ: BTreeMap<_, _> =
            expected.memory.iter().filter(|(pfn, page)| found.memory.get(pfn) != Some(page)).collect();
        assert!(differ.is_empty(), "{} pages differ", differ.len());
        assert!(found == expected, "what is not memory differs");
        assert_eq!((source.stats.references_outstanding, target.stats.references_outstanding), (0, 0));
        self.hand_over()
    }

    /// That the other helper is gone, or the stream cut, is known to each by itself: no permission is asked for or given on the word of one
    /// that does not know.
    fn nobody_is_misled(&self, source_is_content: bool, target_is_content: bool, restored: Option<Vec<u8>>) {
        if target_is_content {
            let all = restored.unwrap_or_default();
            assert!(restore(&all) == restore(&self.written), "a part was taken for the whole");
        }
        let (phase, fault) = self.struck;
        let stream_ends = match fault {
            Fault::StreamCut | Fault::TargetHelperGone => phase >= Phase::Plan,
            Fault::MemoryRefused => phase >= Phase::FirstRound,
            _ => false,
        };
        assert!(!(stream_ends && source_is_content), "what nobody reads was taken for sent");
    }

    /// Both records take the steps of the hand-over, each written down before the next is taken, as the commands do.
    fn hand_over(&mut self) -> Outcome {
        let (mut source, mut target) = self.begun.take().unwrap();
        self.enter(Phase::HandOver);
        let given = target
            .step(TargetEvent::Complete)
            .map_err(|error| error.to_string())
            .and_then(|_| source.step(SourceEvent::Permission).map_err(|error| error.to_string()));
        if given.is_err() {
            // What is not written down was not given: both sides are as before, and whoever finds the records later takes the domain back.
            assert_eq!((source.state(), source.state().duty()), (SourceState::Sending, Duty::TakeBack));
            assert_eq!(target.state().duty(), Duty::Discard);
            return Outcome::SourceRuns;
        }
        target.step(TargetEvent::Given).unwrap();
        target.step(TargetEvent::Started).unwrap();
        assert_eq!(target.state().verdict(), Some(Verdict::Runs));
        source.step(SourceEvent::Verdict(Verdict::Runs)).unwrap();
        self.enter(Phase::After);
        match source.step(SourceEvent::Removed) {
            Ok(_) => assert_eq!(source.state().duty(), Duty::Nothing),
            // Found again later, and done again: a copy that is not there any more is removed.
            Err(_) => assert_eq!(source.state().duty(), Duty::RemoveCopy),
        }
        assert!(!source.state().may_run() && target.state().may_run());
        let written = std::fs::write(&self.report, "{}\n");
        assert_eq!(written.is_err(), self.struck.1 == Fault::ReportDiskFull);
        Outcome::Completed
    }
}

/// Runs a cell, says what came of it, and holds it against what must.
fn cell(phase: Phase, fault: Fault, expected: Outcome) {
    let outcome = Migration::new((phase, fault)).run();
    println!("CELL {phase:?} {fault:?} {outcome:?}");
    assert_eq!(outcome, expected);
}

macro_rules! cells {
    ($($phase:ident $kind:ident { $($fault:ident $name:ident $outcome:ident;)* })*) => {
        $(mod $phase {
            use super::{Fault, Outcome, Phase, cell};
            $(#[test]
            fn $name() {
                cell(Phase::$kind, Fault::$fault, Outcome::$outcome);
            })*
        })*
    };
}

cells! {
    offer Offer {
        SourceHelperGone source_helper_gone SourceRuns;
        TargetHelperGone target_helper_gone SourceRuns;
        ListsGone lists_gone Completed;
        MemoryRefused memory_refused SourceRuns;
        DiskEio disk_eio Completed;
        DiskShort disk_short Completed;
        DiskSlow disk_slow Completed;
        ReportDiskFull report_disk_full Completed;
        RecordDiskFull record_disk_full SourceRuns;
    }
    plan Plan {
        SourceHelperGone source_helper_gone SourceRuns;
        TargetHelperGone target_helper_gone SourceRuns;
        StreamCut stream_cut SourceRuns;
        StreamStalled stream_stalled Completed;
        SideCut side_cut Completed;
        SideStalled side_stalled Completed;
        Reordered reordered Completed;
        DiskEio disk_eio Completed;
        DiskShort disk_short Completed;
        DiskSlow disk_slow Completed;
        ListsGone lists_gone Completed;
        MemoryRefused memory_refused SourceRuns;
        ReportDiskFull report_disk_full Completed;
        RecordDiskFull record_disk_full SourceRuns;
    }
    first_round FirstRound {
        SourceHelperGone source_helper_gone SourceRuns;
        TargetHelperGone target_helper_gone SourceRuns;
        StreamCut stream_cut SourceRuns;
        StreamStalled stream_stalled Completed;
        SideCut side_cut Completed;
        SideStalled side_stalled Completed;
        Reordered reordered Completed;
        DiskEio disk_eio Completed;
        DiskShort disk_short Completed;
        DiskSlow disk_slow Completed;
        ListsGone lists_gone Completed;
        MemoryRefused memory_refused SourceRuns;
        ReportDiskFull report_disk_full Completed;
        RecordDiskFull record_disk_full SourceRuns;
    }
    later_rounds LaterRounds {
        SourceHelperGone source_helper_gone SourceRuns;
        TargetHelperGone target_helper_gone SourceRuns;
        StreamCut stream_cut SourceRuns;
        StreamStalled stream_stalled Completed;
        SideCut side_cut Completed;
        SideStalled side_stalled Completed;
        Reordered reordered Completed;
        DiskEio disk_eio Completed;
        DiskShort disk_short Completed;
        DiskSlow disk_slow Completed;
        ListsGone lists_gone Completed;
        MemoryRefused memory_refused SourceRuns;
        ReportDiskFull report_disk_full Completed;
        RecordDiskFull record_disk_full SourceRuns;
    }
    drain Drain {
        SourceHelperGone source_helper_gone SourceRuns;
        TargetHelperGone target_helper_gone SourceRuns;
        StreamCut stream_cut SourceRuns;
        StreamStalled stream_stalled Completed;
        SideCut side_cut Completed;
        SideStalled side_stalled Completed;
        Reordered reordered Completed;
        DiskEio disk_eio Completed;
        DiskShort disk_short Completed;
        DiskSlow disk_slow Completed;
        ListsGone lists_gone Completed;
        MemoryRefused memory_refused SourceRuns;
        ReportDiskFull report_disk_full Completed;
        RecordDiskFull record_disk_full SourceRuns;
    }
    suspend Suspend {
        SourceHelperGone source_helper_gone SourceRuns;
        TargetHelperGone target_helper_gone SourceRuns;
        StreamCut stream_cut SourceRuns;
        StreamStalled stream_stalled Completed;
        SideCut side_cut Completed;
        SideStalled side_stalled Completed;
        Reordered reordered Completed;
        DiskEio disk_eio Completed;
        DiskShort disk_short Completed;
        DiskSlow disk_slow Completed;
        ListsGone lists_gone Completed;
        MemoryRefused memory_refused SourceRuns;
        ReportDiskFull report_disk_full Completed;
        RecordDiskFull record_disk_full SourceRuns;
    }
    last_pages LastPages {
        SourceHelperGone source_helper_gone SourceRuns;
        TargetHelperGone target_helper_gone SourceRuns;
        StreamCut stream_cut SourceRuns;
        StreamStalled stream_stalled Completed;
        SideCut side_cut Completed;
        SideStalled side_stalled Completed;
        Reordered reordered Completed;
        DiskEio disk_eio Completed;
        DiskShort disk_short Completed;
        DiskSlow disk_slow Completed;
        ListsGone lists_gone Completed;
        MemoryRefused memory_refused SourceRuns;
        ReportDiskFull report_disk_full Completed;
        RecordDiskFull record_disk_full SourceRuns;
    }
    hand_over HandOver {
        DiskEio disk_eio Completed;
        DiskShort disk_short Completed;
        DiskSlow disk_slow Completed;
        ListsGone lists_gone Completed;
        ReportDiskFull report_disk_full Completed;
        RecordDiskFull record_disk_full SourceRuns;
    }
    after After {
        DiskEio disk_eio Completed;
        DiskShort disk_short Completed;
        DiskSlow disk_slow Completed;
        ListsGone lists_gone Completed;
        ReportDiskFull report_disk_full Completed;
        RecordDiskFull record_disk_full Completed;
    }
}
