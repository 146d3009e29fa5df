//! Whole migrations that go well.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use super::guest_stream::{
    Sent, beginning, beginning_pvh, disk_page, ending, other_page, page_data, record, restore,
};
use super::pair::{AFTER_END, Pair, collect, config, disk, map, only, plain_source, plain_target};
use crate::engine::memory_record;
use crate::engine::xen_stream::{PAGE, PageData, XALLOC, record as kinds};
use crate::engine::{
    Config, LateWrites, ReferenceMap, SourceFilter, SourceParts, TargetFilter, TargetParts, Way,
};

/// 64 pages: zeros, pages on the disk, others, page tables, unpopulated ones.
fn first_pass() -> Vec<Sent> {
    (0..64_u64)
        .map(|pfn| match pfn {
            0..=7 => Sent::page(pfn, vec![0; PAGE]),
            8..=31 => Sent::page(pfn, disk_page(pfn)),
            32..=39 => Sent::typed(pfn, [1, 2, 3, 4, 9, 10, 11, 12][pfn as usize - 32], disk_page(pfn)),
            40..=55 => Sent::page(pfn, other_page(pfn)),
            56 => Sent::typed(pfn, 13, Vec::new()),
            57 => Sent::typed(pfn, 14, Vec::new()),
            _ => Sent::typed(pfn, 15, Vec::new()),
        })
        .collect()
}

/// A stream: passes, and VERIFY with the last state of all pages.
fn whole_stream(passes: &[Vec<Sent>], verify: bool) -> Vec<u8> {
    let mut stream = beginning();
    let mut last = std::collections::BTreeMap::new();
    for pass in passes {
        for batch in pass.chunks(13) {
            stream.extend(page_data(batch));
        }
        last.extend(pass.iter().map(|sent| (sent.entry.pfn, sent.clone())));
    }
    if verify {
        stream.extend(record(kinds::VERIFY, &[]));
        stream.extend(page_data(&last.into_values().collect::<Vec<_>>()));
    }
    stream.extend(ending());
    stream
}

#[test]
fn the_target_is_told_which_pages_were_written_after_the_suspension() {
    let disk = disk(8);
    let pair = Pair::simple(map([(3, 3)]), &disk, Config { compare: true, ..config() });
    let same = [Sent::page(1, other_page(1)), Sent::page(2, vec![0; PAGE]), Sent::page(3, disk_page(3))];
    let mut stream = beginning();
    stream.extend(page_data(&[&same[..], &[Sent::page(9, other_page(1))]].concat()));
    stream.extend(page_data(&[Sent::page(9, other_page(2))]));
    stream.extend(record(kinds::VERIFY, &[]));
    stream.extend(page_data(&[&same[..], &[Sent::page(9, other_page(3))]].concat()));
    stream.extend(ending());
    // libxenguest gets what libxenguest sent, and finds the page that differs.
    let outcome = pair.carry(&stream);
    assert_eq!(outcome.source.unwrap().stats.pages_written_late, 1);
    assert_eq!(outcome.target.unwrap().late_writes, LateWrites::new(vec![9]));
    assert_eq!(restore(&outcome.stream).verify_mismatches, [9]);
}

#[test]
fn pages_on_the_disk_go_by_reference() {
    let disk = disk(64);
    // Page tables are in the map too, and must not go by it.
    let pair = Pair::simple(map((8..40).map(|pfn| (pfn, pfn))), &disk, config());
    let second_pass = vec![Sent::page(8, other_page(1)), Sent::page(9, vec![0; PAGE])];
    let stream = whole_stream(&[first_pass(), second_pass], true);
    let outcome = pair.carry(&stream);
    let (source, target) = (outcome.source.unwrap(), outcome.target.unwrap());
    let found = restore(&outcome.stream);
    assert_eq!((found.verified, found.verify_mismatches.len()), (56, 0));
    assert_eq!(outcome.left_on_wire, AFTER_END);
    let stats = &source.stats;
    assert_eq!(stats.pages_in, 58);
    assert_eq!((stats.pages_zero, stats.pages_referenced, stats.pages_raw), (9, 24, 25));
    assert_eq!((stats.pages_page_table, stats.pages_without_data), (8, 8));
    assert_eq!((stats.pages_resent, stats.pages_verified, stats.rounds), (2, 56, 2));
    assert_eq!(stats.references_accepted + stats.references_superseded, 24);
    assert_eq!(
        (stats.references_refused, stats.references_replaced, stats.references_outstanding),
        (0, 0, 0)
    );
    assert_eq!(stats.bytes_in, stream.len() as u64);
    assert_eq!(stats.bytes_out, target.stats.bytes_in);
    assert_eq!(stats.bytes_page_data, (25 + 56) * 4096);
    assert_eq!(
        stats.bytes_out,
        stats.bytes_page_data + stats.bytes_references + stats.bytes_markers + stats.bytes_other
    );
    assert_eq!(target.stats.bytes_out, outcome.stream.len() as u64);
    assert_eq!((target.stats.references, target.stats.refused.total()), (24, 0));
    assert!(source.poolskip && target.poolskip);
    assert_eq!(source.disks, target.disks);
    assert_eq!(source.disks[0].size_bytes, 64 * 4096 + 512);
    for pfn in 0..65 {
        let way = match pfn {
            0..=7 | 9 => Way::Zero,
            8 => Way::Resent,
            10..=31 => Way::Accepted,
            32..=39 => Way::PageTable,
            40..=55 => Way::Raw,
            56..=63 => Way::NoData,
            _ => Way::Unseen,
        };
        assert_eq!(source.travel.way(pfn), way, "page {pfn}");
    }
    let ways = stats.ways;
    assert_eq!((ways.zero, ways.page_table, ways.raw, ways.resent), (9, 8, 16, 1));
    assert_eq!((ways.referenced, ways.accepted, ways.no_data), (24, stats.references_accepted, 8));
}

