//! What is written into list pages is what dom0 reads, at every moment.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a test says what it holds by its name, and ends where it cannot go on"
)]

mod fake;

use enlightenment::device::UserRun;
use enlightenment::list::{LEAVES_PER_INDEX, RUNS_PER_LEAF};
use enlightenment::{PAGE_SIZE, Run};
use fake::{FIRST_USER_PFN, Machine, expected_pages, pages_of};
use kernel_module::NOT_RAM;
use proptest::prelude::*;

const PAGE: u64 = PAGE_SIZE as u64;

fn run_at(address: u64, pages: u16, disk_offset: u64) -> UserRun {
    UserRun { address, disk_offset, vdev: 51712, pages, list: 1, reserved: 0 }
}

/// Runs of one page each that cannot be merged, at neighbouring addresses.
fn scattered(machine: &mut Machine, count: u64, salt: u64) -> (Vec<UserRun>, Vec<Run>) {
    let address = 0x4000_0000;
    let pfns: Vec<u64> = (0..count).map(|i| FIRST_USER_PFN + 2 * i).collect();
    machine.fake.map(address, &pfns);
    let runs: Vec<UserRun> = (0..count).map(|i| run_at(address + i * PAGE, 1, (i + salt) * 16384)).collect();
    let listed = pfns
        .iter()
        .zip(&runs)
        .map(|(pfn, run)| Run {
            pfn: *pfn,
            disk_offset: run.disk_offset,
            vdev: run.vdev,
            pages: 1,
            list: 1,
            reserved: 0,
        })
        .collect();
    (runs, listed)
}

/// A frame to be listed.
#[derive(Clone, Debug)]
struct Frame {
    /// Its address, in pages.
    place: u64,
    /// `None`: not mapped; `u64::MAX`: no ordinary memory.
    pfns: Vec<Option<u64>>,
    /// Its place on disk, in pages.
    offset: u64,
    vdev: u32,
    list: u8,
}

fn frames() -> impl Strategy<Value = Vec<Frame>> {
    let pfn = prop_oneof![
        6 => (0_u64..64).prop_map(Some),
        1 => Just(None),
        1 => Just(Some(u64::MAX)),
    ];
    // Neighbouring PFNs and offsets must be common, or nothing would ever merge.
    let pfns = prop_oneof![
        (0_u64..64, 1_usize..9)
            .prop_map(|(first, count)| (0..count as u64).map(|i| Some(first + i)).collect()),
        prop::collection::vec(pfn, 1..9),
    ];
    let frame = (0_u64..40, pfns, 0_u64..64, 51712_u32..51714, 1_u8..3)
        .prop_map(|(place, pfns, offset, vdev, list)| Frame { place, pfns, offset, vdev, list });
    prop::collection::vec(frame, 0..700)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_pages_that_dom0_reads_are_those_that_were_added(frames in frames(), calls in 1_usize..5) {
        let mut machine = Machine::new(false);
        let mut runs = Vec::new();
        for Frame { place, pfns, offset, vdev, list } in frames {
            let address = 0x5000_0000 + place * PAGE;
            for (i, pfn) in pfns.iter().enumerate() {
                if let Some(pfn) = pfn {
                    let pfn = if *pfn == u64::MAX { NOT_RAM } else { FIRST_USER_PFN + pfn };
                    machine.fake.map(address + i as u64 * PAGE, &[pfn]);
                }
            }
            let disk_offset = offset * PAGE;
            runs.push(UserRun { address, disk_offset, vdev, pages: pfns.len() as u16, list, reserved: 0 });
        }
        let expected = expected_pages(&machine.fake, &runs);
        let generation = machine.begin();
        let (mut listed, mut unmapped) = (0, 0);
        for part in runs.chunks(runs.len().div_ceil(calls).max(1)) {
            let (more_listed, more_unmapped) = machine.add(generation, part).unwrap();
            listed += more_listed;
            unmapped += more_unmapped;
        }
        let asked: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
        prop_assert_eq!(listed, expected.len() as u64);
        prop_assert_eq!(listed + unmapped, asked);
        machine.fake.root = None;
        machine.publish(generation, Vec::new());
        machine.fake.root = Some(machine.stats().root_pfn);
        let (slot, read) = machine.fake.read_active().unwrap();
        let read_pages = read.iter().filter(|run| run.list == 1).map(|run| u64::from(run.pages)).sum::<u64>();
        prop_assert_eq!(slot.pages_read, read_pages);
        prop_assert_eq!(slot.pages_read + slot.pages_written, listed);
        prop_assert_eq!(pages_of(&read), expected);
        machine.stop();
    }
}

