//! Random migrations against the model: whatever the hints, the timing and the failures, memory is what the save wrote.

use std::io::{Seek, SeekFrom, Write};
use std::net::Shutdown;
use std::time::Duration;

use proptest::prelude::*;

use super::guest_stream::{
    Sent, beginning, beginning_pvh, disk_page, ending, other_page, page_data, record, restore,
};
use super::pair::{AFTER_END, Pair, config, disk, map};
use crate::engine::Config;
use crate::engine::xen_stream::{PAGE, record as kinds};

const PFNS: u64 = 200;
const DISK_PAGES: u64 = 150;

/// What a page holds when a pass comes to it.
#[derive(Clone, Copy, Debug)]
enum Content {
    Zero,
    /// What its hint says, if it has one.
    AsHinted,
    OnDisk(u64),
    Other(u64),
    PageTable(u8, u64),
    NoData(u8),
}

/// What happens between two records.
#[derive(Clone, Debug)]
enum Event {
    Pause,
    /// Somebody else writes to the disk.
    DiskWrite(u64),
    LoseSide,
    CatchUp,
    Drain,
}

#[derive(Clone, Debug)]
struct Plan {
    /// PFN -> disk page; right or wrong.
    hints: Vec<(u64, u64)>,
    first: Vec<Content>,
    later: Vec<Vec<(u64, Content)>>,
    batch: usize,
    events: Vec<(usize, Event)>,
    window_pages: u64,
    passes: u32,
    ahead_bytes: u64,
    drain_timeout: Duration,
    verify: bool,
    pvh: bool,
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        2 => Just(Content::Zero),
        8 => Just(Content::AsHinted),
        3 => (0..DISK_PAGES).prop_map(Content::OnDisk),
        2 => (0_u64..50).prop_map(Content::Other),
        1 => (prop_oneof![1_u8..5, 9_u8..13], 0..DISK_PAGES).prop_map(|(t, p)| Content::PageTable(t, p)),
        1 => (13_u8..16).prop_map(Content::NoData),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => Just(Event::Pause),
        6 => (0..DISK_PAGES).prop_map(Event::DiskWrite),
        1 => Just(Event::LoseSide),
        2 => Just(Event::CatchUp),
        2 => Just(Event::Drain),
    ]
}

prop_compose! {
    fn plan()(
        hints in proptest::collection::vec((0..PFNS, 0..DISK_PAGES + 10), 0..300),
        first in proptest::collection::vec(content(), PFNS as usize),
        later in proptest::collection::vec(proptest::collection::vec((0..PFNS, content()), 1..40), 0..4),
        batch in 1_usize..64,
        events in proptest::collection::vec((0_usize..60, event()), 0..8),
        window_pages in prop_oneof![Just(0_u64), 1_u64..16, 16_u64..150, Just(1000)],
        passes in prop_oneof![3 => Just(1_u32), 2 => Just(10)],
        ahead_bytes in prop_oneof![Just(0_u64), Just(100_000), Just(12 << 20)],
        no_patience in proptest::bool::weighted(0.2),
        (verify, pvh) in any::<(bool, bool)>(),
    ) -> Plan {
        let drain_timeout = if no_patience { Duration::ZERO } else { Duration::from_secs(20) };
        Plan { hints, first, later, batch, events, window_pages, passes, ahead_bytes, drain_timeout, verify, pvh }
    }
}

fn sent(pfn: u64, content: Content, plan: &Plan) -> Sent {
    // The last hint wins, as in the map.
    let hint = plan.hints.iter().rev().find(|hint| hint.0 == pfn).map(|hint| hint.1);
    match content {
        Content::Zero => Sent::page(pfn, vec![0; PAGE]),
        Content::AsHinted => Sent::page(pfn, hint.map_or_else(|| other_page(pfn), disk_page)),
        Content::OnDisk(page) => Sent::page(pfn, disk_page(page)),
        Content::Other(seed) => Sent::page(pfn, other_page(seed)),
        Content::PageTable(page_type, page) => Sent::typed(pfn, page_type, disk_page(page)),
        Content::NoData(page_type) => Sent::typed(pfn, page_type, Vec::new()),
    }
}