#[test]
fn without_a_side_channel_not_a_byte_changes() {
    let stream = whole_stream(&[first_pass()], true);
    let (mut from_save, source, wire) = plain_source(map((8..40).map(|pfn| (pfn, pfn))), config());
    let (target, to_restore) = plain_target(wire);
    let found = collect(to_restore);
    from_save.write_all(&stream).unwrap();
    drop(from_save);
    let found = found.join().unwrap();
    assert!(found == stream, "the stream has changed");
    let (source, target) = (source.finish().unwrap(), target.finish().unwrap());
    assert_eq!((source.stats.bytes_out, target.stats.bytes_out), (stream.len() as u64, stream.len() as u64));
    assert_eq!((source.stats.pages_in, source.stats.pages_raw), (56, 56));
    assert!(!source.poolskip && !target.poolskip);
}

#[test]
fn references_can_be_switched_off() {
    let disk = disk(64);
    let off = Config { references: false, ..config() };
    let pair = Pair::simple(map((8..40).map(|pfn| (pfn, pfn))), &disk, off);
    let stream = whole_stream(&[first_pass()], false);
    let outcome = pair.carry(&stream);
    let stats = outcome.source.unwrap().stats;
    assert_eq!((stats.pages_referenced, stats.pages_zero), (0, 8));
}

#[test]
fn a_run_without_data_is_one_marker() {
    let disk = disk(1);
    let pair = Pair::simple(map([]), &disk, config());
    let run: Vec<_> = (0..1024).map(|pfn| Sent::typed(pfn, 15, Vec::new())).collect();
    let mut stream = beginning();
    let before = stream.len();
    stream.extend(page_data(&run));
    let after = stream.len();
    stream.extend(ending());
    let outcome = pair.carry(&stream);
    let stats = outcome.source.unwrap().stats;
    assert_eq!(stats.bytes_in - stats.bytes_out, (after - before) as u64 - 56);
}

#[test]
fn wrong_hints_cost_time_and_nothing_else() {
    let disk = disk(64);
    // PFN and place are shifted against each other, some beyond the end of the disk.
    let pair = Pair::simple(map((0..64).map(|pfn| (pfn, pfn + 7))), &disk, config());
    let stream = whole_stream(&[first_pass()], true);
    let outcome = pair.carry(&stream);
    let found = restore(&outcome.stream);
    assert!(found.verify_mismatches.is_empty());
    let (source, target) = (outcome.source.unwrap().stats, outcome.target.unwrap().stats);
    assert_eq!((source.pages_referenced, source.references_refused), (40, 40));
    assert_eq!((source.refused, target.references_accepted), (target.refused, 0));
    assert_eq!(source.refused.hash, 40);
}

#[test]
fn places_beyond_the_disk_are_refused() {
    let disk = disk(10);
    let pair = Pair::simple(map((8..32).map(|pfn| (pfn, pfn))), &disk, config());
    let stream = whole_stream(&[first_pass()], true);
    let outcome = pair.carry(&stream);
    let source = outcome.source.unwrap().stats;
    assert_eq!((source.references_accepted, source.refused.out_of_bounds), (2, 22));
}

#[test]
fn a_tiny_window_lets_pages_go_raw() {
    let disk = disk(64);
    let tiny = Config { window_bytes: 2 * 4096, ..config() };
    let pair = Pair::simple(map((8..32).map(|pfn| (pfn, pfn))), &disk, tiny);
    let stream = whole_stream(&[first_pass()], true);
    let outcome = pair.carry(&stream);
    let source = outcome.source.unwrap().stats;
    assert!(source.pages_window_full > 0 && source.references_outstanding_peak <= 2, "{source:?}");
    assert_eq!(source.pages_referenced + source.pages_window_full, 24);
}

