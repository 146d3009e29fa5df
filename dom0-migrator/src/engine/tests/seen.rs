//! What is told of a migration while it goes on, and what is left of it.

use std::time::Instant;

use super::guest_stream::{Sent, beginning, disk_page, ending, other_page, page_data, restore};
use super::pair::{Pair, config, disk, map};
use crate::engine::{Config, Way};
use crate::handoff::{Event, Listener, Peer};
use crate::helper::sampling::{RestoreSampling, SaveSampling};
use crate::memory_map::MemoryMap;
use crate::timeline::Moment;

/// Takes what a helper says, until it is gone.
fn hear(listener: &Listener) -> Vec<Event> {
    let peer = listener.accept().unwrap();
    std::iter::from_fn(|| peer.hear().unwrap()).collect()
}

#[test]
fn the_last_sample_has_all_and_the_map_has_every_page() {
    let listener = Listener::bind().unwrap();
    let path = listener.name().to_owned();
    let hearing = std::thread::spawn(move || hear(&listener));
    let peer = std::sync::Arc::new(Peer::connect(&path).unwrap());

    let disk = disk(512);
    // Of each eight hints one is wrong.
    let places = (0..512).map(|pfn| (pfn, if pfn % 8 == 0 { (pfn + 1) % 512 } else { pfn }));
    let mut pair = Pair::simple(map(places), &disk, Config { window_bytes: 4 << 20, ..config() });
    let began = Instant::now();
    let (saving, restoring) =
        (SaveSampling::start(began, Some(&peer), &pair.source), RestoreSampling::start(began, &pair.target));
    saving.mark(Moment::Round { number: 1, pages: Some(600) });
    let mut stream = beginning();
    let first: Vec<Sent> = (0..600)
        .map(|pfn| Sent::page(pfn, if pfn < 512 { disk_page(pfn) } else { other_page(pfn) }))
        .collect();
    first.chunks(100).for_each(|batch| stream.extend(page_data(batch)));
    pair.write(&stream);
    pair.source.drain().unwrap();
    saving.mark(Moment::Suspended);
    let last: Vec<u8> =
        [page_data(&[Sent::page(3, other_page(3)), Sent::page(4, vec![0; 4096])]), ending()].concat();
    pair.write(&last);
    stream.extend(last);
    let outcome = pair.finish();
    drop(saving);
    drop(peer);
    let (source, target) = (outcome.source.unwrap(), outcome.target.unwrap());
    assert_eq!(restore(&outcome.stream), restore(&stream));

    let events = hearing.join().unwrap();
    let marks: Vec<Moment> = events
        .iter()
        .filter_map(|event| if let Event::Marked(mark) = event { Some(mark.what) } else { None })
        .collect();
    assert_eq!(marks, [Moment::Round { number: 1, pages: Some(600) }, Moment::Suspended]);
    let Some(Event::Sampled(sample)) = events.last() else { panic!("{events:?}") };
    assert_eq!(sample.ways, source.stats.ways);
    assert_eq!((sample.bytes_in, sample.bytes_out), (source.stats.bytes_in, source.stats.bytes_out));
    assert_eq!((sample.bytes_other(), sample.window_pages), (source.stats.bytes_other, 0));
    let samples = restoring.finish();
    let sample = samples.last().unwrap();
    assert_eq!((sample.bytes_in, sample.bytes_out), (target.stats.bytes_in, target.stats.bytes_out));
    assert_eq!((sample.accepted, sample.refused, sample.outstanding), (448, 64, 0));
    assert_eq!(sample.disk_bytes, target.stats.disk_bytes);

    let map = MemoryMap::of(&source.travel).unwrap();
    map.check().unwrap();
    let pages = map.pages;
    assert_eq!((pages.accepted, pages.refused, pages.raw), (448 - 2, 64, 88));
    assert_eq!((pages.resent, pages.zero, pages.referenced), (1, 1, 0));
    assert_eq!(source.travel.way(8), Way::Refused);
}

#[test]
fn a_page_that_was_never_settled_is_said_to_be_sent_after_all() {
    let disk = disk(64);
    let mut pair = Pair::simple(map((0..64).map(|pfn| (pfn, pfn))), &disk, config());
    let mut stream = beginning();
    stream.extend(page_data(&(0..64).map(|pfn| Sent::page(pfn, disk_page(pfn))).collect::<Vec<_>>()));
    pair.write(&stream);
    // The side channel breaks: what is not settled is sent.
    pair.side.shutdown(std::net::Shutdown::Both).unwrap();
    stream.extend(ending());
    pair.write(&ending());
    let outcome = pair.finish();
    assert_eq!(restore(&outcome.stream), restore(&stream));
    let source = outcome.source.unwrap();
    let pages = MemoryMap::of(&source.travel).unwrap().pages;
    assert_eq!(pages.accepted + pages.replaced + pages.raw, 64);
    assert_eq!(pages.replaced, source.stats.references_replaced);
    assert_eq!(pages.referenced, 0);
}
