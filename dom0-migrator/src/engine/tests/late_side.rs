//! A side channel that comes when the stream has begun, as under a plain `xl migrate`.

use std::io::{Read, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};
use enlightenment::Vdev;

use super::guest_stream::{Sent, beginning, disk_page, ending, other_page, page_data, restore};
use super::pair::{XVDA, config, disk, map};
use crate::engine::side_message::{Answer, Hello};
use crate::engine::xen_stream::{PAGE, RecordHeader, record as kinds};
use crate::engine::{Coming, Config, DiskName, SourceFilter, SourceParts, TargetFilter, TargetParts};
use crate::offer;

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(600);

/// A source that waits for its side channel.
struct Waiting {
    save: UnixStream,
    source: SourceFilter,
    /// Where its stream comes out.
    wire: UnixStream,
    /// Where the side channel is given to it.
    give: Sender<OwnedFd>,
    _disk: tempfile::NamedTempFile,
}

impl Waiting {
    /// With the pages of the first 64 numbers on the disk.
    fn start(patience: Duration) -> Self {
        let disk = disk(64);
        let [save, wire] = std::array::from_fn(|_| UnixStream::pair().unwrap());
        let (give, sockets) = bounded(1);
        let source = SourceFilter::start_before_side(
            SourceParts {
                from_save: OwnedFd::from(save.1),
                to_wire: OwnedFd::from(wire.0),
                side: None,
                map: map((0..64).map(|pfn| (pfn, pfn))),
                disks: vec![DiskName { vdev: Vdev(XVDA), path: disk.path().to_owned() }],
                config: Config { reference_passes: u32::MAX, ..config() },
            },
            Coming { offer: b"come".to_vec(), sockets, patience },
        )
        .unwrap();
        Self { save: save.0, source, wire: wire.1, give, _disk: disk }
    }

    fn write(&mut self, bytes: &[u8]) {
        self.save.write_all(bytes).unwrap();
    }
}

/// The other side, which has read the offer: its filter, its end of the side channel for the source, and what libxenguest gets.
fn target(wire: UnixStream, side: Option<UnixStream>) -> (TargetFilter, JoinHandle<Vec<u8>>) {
    // That this offer is none that can be understood does not matter here.
    let found = offer::take(wire.as_fd()).unwrap();
    assert!(found.offer.is_some());
    let (near, mut restored) = UnixStream::pair().unwrap();
    let parts = TargetParts {
        from_wire: wire.into(),
        to_restore: near.into(),
        side: side.map(OwnedFd::from),
        config: config(),
    };
    let target = TargetFilter::start_after(parts, found.bytes).unwrap();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        restored.read_to_end(&mut all).unwrap();
        all
    });
    (target, reader)
}

fn pages(pfns: std::ops::Range<u64>) -> Vec<u8> {
    page_data(&pfns.map(|pfn| Sent::page(pfn, disk_page(pfn))).collect::<Vec<_>>())
}

#[test]
fn memory_waits_for_a_side_channel_that_is_offered() {
    let mut waiting = Waiting::start(LONG);
    let stream = [beginning(), pages(0..64), ending()].concat();
    waiting.write(&stream);
    // The headers and the offer, and nothing more.
    let mut head = [0; 40 + 8 + 8];
    waiting.wire.read_exact(&mut head).unwrap();
    assert_eq!(head[..40], stream[..40]);
    assert_eq!(head[40..48], RecordHeader::bytes(kinds::OFFER, 4));
    assert_eq!(&head[48..52], b"come");
    waiting.wire.set_nonblocking(true).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(waiting.wire.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    waiting.wire.set_nonblocking(false).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let (from_restore, mut restored) = UnixStream::pair().unwrap();
    let parts = TargetParts {
        from_wire: waiting.wire.into(),
        to_restore: from_restore.into(),
        side: Some(far.into()),
        config: config(),
    };
    let target = TargetFilter::start_after(parts, head[..40].to_vec()).unwrap();
    waiting.give.send(near.into()).unwrap();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        restored.read_to_end(&mut all).unwrap();
        all
    });
    drop(waiting.save);
    let (source, target) = (waiting.source.finish().unwrap(), target.finish().unwrap());
    assert_eq!(restore(&reader.join().unwrap()), restore(&stream));
    assert!(source.poolskip && target.poolskip);
    assert_eq!(source.disks, target.disks);
    assert_eq!((source.stats.pages_referenced, source.stats.references_accepted), (64, 64));
    assert_eq!(source.stats.pages_raw, 0);
}

