//! A source and a target filter in this process, with sockets between them and a file as the disk.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use enlightenment::{ListKind, Pfn, Run, Vdev};
use nix::sys::socket::{setsockopt, sockopt};

use super::guest_stream::{disk_page, restore};
use crate::engine::{
    Config, DirtyLog, DiskName, EngineError, ReferenceMap, SourceFilter, SourceParts, SourceSummary,
    TargetFilter, TargetParts, TargetSummary,
};

pub const XVDA: u32 = 51712;
/// Last PFN of the made-up guest.
pub const MAX_PFN: u64 = 4095;
/// What libxl writes after libxc's END.
pub const AFTER_END: &[u8] = b"libxl goes on here";

/// The disk: page i is `disk_page(i)`, and a piece of a page at the end.
pub fn disk(pages: u64) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for page in 0..pages {
        file.write_all(&disk_page(page)).unwrap();
    }
    file.write_all(&[1; 512]).unwrap();
    file.flush().unwrap();
    file
}

/// That it is the domain's one disk.
pub fn only(disk: &tempfile::NamedTempFile) -> Vec<DiskName> {
    vec![DiskName { vdev: Vdev(XVDA), path: disk.path().to_owned() }]
}

/// A source filter by itself, without a side channel: where the save writes, and what comes out.
pub fn plain_source(map: ReferenceMap, config: Config) -> (UnixStream, SourceFilter, UnixStream) {
    let [save, wire] = std::array::from_fn(|_| UnixStream::pair().unwrap());
    let parts = SourceParts {
        from_save: OwnedFd::from(save.1),
        to_wire: OwnedFd::from(wire.0),
        side: None,
        map,
        disks: Vec::new(),
        config,
    };
    (save.0, SourceFilter::start(parts).unwrap(), wire.1)
}

/// A target filter likewise, behind a wire: it, and what comes out.
pub fn plain_target(wire: UnixStream) -> (TargetFilter, UnixStream) {
    let restored = UnixStream::pair().unwrap();
    let parts = TargetParts {
        from_wire: OwnedFd::from(wire),
        to_restore: OwnedFd::from(restored.0),
        side: None,
        config: config(),
    };
    (TargetFilter::start(parts).unwrap(), restored.1)
}

/// A map in which each PFN lies in a page of the disk.
pub fn map(places: impl IntoIterator<Item = (u64, u64)>) -> ReferenceMap {
    let mut map = ReferenceMap::new(Pfn(MAX_PFN));
    for (pfn, disk_page) in places {
        let run = Run {
            pfn,
            disk_offset: disk_page * 4096,
            vdev: XVDA,
            pages: 1,
            list: ListKind::Read as u8,
            reserved: 0,
        };
        map.insert_run(&run).unwrap();
    }
    map
}

/// Small and quick.
pub fn config() -> Config {
    Config {
        window_bytes: 1 << 20,
        drain_timeout: Duration::from_secs(20),
        readers: 2,
        read_bytes: 64 << 10,
        in_flight_bytes: 256 << 10,
        ..Config::default()
    }
}

/// How long nothing passes a wire that is held.
const HELD_AT_MOST: Duration = Duration::from_secs(30);