#[test]
fn neighbours_become_one_run() {
    let mut machine = Machine::new(false);
    let pfns: Vec<u64> = (0..64).map(|i| FIRST_USER_PFN + i).collect();
    machine.fake.map(0x4000_0000, &pfns);
    // 16 frames of four pages that adjoin in memory and on disk, in one call each.
    let generation = machine.begin();
    for frame in 0..16 {
        let at = frame * 4 * PAGE;
        assert_eq!(machine.add(generation, &[run_at(0x4000_0000 + at, 4, at)]), Ok((4, 0)));
    }
    let one = Run { pfn: FIRST_USER_PFN, disk_offset: 0, vdev: 51712, pages: 64, list: 1, reserved: 0 };
    machine.publish(generation, vec![one]);
    assert_eq!(machine.fake.read_active().unwrap().1, [one]);
    // Another list, another disk, a gap on disk, a gap in memory: each begins a run.
    let generation = machine.begin();
    let runs = [
        run_at(0x4000_0000, 1, 0),
        UserRun { list: 2, ..run_at(0x4000_0000 + PAGE, 1, PAGE) },
        UserRun { vdev: 51728, list: 2, ..run_at(0x4000_0000 + 2 * PAGE, 1, 2 * PAGE) },
        UserRun { vdev: 51728, list: 2, ..run_at(0x4000_0000 + 3 * PAGE, 1, 4 * PAGE) },
        UserRun { vdev: 51728, list: 2, ..run_at(0x4000_0000 + 5 * PAGE, 1, 5 * PAGE) },
    ];
    machine.add(generation, &runs).unwrap();
    let listed = runs
        .iter()
        .map(|run| Run {
            pfn: FIRST_USER_PFN + (run.address - 0x4000_0000) / PAGE,
            disk_offset: run.disk_offset,
            vdev: run.vdev,
            pages: 1,
            list: run.list,
            reserved: 0,
        })
        .collect();
    machine.publish(generation, listed);
    assert_eq!(machine.fake.read_active().unwrap().0.runs, 5);
    machine.stop();
}

#[test]
fn a_run_never_gets_longer_than_its_field() {
    let mut machine = Machine::new(false);
    let pfns: Vec<u64> = (0..70_000).map(|i| FIRST_USER_PFN + i).collect();
    machine.fake.map(0x4000_0000, &pfns);
    let generation = machine.begin();
    let runs = [(0, 60_000), (60_000, 5_535), (65_535, 4_465)]
        .map(|(first, pages)| run_at(0x4000_0000 + first * PAGE, pages, first * PAGE));
    machine.fake.root = None;
    assert_eq!(machine.add(generation, &runs), Ok((70_000, 0)));
    machine.publish(generation, Vec::new());
    machine.fake.root = Some(machine.stats().root_pfn);
    let (_, listed) = machine.fake.read_active().unwrap();
    assert_eq!(listed.iter().map(|run| run.pages).collect::<Vec<_>>(), [65_535, 4_465]);
    machine.stop();
}

#[test]
fn adjoining_frames_are_translated_together() {
    let mut machine = Machine::new(false);
    let (runs, _) = scattered(&mut machine, 1024, 0);
    let generation = machine.begin();
    machine.add(generation, &runs).unwrap();
    // 128 runs are copied at once, and each such part is one batch.
    assert_eq!(machine.fake.translations, 8);
    machine.stop();
}

#[test]
fn one_who_reads_meanwhile_has_the_old_generation_whole() {
    let mut machine = Machine::new(false);
    // Longer and shorter ones by turns, so that pages are used again, added and given back. `Fake` reads all before each step.
    for (turn, count) in [400, 3, 900, 0, 171, 170, 1200, 1].into_iter().enumerate() {
        let (runs, listed) = scattered(&mut machine, count, turn as u64);
        let generation = machine.begin();
        for part in runs.chunks(100) {
            machine.add(generation, part).unwrap();
        }
        machine.publish(generation, listed);
        assert_eq!(machine.fake.view().unwrap().active.unwrap().generation, generation);
    }
    assert!(machine.fake.observations.get() > 2500, "{}", machine.fake.observations.get());
    machine.stop();
}

#[test]
fn one_who_reads_on_is_never_deceived() {
    let (mut whole, mut noticed) = (0, 0);
    for counts in [[300, 300, 300], [600, 10, 10], [10, 10, 600], [350, 2, 171]] {
        let mut machine = Machine::new(false);
        let (runs, listed) = scattered(&mut machine, counts[0], 0);
        let generation = machine.begin();
        machine.add(generation, &runs).unwrap();
        machine.publish(generation, listed);
        let slot = machine.fake.view().unwrap().active.unwrap();
        *machine.fake.late_reader.borrow_mut() = Some((generation, slot));
        for (turn, count) in counts[1..].iter().enumerate() {
            let before = machine.fake.late.get().1;
            let (runs, listed) = scattered(&mut machine, *count, 7 * count);
            let generation = machine.begin();
            machine.add(generation, &runs).unwrap();
            machine.publish(generation, listed);
            if turn == 0 {
                assert_eq!(machine.fake.late.get().1, before, "one generation later it is still whole");
            }
        }
        machine.withdraw();
        whole += machine.fake.late.get().0;
        noticed += machine.fake.late.get().1;
        machine.stop();
    }
    assert!(whole > 300 && noticed > 1000, "whole {whole}, noticed {noticed}");
}