/// Both filters, with the first pass written, of which all pages are listed; and what was written.
fn after_the_first_pass(disk: &tempfile::NamedTempFile) -> (Pair, Vec<u8>) {
    let mut pair = Pair::simple(map((0..64).map(|pfn| (pfn, pfn))), disk, config());
    pair.source.enter_round(0);
    let mut stream = beginning();
    stream.extend(page_data(&first_pass()));
    pair.write(&stream);
    (pair, stream)
}

#[test]
fn after_the_drain_all_is_in_libxenguests_hands_and_nothing_is_referred_to() {
    let disk = disk(64);
    let (mut pair, mut stream) = after_the_first_pass(&disk);
    let report = pair.source.drain().unwrap();
    assert!(report.synced, "{report:?}");
    assert_eq!(pair.target.stats().bytes_in, pair.source.stats().bytes_out);
    let stats = pair.source.stats();
    assert_eq!((stats.bytes_in, stats.references_outstanding), (stream.len() as u64, 0));
    assert_eq!((stats.pages_referenced, stats.references_accepted, stats.references_refused), (40, 24, 16));
    pair.source.suspended();
    // Pages that are in the map and on the disk, but after the drain; and zeros, which may still be markers.
    let last = [Sent::page(20, disk_page(20)), Sent::page(21, vec![0; PAGE]), Sent::page(60, disk_page(60))];
    pair.source.enter_round(1);
    let mut rest = page_data(&last);
    rest.extend(ending());
    pair.write(&rest);
    stream.extend(rest);
    let outcome = pair.finish();
    assert_eq!(restore(&outcome.stream), restore(&stream));
    let stats = outcome.source.unwrap().stats;
    assert_eq!((stats.pages_referenced, stats.pages_zero, stats.rounds), (40, 9, 2));
}

/// What a process holds when it ends has to be taken from it while the domain stands still.
#[test]
fn before_the_domain_is_suspended_memory_is_let_go_of() {
    let disk = disk(64);
    let (mut pair, mut stream) = after_the_first_pass(&disk);
    let (of_source, map) = pair.source.memory.clone();
    let of_target = pair.target.pool.clone();
    for pool in [&of_source, &of_target] {
        // As after a pass in which libxenguest, the network or the disk was slow.
        let all: Vec<_> = (0..5).map(|_| pool.take(1 << 20)).collect();
        drop(all);
    }
    pair.source.settle_references().unwrap();
    assert!(map.upgrade().is_none(), "nothing is looked up in it any more");
    assert!(of_source.free_bytes() >= 4 << 20, "one more pass is to come");
    assert!(pair.source.drain().unwrap().synced);
    assert_eq!(of_source.free_bytes(), 0);
    // That of the record that asked came back since, and maybe that of the one before.
    let left = of_target.free_bytes();
    assert!(left <= 2 * memory_record::MAX_BODY, "{left}");
    let rest = [page_data(&[Sent::page(20, disk_page(20))]), ending()].concat();
    pair.write(&rest);
    stream.extend(rest);
    let outcome = pair.finish();
    assert_eq!(restore(&outcome.stream), restore(&stream));
}

#[test]
fn references_are_settled_without_waiting_for_what_is_on_the_way() {
    let disk = disk(64);
    let (mut pair, mut stream) = after_the_first_pass(&disk);
    let report = pair.source.settle_references().unwrap();
    assert!(!report.synced, "{report:?}");
    assert_eq!(pair.source.stats().references_outstanding, 0);
    // One more pass while the domain runs: nothing of it is referred to.
    let last = page_data(&[Sent::page(20, disk_page(20)), Sent::page(60, disk_page(60))]);
    pair.write(&last);
    stream.extend(last);
    assert!(pair.source.drain().unwrap().synced);
    assert_eq!(pair.target.stats().bytes_in, pair.source.stats().bytes_out);
    pair.source.suspended();
    pair.write(&ending());
    stream.extend(ending());
    let outcome = pair.finish();
    assert_eq!(restore(&outcome.stream), restore(&stream));
    assert_eq!(outcome.source.unwrap().stats.pages_referenced, 40);
}

#[test]
fn an_empty_map_and_no_disk_still_save_zeros() {
    let mut pair = Pair::start(
        ReferenceMap::new(enlightenment::Pfn(super::pair::MAX_PFN)),
        Vec::new(),
        config(),
        config(),
    );
    let stream = whole_stream(&[first_pass()], false);
    let (before_end, end) = stream.split_at(stream.len() - 8);
    pair.write(before_end);
    assert_eq!(pair.source.drain().unwrap().outstanding, 0);
    pair.write(end);
    let outcome = pair.finish();
    assert_eq!(restore(&outcome.stream), restore(&stream));
    assert_eq!(outcome.source.unwrap().stats.pages_zero, 8);
}