/// Takes little at a time, and nothing while it is held.
fn narrow(wire: (UnixStream, UnixStream), is_held: &Arc<AtomicBool>) -> (UnixStream, UnixStream) {
    let (mut from, is_held) = (UnixStream::pair().unwrap(), Arc::clone(is_held));
    setsockopt(&from.0, sockopt::SndBuf, &1).unwrap();
    let (mut to, mut piece) = (wire.0, [0; 4096]);
    std::thread::spawn(move || {
        loop {
            let patience = Instant::now() + HELD_AT_MOST;
            while is_held.load(Ordering::Relaxed) {
                if Instant::now() > patience {
                    // The filter waits for the wire, with what it would have to do first: a wire does go on some day.
                    is_held.store(false, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_micros(200));
            }
            let length = from.1.read(&mut piece).unwrap_or(0);
            if length == 0 || to.write_all(&piece[..length]).is_err() {
                return;
            }
        }
    });
    (from.0, wire.1)
}

/// Everything between a save and a restore.
pub struct Pair {
    /// Where the save writes.
    pub save: UnixStream,
    pub source: SourceFilter,
    pub target: TargetFilter,
    /// While it is true, nothing passes the wire.
    pub is_held: Arc<AtomicBool>,
    /// The wire's two ends again, as libxl holds them beside its helper.
    wire: (UnixStream, UnixStream),
    /// The side channel's source end again, to cut it.
    pub side: UnixStream,
    restored: JoinHandle<Vec<u8>>,
}

/// What is left when both filters have ended.
pub struct Outcome {
    pub source: Result<SourceSummary, EngineError>,
    pub target: Result<TargetSummary, EngineError>,
    /// All that libxenguest could read.
    pub stream: Vec<u8>,
    /// What was left on the wire.
    pub left_on_wire: Vec<u8>,
}

/// Reads to the end, from a thread of its own.
pub fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        from.read_to_end(&mut all).unwrap();
        all
    })
}

impl Pair {
    pub fn start(
        map: ReferenceMap,
        disks: Vec<DiskName>,
        source_config: Config,
        target_config: Config,
    ) -> Self {
        Self::with_log(map, disks, None, source_config, target_config)
    }

    /// With a log of dirty pages to look at.
    pub fn with_log(
        map: ReferenceMap,
        disks: Vec<DiskName>,
        log: Option<Arc<dyn DirtyLog>>,
        source_config: Config,
        target_config: Config,
    ) -> Self {
        let [save, wire, side] = std::array::from_fn(|_| UnixStream::pair().unwrap());
        let (restore, to_restore) = std::io::pipe().unwrap();
        let again = |stream: &UnixStream| stream.try_clone().unwrap();
        let is_held = Arc::new(AtomicBool::new(false));
        let wire = if log.is_some() { narrow(wire, &is_held) } else { wire };
        let kept = (again(&wire.0), again(&wire.1), again(&side.0));
        let target = TargetFilter::start(TargetParts {
            from_wire: OwnedFd::from(wire.1),
            to_restore: to_restore.into(),
            side: Some(OwnedFd::from(side.1)),
            config: target_config,
        })
        .unwrap();
        let parts = SourceParts {
            from_save: OwnedFd::from(save.1),
            to_wire: OwnedFd::from(wire.0),
            side: Some(OwnedFd::from(side.0)),
            map,
            disks,
            config: source_config,
        };
        let source = match log {
            Some(log) => SourceFilter::start_with_log(parts, log),
            None => SourceFilter::start(parts),
        };
        let source = source.unwrap();
        Self {
            save: save.0,
            source,
            target,
            is_held,
            wire: (kept.0, kept.1),
            side: kept.2,
            restored: collect(restore),
        }
    }

    /// With one disk, and both sides set up alike.
    pub fn simple(map: ReferenceMap, disk: &tempfile::NamedTempFile, config: Config) -> Self {
        Self::start(map, only(disk), config.clone(), config)
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.save.write_all(bytes).unwrap();
    }

    /// A whole stream, of which the restore makes the same guest.
    pub fn carry(mut self, stream: &[u8]) -> Outcome {
        self.write(stream);
        let outcome = self.finish();
        assert_eq!(restore(&outcome.stream), restore(stream));
        outcome
    }

    /// The save has written all: waits for both filters, and looks at what is left on the wire.
    pub fn finish(self) -> Outcome {
        drop(self.save);
        let source = self.source.finish();
        let (mut wire_in, mut wire_out) = self.wire;
        wire_in.write_all(AFTER_END).unwrap();
        drop(wire_in);
        let target = self.target.finish();
        let mut left_on_wire = Vec::new();
        wire_out.read_to_end(&mut left_on_wire).unwrap();
        Outcome { source, target, stream: self.restored.join().unwrap(), left_on_wire }
    }
}