fn run(plan: &Plan) -> Result<(), TestCaseError> {
    let mut image = disk(DISK_PAGES);
    let config = Config {
        window_bytes: plan.window_pages * PAGE as u64,
        reference_passes: plan.passes,
        ahead_bytes: plan.ahead_bytes,
        drain_timeout: plan.drain_timeout,
        ..config()
    };
    let mut pair = Pair::simple(map(plan.hints.iter().copied()), &image, config);
    let mut passes = vec![(0..PFNS).map(|pfn| sent(pfn, plan.first[pfn as usize], plan)).collect::<Vec<_>>()];
    for pass in &plan.later {
        let ascending: std::collections::BTreeMap<_, _> = pass.iter().copied().collect();
        passes.push(ascending.into_iter().map(|(pfn, content)| sent(pfn, content, plan)).collect());
    }
    let mut stream = if plan.pvh { beginning_pvh() } else { beginning() };
    pair.write(&stream);
    let (mut step, mut referenced_at_drain) = (0, None);
    for (round, pass) in passes.iter().enumerate() {
        pair.source.enter_round(round as u32);
        for batch in pass.chunks(plan.batch) {
            for (_, event) in plan.events.iter().filter(|event| event.0 == step) {
                match event {
                    Event::Pause => std::thread::sleep(Duration::from_millis(2)),
                    Event::DiskWrite(page) => {
                        image.seek(SeekFrom::Start(page * PAGE as u64)).unwrap();
                        image.write_all(&other_page(1000 + page)).unwrap();
                    }
                    Event::LoseSide => pair.side.shutdown(Shutdown::Both).unwrap(),
                    Event::CatchUp => pair.source.catch_up().recv().unwrap(),
                    Event::Drain => {
                        let report = pair.source.drain().unwrap();
                        let stats = pair.source.stats();
                        prop_assert_eq!(stats.references_outstanding, 0, "{:?}", report);
                        prop_assert_eq!(stats.bytes_in, stream.len() as u64);
                        referenced_at_drain = Some(stats.pages_referenced);
                    }
                }
            }
            step += 1;
            let bytes = page_data(batch);
            pair.write(&bytes);
            stream.extend(bytes);
        }
    }
    let mut rest = Vec::new();
    if plan.verify {
        rest.extend(record(kinds::VERIFY, &[]));
        let last: std::collections::BTreeMap<_, _> =
            passes.iter().flatten().map(|sent| (sent.entry.pfn, sent.clone())).collect();
        rest.extend(page_data(&last.into_values().collect::<Vec<_>>()));
    }
    rest.extend(ending());
    pair.write(&rest);
    stream.extend(rest);
    let outcome = pair.finish();
    let source = outcome.source.map_err(|e| TestCaseError::fail(format!("source: {e}")))?.stats;
    let target = outcome.target.map_err(|e| TestCaseError::fail(format!("target: {e}")))?.stats;
    let (expected, found) = (restore(&stream), restore(&outcome.stream));
    prop_assert!(found.verify_mismatches.is_empty(), "{:?}", found.verify_mismatches);
    for (pfn, page) in &expected.memory {
        prop_assert!(found.memory.get(pfn) == Some(page), "PFN {} differs", pfn);
    }
    prop_assert!(found == expected);
    prop_assert_eq!(outcome.left_on_wire.as_slice(), AFTER_END);
    prop_assert_eq!(source.bytes_in, stream.len() as u64);
    prop_assert_eq!(source.pages_in, source.pages_raw + source.pages_zero + source.pages_referenced);
    prop_assert_eq!(
        source.pages_referenced,
        source.references_accepted
            + source.references_refused
            + source.references_superseded
            + source.references_replaced
    );
    prop_assert_eq!(referenced_at_drain.unwrap_or(source.pages_referenced), source.pages_referenced);
    prop_assert!(source.references_outstanding_peak <= plan.window_pages);
    prop_assert_eq!(source.pages_referenced, target.references);
    prop_assert_eq!((source.references_outstanding, target.references_outstanding), (0, 0));
    prop_assert_eq!(source.bytes_out, target.bytes_in);
    prop_assert_eq!(target.bytes_out, outcome.stream.len() as u64);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn memory_is_what_the_save_wrote(plan in plan()) {
        run(&plan)?;
    }
}