/// libxenguest populates 2 MiB at once only for PFNs that come in order, so held pages must not leave holes.
#[test]
fn pvh_pages_are_allocated_in_order_before_they_are_loaded() {
    let disk = disk(64);
    let pair = Pair::simple(map((8..24).map(|pfn| (pfn, pfn))), &disk, config());
    let pass: Vec<_> = (0..32).map(|pfn| Sent::page(pfn, disk_page(pfn))).collect();
    let mut stream = beginning_pvh();
    let memory = stream.len();
    stream.extend(page_data(&pass));
    stream.extend(ending());
    let outcome = pair.carry(&stream);
    let record = &outcome.stream[memory..];
    let length = u32::from_le_bytes(record[4..8].try_into().unwrap()) as usize;
    let entries: Vec<_> = PageData::parse(&record[8..8 + length]).unwrap().entries().collect();
    assert!(entries.iter().map(|entry| entry.pfn).eq(0..32));
    assert!(entries.iter().all(|entry| (entry.page_type == XALLOC) == (8..24).contains(&entry.pfn)));
    assert_eq!(outcome.source.unwrap().stats.references_accepted, 16);
}

/// An HVM domain's stream: memory far above the guest's own (its display, Xen's special pages), holes, and the processors' state and the parameters
/// behind the memory. What its device model is belongs to libxl's stream, behind libxc's END: not a byte of that is taken.
#[test]
fn an_hvm_stream_goes_through_and_its_device_model_s_records_stay_behind_it() {
    let disk = disk(64);
    let pair = Pair::simple(map((8..24).map(|pfn| (pfn, pfn))), &disk, config());
    let (display, hole, special) = (0xf_0000, 0xf_1000, 0xf_eff8);
    let mut first: Vec<_> = (0..32).map(|pfn| Sent::page(pfn, disk_page(pfn))).collect();
    first.extend((display..display + 4).map(|pfn| Sent::page(pfn, other_page(pfn))));
    first.extend((hole..hole + 40).map(|pfn| Sent::typed(pfn, 15, Vec::new())));
    first.extend((special..special + 8).map(|pfn| Sent::page(pfn, vec![0; PAGE])));
    // The display is written to while the domain runs, and one of the special pages: by the device model, whose log libxenguest has joined.
    let second = [9, display + 1, special + 3].map(|pfn| Sent::page(pfn, other_page(7 * pfn)));
    let mut stream = beginning_pvh();
    stream.extend(page_data(&first));
    stream.extend(page_data(&second));
    // TSC_INFO, HVM_CONTEXT of many processors, HVM_PARAMS, END.
    for (kind, length) in [(8, 24), (9, 1_300_001), (0xa, 8 + 16 * 30), (kinds::END, 0)] {
        stream.extend(record(kind, &vec![kind as u8; length]));
    }
    let outcome = pair.carry(&stream);
    assert_eq!(outcome.left_on_wire, AFTER_END);
    let stats = outcome.source.unwrap().stats;
    assert_eq!((stats.pages_referenced, stats.pages_zero, stats.pages_without_data), (16, 8, 40));
}

/// As between two hosts: TCP for the stream and for the side channel, pipes towards libxenguest.
#[test]
fn tcp_and_pipes_do_as_well() {
    let tcp = || {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    };
    let (wire, side, disk) = (tcp(), tcp(), disk(64));
    let (save_end, mut save) = std::io::pipe().unwrap();
    let (mut restored, restore_end) = std::io::pipe().unwrap();
    let target = TargetFilter::start(TargetParts {
        from_wire: OwnedFd::from(wire.1),
        to_restore: OwnedFd::from(restore_end),
        side: Some(OwnedFd::from(side.1)),
        config: config(),
    })
    .unwrap();
    let source = SourceFilter::start(SourceParts {
        from_save: OwnedFd::from(save_end),
        to_wire: OwnedFd::from(wire.0),
        side: Some(OwnedFd::from(side.0)),
        map: map((8..40).map(|pfn| (pfn, pfn))),
        disks: only(&disk),
        config: config(),
    })
    .unwrap();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        restored.read_to_end(&mut all).unwrap();
        all
    });
    let stream = whole_stream(&[first_pass()], false);
    let (before_end, end) = stream.split_at(stream.len() - 8);
    save.write_all(before_end).unwrap();
    assert!(source.drain().unwrap().synced);
    save.write_all(end).unwrap();
    drop(save);
    let (source, target) = (source.finish().unwrap().stats, target.finish().unwrap().stats);
    assert_eq!(restore(&reader.join().unwrap()), restore(&stream));
    assert_eq!((source.references_accepted, target.references_accepted), (24, 24));
}