#[test]
fn one_that_comes_late_is_used_from_then_on() {
    let mut waiting = Waiting::start(Duration::ZERO);
    let mut stream = [beginning(), pages(0..32)].concat();
    waiting.write(&stream);
    let (near, far) = UnixStream::pair().unwrap();
    let (target, reader) = target(waiting.wire.try_clone().unwrap(), Some(far));
    // Nothing is held back: these have gone when the channel comes.
    while waiting.source.stats().pages_raw < 32 {
        std::thread::sleep(Duration::from_millis(5));
    }
    waiting.give.send(near.into()).unwrap();
    // Zeros go as they are until it is open.
    for pfn in 64.. {
        let zeros = page_data(&[Sent::page(pfn, vec![0; PAGE])]);
        waiting.write(&zeros);
        stream.extend(zeros);
        if waiting.source.stats().pages_zero > 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // A second pass: those of the first half again, one with other bytes.
    let rest = [page_data(&[Sent::page(3, other_page(3))]), pages(4..64)].concat();
    waiting.write(&rest);
    let drained = waiting.source.drain().unwrap();
    assert!(drained.synced, "{drained:?}");
    waiting.source.suspended();
    waiting.write(&ending());
    stream.extend([rest, ending()].concat());
    drop((waiting.save, waiting.wire));
    let (source, target) = (waiting.source.finish().unwrap(), target.finish().unwrap());
    assert_eq!(restore(&reader.join().unwrap()), restore(&stream));
    let stats = &source.stats;
    assert!(source.poolskip && stats.pages_zero > 0);
    // The page with other bytes is in the map too, and is refused.
    assert_eq!((stats.pages_referenced, stats.references_accepted, stats.references_refused), (61, 60, 1));
    assert_eq!(target.stats.references_accepted, 60);
}

#[test]
fn nobody_who_comes_is_a_plain_stream() {
    let Waiting { mut save, source, wire, give, _disk } = Waiting::start(Duration::ZERO);
    let (begun, rest) = (beginning(), [pages(0..64), ending()].concat());
    save.write_all(&begun).unwrap();
    let (target, reader) = target(wire.try_clone().unwrap(), None);
    // Earlier nothing would have been offered.
    drop(give);
    save.write_all(&rest).unwrap();
    drop((save, wire));
    let source = source.finish().unwrap();
    target.finish().unwrap();
    assert!(reader.join().unwrap() == [begun, rest].concat(), "the stream has changed");
    assert!(!source.poolskip);
    assert_eq!((source.stats.pages_raw, source.stats.pages_referenced), (64, 0));
}

#[test]
fn one_that_comes_after_the_suspension_is_not_used() {
    let Waiting { mut save, source, wire, give, _disk } = Waiting::start(Duration::ZERO);
    let mut stream = [beginning(), pages(0..8)].concat();
    save.write_all(&stream).unwrap();
    let (near, mut far) = UnixStream::pair().unwrap();
    let (target, reader) = target(wire.try_clone().unwrap(), None);
    assert_eq!(source.drain().unwrap().outstanding, 0);
    source.suspended();
    let _ = give.send(near.into());
    drop(give);
    let rest = [pages(0..8), ending()].concat();
    save.write_all(&rest).unwrap();
    stream.extend(rest);
    drop((save, wire));
    let source = source.finish().unwrap();
    target.finish().unwrap();
    assert_eq!(restore(&reader.join().unwrap()), restore(&stream));
    assert_eq!((source.poolskip, source.stats.pages_raw), (false, 16));
    // It may be greeted, and is closed then: it is not kept waiting.
    far.set_read_timeout(Some(LONG)).unwrap();
    drop(
        Hello::read(&mut far)
            .map(|hello| Answer { max_outstanding: 1, disks: Vec::new() }.write(&mut far).map(|()| hello)),
    );
    let _ = far.read_to_end(&mut Vec::new());
}
