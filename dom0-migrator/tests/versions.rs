//! This release's filters against those of the one before: each as the source, and as the target. What goes between them is the stream with
//! its references, and the side channel; where their versions differ, the commands do not let them meet (`tests/commands/upgrade.rs`), and
//! if they do, every page goes as it is.
//!
//! `cargo xtask test upgrade` builds the other release's `peer` from git, and says where it is.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use dom0_migrator::control::STREAM_VERSION;
use dom0_migrator::engine;
use enlightenment::{ListKind, Pfn, Run, Vdev};

use engine::{Config, DiskName, ReferenceMap, SourceFilter, SourceParts, TargetFilter, TargetParts};
use guest_stream::{Sent, beginning, disk_page, ending, other_page, page_data, restore};

#[allow(dead_code, reason = "the tests beside the engine use more of it")]
#[path = "../src/engine/tests/guest_stream.rs"]
mod guest_stream;

/// `xvda`.
const VDEV: u32 = 51712;
/// Pages of the guest, and of the disk.
const PAGES: u64 = 512;
/// Of eight hints one is wrong, and of eight pages one is of zeros, which goes as a marker.
const WRONG: u64 = PAGES / 8;
const RIGHT: u64 = PAGES - 2 * WRONG;

/// The other release's filter in a process of its own, and the connections to it.
struct Peer {
    child: Child,
    directory: tempfile::TempDir,
    disk: tempfile::NamedTempFile,
}

impl Peer {
    fn start(side: &str, names: [&str; 3]) -> (Self, [UnixStream; 3]) {
        let programs = std::env::var_os("POOLSKIP_PREVIOUS").map(PathBuf::from);
        let peer =
            programs.expect("POOLSKIP_PREVIOUS is not set: use `cargo xtask test upgrade`").join("peer");
        let directory = tempfile::tempdir().unwrap();
        let mut disk = tempfile::NamedTempFile::new().unwrap();
        (0..PAGES).for_each(|page| disk.write_all(&disk_page(page)).unwrap());
        disk.flush().unwrap();
        let listeners = names.map(|name| UnixListener::bind(directory.path().join(name)).unwrap());
        let mut command = Command::new(peer);
        command.arg(side).arg(directory.path()).arg(disk.path()).stdout(Stdio::piped());
        if side == "source" {
            command.arg(PAGES.to_string());
        }
        let child = command.spawn().unwrap();
        let connections = listeners.map(|listener| listener.accept().unwrap().0);
        (Self { child, directory, disk }, connections)
    }

    fn disks(&self) -> Vec<DiskName> {
        vec![DiskName { vdev: Vdev(VDEV), path: self.disk.path().to_owned() }]
    }

    /// That it counted what was counted here, accepted and refused, and that this is what the versions warrant.
    fn counted_the_same(self, here: (u64, u64)) {
        let output = self.child.wait_with_output().unwrap();
        assert!(output.status.success(), "the other release's filter failed: {}", output.status);
        let line = String::from_utf8(output.stdout).unwrap();
        drop(self.directory);
        let numbers: Vec<u64> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
        let [version, accepted, refused] = numbers[..] else { panic!("{line:?}") };
        let same = version == u64::from(STREAM_VERSION);
        println!(
            "its stream has version {version}, ours {STREAM_VERSION}: {accepted} accepted, {refused} refused"
        );
        assert_eq!(here, if same { (RIGHT, WRONG) } else { (0, 0) });
        assert_eq!((accepted, refused), here);
    }
}

fn stream() -> Vec<u8> {
    let page = |pfn: u64| match pfn % 8 {
        6 => vec![0; 4096],
        7 => other_page(pfn),
        _ => disk_page(pfn),
    };
    let pages: Vec<Sent> = (0..PAGES).map(|pfn| Sent::page(pfn, page(pfn))).collect();
    let mut stream = beginning();
    pages.chunks(100).for_each(|batch| stream.extend(page_data(batch)));
    stream.extend(ending());
    stream
}

/// The save writes; what the restore at the other end could read.
fn carry(mut save: UnixStream, mut restored: UnixStream) -> Vec<u8> {
    let writing = std::thread::spawn(move || save.write_all(&stream()).unwrap());
    let mut all = Vec::new();
    restored.read_to_end(&mut all).unwrap();
    writing.join().unwrap();
    all
}

#[test]
#[ignore = "needs the release before: `cargo xtask test upgrade`"]
fn what_the_release_before_sends_is_understood() {
    let (peer, [save, wire, side]) = Peer::start("source", ["save", "wire", "side"]);
    let (restored, to_restore) = UnixStream::pair().unwrap();
    let target = TargetFilter::start(TargetParts {
        from_wire: OwnedFd::from(wire),
        to_restore: OwnedFd::from(to_restore),
        side: Some(OwnedFd::from(side)),
        config: Config { own_disks: Some(peer.disks()), ..Config::default() },
    })
    .unwrap();
    let all = carry(save, restored);
    assert!(restore(&all) == restore(&stream()), "another guest has come");
    let stats = target.finish().unwrap().stats;
    peer.counted_the_same((stats.references_accepted, stats.refused.hash));
}

#[test]
#[ignore = "needs the release before: `cargo xtask test upgrade`"]
fn the_release_before_understands_what_is_sent() {
    let (peer, [restored, wire, side]) = Peer::start("target", ["restore", "wire", "side"]);
    let (save, from_save) = UnixStream::pair().unwrap();
    let mut map = ReferenceMap::new(Pfn(PAGES - 1));
    for pfn in 0..PAGES {
        let (disk_offset, list) = (pfn * 4096, ListKind::Read as u8);
        map.insert_run(&Run { pfn, disk_offset, vdev: VDEV, pages: 1, list, reserved: 0 }).unwrap();
    }
    let source = SourceFilter::start(SourceParts {
        from_save: OwnedFd::from(from_save),
        to_wire: OwnedFd::from(wire),
        side: Some(OwnedFd::from(side)),
        map,
        disks: peer.disks(),
        config: Config::default(),
    })
    .unwrap();
    let all = carry(save, restored);
    assert!(restore(&all) == restore(&stream()), "another guest has come");
    let stats = source.finish().unwrap().stats;
    peer.counted_the_same((stats.references_accepted, stats.references_refused));
}
