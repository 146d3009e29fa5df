//! Storage that is slow, or fails half-way: a migration then goes over the network, and no page is lost.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::failures::LoneSource;
use super::guest_stream::{Sent, beginning, disk_page, ending, page_data, restore};
use super::pair::{Pair, config, disk, map};
use crate::engine::side_message::Verdicts;
use crate::engine::xen_stream::PAGE;
use crate::engine::{Config, SourceFilter, SourceStats};

fn pages(range: std::ops::Range<u64>) -> Vec<u8> {
    let sent: Vec<_> = range.map(|pfn| Sent::page(pfn, disk_page(pfn))).collect();
    sent.chunks(64).flat_map(page_data).collect()
}

#[test]
fn a_disk_that_fails_half_way_is_done_without() {
    let disk = disk(1024);
    let mut pair = Pair::simple(
        map((0..1024).map(|pfn| (pfn, pfn))),
        &disk,
        Config { window_bytes: 8 << 20, ..config() },
    );
    let mut stream = beginning();
    stream.extend(pages(0..512));
    pair.write(&stream);
    let deadline = Instant::now() + Duration::from_secs(60);
    while pair.source.stats().references_accepted < 512 {
        assert!(Instant::now() < deadline, "the first half was not loaded: {:?}", pair.source.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    // From here on every read of it fails.
    disk.as_file().set_len(0).unwrap();
    let rest = pages(512..1024);
    pair.write(&rest);
    stream.extend(rest);
    let drained = pair.source.drain().unwrap();
    assert!(drained.synced, "{drained:?}");
    let last = ending();
    pair.write(&last);
    stream.extend(last);
    let outcome = pair.finish();
    assert_eq!(restore(&outcome.stream), restore(&stream));
    let stats = outcome.source.unwrap().stats;
    assert_eq!((stats.references_accepted, stats.references_refused), (512, 512), "{stats:?}");
}

/// A target that loads one page in the time in which ten arrive, and none of the last thousands: the window fills, nothing waits for it, and what goes over the network is
/// not more than without references.
#[test]
fn storage_at_a_tenth_of_the_links_pace_holds_nothing_up() {
    let config =
        Config { window_bytes: 64 * PAGE as u64, drain_timeout: Duration::from_millis(200), ..config() };
    let lone = LoneSource::with_pages(4000, config);
    let mut stream = beginning();
    stream.extend(pages(0..4000));
    stream.extend(ending());
    let (mut save, mut wire, mut side) = (lone.save, lone.wire, lone.side);
    std::thread::scope(|threads| {
        let all = &stream;
        threads.spawn(move || save.write_all(all).unwrap());
        let (mut buffer, mut came, mut accepted) = (vec![0; 10 * PAGE], 0, 0);
        loop {
            let length = wire.read(&mut buffer).unwrap();
            if length == 0 {
                break;
            }
            came += length;
            // No earlier than the window is full, and no longer than the source is sure to have pages left to send.
            while accepted < (came / (10 * PAGE)) as u64 && (200..2000).contains(&(came / PAGE)) {
                accept_next(&lone.source, &mut side, accepted);
                accepted += 1;
            }
        }
    });
    let stats = lone.source.finish().unwrap().stats;
    assert!(!stats.side_channel_lost, "a verdict came for a page that was not outstanding: {stats:?}");
    assert!(stats.references_accepted > 100 && stats.pages_window_full > 3000, "{stats:?}");
    assert!(stats.references_outstanding_peak <= 64);
    let (most, sent) = (stream.len() as u64 * 101 / 100, stats.bytes_out);
    assert!(sent <= most, "{sent} bytes, {most} would be too many: {stats:?}");
}

/// Accepts the reference of this number once it is outstanding, and waits until the source counts it.
fn accept_next(source: &SourceFilter, side: &mut UnixStream, number: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let wait_for = |what: &dyn Fn(&SourceStats) -> bool| {
        while !what(&source.stats()) {
            assert!(Instant::now() < deadline, "verdict {number}: {:?}", source.stats());
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    wait_for(&|stats| stats.references_outstanding > 0);
    Verdicts { accepted: vec![(number, 1)], refused: Vec::new() }.write(side).unwrap();
    wait_for(&|stats| stats.references_accepted == number + 1);
}