/// Adds `first` runs, then as many more as makes `total` with every number of pages that does not suffice; returns that number.
fn fill_until_it_fits(first: usize, total: usize) -> usize {
    for budget in 0.. {
        let mut machine = Machine::new(false);
        let (runs, listed) = scattered(&mut machine, 200, 0);
        let generation = machine.begin();
        machine.add(generation, &runs).unwrap();
        machine.publish(generation, listed.clone());
        let (more, more_listed) = scattered(&mut machine, total as u64, 1);
        let generation = machine.begin();
        let root = machine.fake.root.take();
        for part in more[..first].chunks(50_000) {
            machine.add(generation, part).unwrap();
        }
        let before = (machine.stats(), machine.fake.pages_held());
        machine.fake.allocations_left = Some(budget);
        let result = machine.add(generation, &more[first..]);
        machine.fake.allocations_left = None;
        machine.fake.root = root;
        assert_eq!(machine.fake.read_active().unwrap().1, listed);
        if result.is_ok() {
            machine.publish(generation, more_listed);
            machine.stop();
            return budget;
        }
        assert_eq!(result, Err(kernel_module::Errno::ENOMEM));
        assert_eq!((machine.stats(), machine.fake.pages_held()), before);
        // What was there before is kept, and more can be added once there is memory again.
        machine.fake.root = None;
        machine.add(generation, &more[first..first + 300]).unwrap();
        machine.fake.root = root;
        machine.publish(generation, more_listed[..first + 300].to_vec());
        machine.stop();
    }
    unreachable!("a budget that suffices is found")
}

#[test]
fn memory_that_ends_at_any_point_leaves_the_lists_as_they_were() {
    // From the first leaf on; 12 leaves in all.
    assert_eq!(fill_until_it_fits(10, 2000), 11);
    // From the very first page on: an index page and a leaf.
    assert_eq!(fill_until_it_fits(0, 400), 4);
    // Across the end of the first index page: a leaf, then a leaf with the second index page, then a leaf.
    let full = (LEAVES_PER_INDEX - 1) * RUNS_PER_LEAF;
    assert_eq!(fill_until_it_fits(full, full + 3 * RUNS_PER_LEAF), 4);
}

#[test]
fn no_root_page_no_module() {
    let mut fake = fake::Fake::new();
    fake.allocations_left = Some(0);
    let mut module = kernel_module::Module::new();
    assert_eq!(module.start(&mut fake, true), Err(kernel_module::Errno::ENOMEM));
    assert!(fake.xenstore.is_empty() && fake.ports.is_empty());
}

/// The size that `enlightenment::list` promises: a frame of four neighbouring pages takes 24 bytes, and in the worst measured
/// case (12 % of the frames in four pieces) 32.6; index pages add 8 in 4,096.
#[test]
fn bytes_a_frame_are_as_promised() {
    const FRAMES: u64 = 40_000;
    for (broken_of_100, most) in [(0, 24.4), (12, 33.1)] {
        let mut machine = Machine::new(false);
        machine.fake.root = None;
        let mut runs = Vec::new();
        for frame in 0..FRAMES {
            let broken = frame % 100 < broken_of_100;
            let first = FIRST_USER_PFN + frame * 16;
            let pfns: Vec<u64> = (0..4).map(|page| first + page * if broken { 2 } else { 1 }).collect();
            let address = 0x4000_0000 + frame * 4 * PAGE;
            machine.fake.map(address, &pfns);
            // No two frames adjoin on disk: nothing but a frame's own pages can merge.
            runs.push(run_at(address, 4, frame * 32768));
        }
        let generation = machine.begin();
        machine.add(generation, &runs).unwrap();
        machine.publish(generation, Vec::new());
        let bytes = (machine.stats().list_pages * PAGE) as f64 / FRAMES as f64;
        assert!(bytes < most, "{bytes} bytes a frame with {broken_of_100} % broken");
        machine.stop();
    }
}

/// 1 TiB of frames of four pages each, by arithmetic.
#[test]
fn a_tebibyte_fits_its_index() {
    let frames = (1_u64 << 40) / 16_384;
    let leaves = frames.div_ceil(RUNS_PER_LEAF as u64);
    let indexes = leaves.div_ceil(LEAVES_PER_INDEX as u64);
    assert_eq!((leaves, indexes), (394_759, 776));
    assert!(u32::try_from(indexes).is_ok());
}
