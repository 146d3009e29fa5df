//! What comes from Xen's toolstack.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;

use dom0_migrator::command::follow::{Follower, Next};
use dom0_migrator::command::xl_words::Words;
use dom0_migrator::disks::of_configuration;
use dom0_migrator::helper::arguments::Arguments;
use dom0_migrator::stream_head::StreamHead;
use dom0_migrator::xen::DomainId;
use dom0_migrator::xenstore::{Store, Xenstore};
use enlightenment::xenstore::{parse_answer, parse_number, parse_request};

/// xenstored's replies, and what a guest may have written into its nodes.
pub fn xenstore(data: &[u8]) {
    if let Some((sequence, kind)) = parse_request(data) {
        let again = format!("{sequence} {}", kind.word());
        assert_eq!(parse_request(again.as_bytes()), Some((sequence, kind)));
    }
    let _ = (parse_answer(data), parse_number(data));
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(data).unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    let mut store = Xenstore::over(OwnedFd::from(ours).into());
    let _ = store.read("/a");
    let _ = store.directory("/a");
    let _ = store.write("/a", b"b");
    let _ = store.resume_domain(DomainId(1));
    while store.take_watch_event().is_ok() {}
}

/// xl's words, its stream as it passes, and libxl's arguments.
pub fn xl(data: &[u8]) {
    let (mut whole, mut pieces) = (Words::default(), Words::default());
    let at_once = whole.take(data);
    let mut heard = Vec::new();
    let split = data.chunks(7).try_for_each(|piece| pieces.take(piece).map(|words| heard.extend(words)));
    assert_eq!(at_once.is_ok(), split.is_ok());
    if let Ok(words) = at_once {
        assert_eq!(words, heard);
    }
    let (mut head, mut pieces) = (StreamHead::default(), StreamHead::default());
    let found: Vec<_> = data.chunks(11).filter_map(|piece| pieces.take(piece)).collect();
    assert_eq!(head.take(data).as_ref(), found.first());
    assert!(found.len() <= 1);
    follow(data);
    let arguments: Vec<OsString> =
        data.split(|byte| *byte == b' ').map(|word| OsString::from_vec(word.to_vec())).collect();
    let _ = Arguments::parse(&arguments);
}

/// Passes the bytes by a follower, as the carrier does.
fn follow(data: &[u8]) {
    let mut follower = Follower::default();
    let mut rest = data;
    loop {
        match follower.what_next() {
            Next::See(bytes) if bytes <= rest.len() => {
                follower.seen(&rest[..bytes]);
                rest = &rest[bytes..];
            }
            Next::Pass(bytes) if bytes <= rest.len() as u64 => rest = &rest[bytes as usize..],
            Next::See(bytes) => {
                // What is looked at is kept in memory.
                assert!(bytes <= 8192, "{bytes} bytes are to be looked at");
                break;
            }
            Next::Pass(_) | Next::PassAll => break,
        }
    }
    let _ = follower.pages();
}

/// The disks of a domain's configuration.
pub fn disks(data: &[u8]) {
    let Ok(configuration) = serde_json::from_slice(data) else { return };
    let disks = of_configuration(&configuration);
    assert!(disks.readable.len() + disks.refused.len() <= 255);
    assert!(disks.readable.iter().all(|disk| disk.path.is_absolute()));
    assert!(disks.refused.iter().all(|disk| disk.disk.chars().count() <= 64));
}
