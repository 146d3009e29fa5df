//! The device's calls: every field of every argument, and what is left when one fails.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a test says what it holds by its name, and ends where it cannot go on"
)]

mod fake;

use enlightenment::ABI_VERSION;
use enlightenment::device::{
    ADD, Add, BEGIN, Begin, MAX_ADD, PUBLISH, Publish, STATS, STATS_FIRST, Stats, UserRun, WITHDRAW,
};
use fake::{ARGUMENT, ARRAY, FIRST_USER_PFN, Machine, PID};
use kernel_module::Errno;
use proptest::prelude::*;

const ADDRESS: u64 = 0x4000_0000;

fn good_run() -> UserRun {
    UserRun { address: ADDRESS, disk_offset: 8192, vdev: 51712, pages: 2, list: 1, reserved: 0 }
}

fn machine() -> Machine {
    let mut machine = Machine::new(false);
    machine.fake.map(ADDRESS, &[FIRST_USER_PFN, FIRST_USER_PFN + 9]);
    machine
}

fn add(generation: u64) -> Add {
    Add { generation, runs: ARRAY, count: 1, pid: PID, pages_listed: 7, pages_unmapped: 7 }
}

#[test]
fn begin_takes_this_version_and_no_flag() {
    let mut machine = machine();
    for version in [0, ABI_VERSION + 1, u32::MAX] {
        let begin = Begin { version, flags: 0, generation: 0 };
        assert_eq!(machine.begin_as(begin), Err(Errno::EPROTONOSUPPORT));
    }
    let begin = Begin { version: ABI_VERSION, flags: 4, generation: 0 };
    assert_eq!(machine.begin_as(begin), Err(Errno::EINVAL));
    let (first, second) = (machine.begin(), machine.begin());
    assert!(0 < first && first < second);
    machine.stop();
}

#[test]
fn a_number_that_cannot_be_told_is_not_open() {
    let mut machine = machine();
    machine.fake.writes_left = Some(0);
    let begin = Begin { version: ABI_VERSION, flags: 0, generation: 0 };
    assert_eq!(machine.begin_as(begin), Err(Errno::EFAULT));
    machine.fake.writes_left = None;
    for generation in 0..8 {
        let publish = Publish { generation, ..Publish::default() };
        assert_eq!(machine.publish_as(publish), Err(Errno::ESTALE));
    }
    machine.stop();
}

#[test]
fn add_checks_its_fields() {
    let mut machine = machine();
    assert_eq!(machine.add(1, &[good_run()]), Err(Errno::ESTALE));
    let generation = machine.begin();
    for stale in [0, generation - 1, generation + 1, u64::MAX] {
        assert_eq!(machine.add(stale, &[good_run()]), Err(Errno::ESTALE));
    }
    for count in [MAX_ADD + 1, u32::MAX] {
        assert_eq!(machine.add_as(Add { count, ..add(generation) }), Err(Errno::E2BIG));
    }
    for pid in [0, -1, PID + 1, i32::MIN, i32::MAX] {
        assert_eq!(machine.add_as(Add { pid, ..add(generation) }), Err(Errno::ESRCH));
    }
    for runs in [0, ARRAY + 1, u64::MAX, u64::MAX - 23] {
        assert_eq!(machine.add_as(Add { runs, ..add(generation) }), Err(Errno::EFAULT));
    }
    assert_eq!(machine.add_as(Add { count: MAX_ADD, ..add(generation) }), Err(Errno::EFAULT));
    assert_eq!(machine.add_as(Add { count: 0, ..add(generation) }), Ok((0, 0)));
    assert_eq!(machine.stats().list_pages, 1);
    assert_eq!(machine.add(generation, &[good_run()]), Ok((2, 0)));
    machine.stop();
}

#[test]
fn add_checks_each_run_and_takes_all_back() {
    let good = good_run();
    let bad = [
        UserRun { pages: 0, ..good },
        UserRun { address: ADDRESS + 1, ..good },
        UserRun { address: ADDRESS + 2048, ..good },
        UserRun { address: 1 << 56, ..good },
        UserRun { address: (1 << 56) - 4096, ..good },
        UserRun { address: !4095, ..good },
        UserRun { disk_offset: 1, ..good },
        UserRun { disk_offset: 256, ..good },
        UserRun { disk_offset: !511, ..good },
        UserRun { list: 0, ..good },
        UserRun { list: 3, ..good },
        UserRun { list: 255, ..good },
        UserRun { reserved: 1, ..good },
    ];
    for bad in bad {
        for at in [0, 1, 127, 128, 129, 400] {
            let mut machine = machine();
            let generation = machine.begin();
            machine.add(generation, &[good]).unwrap();
            let before = machine.stats();
            let mut runs = vec![good; 401];
            runs[at] = bad;
            assert_eq!(machine.add(generation, &runs), Err(Errno::EINVAL), "{bad:?} at {at}");
            assert_eq!(machine.stats(), before);
            machine.fake.root = None;
            machine.publish(generation, Vec::new());
            machine.fake.root = Some(before.root_pfn);
            assert_eq!(machine.fake.read_active().unwrap().0.runs, 2);
            machine.stop();
        }
    }
}

#[test]
fn a_result_that_cannot_be_told_is_taken_back() {
    let mut machine = machine();
    let generation = machine.begin();
    let before = machine.stats();
    machine.fake.writes_left = Some(0);
    assert_eq!(machine.add(generation, &[good_run(); 1000]), Err(Errno::EFAULT));
    machine.fake.writes_left = None;
    assert_eq!(machine.stats(), before);
    machine.stop();
}

#[test]
fn a_caller_that_is_killed_leaves_nothing() {
    let mut machine = machine();
    let generation = machine.begin();
    let before = machine.stats();
    machine.fake.killed = true;
    assert_eq!(machine.add(generation, &[good_run()]), Err(Errno::EINTR));
    assert_eq!((machine.stats(), machine.fake.held), (before, 0));
    machine.stop();
}

#[test]
fn only_the_open_generation_is_published_and_only_once() {
    let mut machine = machine();
    assert_eq!(machine.publish_as(Publish::default()), Err(Errno::ESTALE));
    let dropped = machine.begin();
    machine.add(dropped, &[good_run()]).unwrap();
    let generation = machine.begin();
    for stale in [0, dropped, generation + 1] {
        let publish = Publish { generation: stale, ..Publish::default() };
        assert_eq!(machine.publish_as(publish), Err(Errno::ESTALE));
    }
    assert!(machine.fake.view().unwrap().active.is_none());
    machine.publish(generation, Vec::new());
    let again = Publish { generation, ..Publish::default() };
    assert_eq!(machine.publish_as(again), Err(Errno::ESTALE));
    assert_eq!(machine.stats().generations, 1);
    machine.stop();
}

#[test]
fn the_probe_s_counts_are_handed_on() {
    let mut machine = machine();
    let generation = machine.begin();
    machine.fake.published.insert(generation, Vec::new());
    let publish = Publish {
        generation,
        answers: 0,
        frames_read: 11,
        frames_written: 12,
        pool_frames_clean: 13,
        pool_frames: u64::MAX,
    };
    machine.publish_as(publish).unwrap();
    let view = machine.fake.view().unwrap();
    let slot = view.active.unwrap();
    assert_eq!((slot.frames_read, slot.frames_written), (11, 12));
    assert_eq!((view.pool_frames_clean, view.pool_frames), (13, u64::MAX));
    assert_eq!(view.instance, 0x5eed);
    machine.stop();
}

#[test]
fn closing_drops_what_is_open_and_keeps_what_is_published() {
    let mut machine = machine();
    let generation = machine.begin();
    machine.publish(generation, Vec::new());
    let open = machine.begin();
    machine.add(open, &[good_run(); 500]).unwrap();
    machine.module.close(&mut machine.fake);
    assert_eq!(machine.stats().list_pages, 1);
    assert_eq!(machine.fake.view().unwrap().active.unwrap().generation, generation);
    assert_eq!(machine.add(open, &[good_run()]), Err(Errno::ESTALE));
    machine.stop();
}

#[test]
fn withdrawing_frees_all_lists() {
    let mut machine = machine();
    for _ in 0..3 {
        let generation = machine.begin();
        machine.fake.root = None;
        machine.add(generation, &[good_run(); 500]).unwrap();
        machine.publish(generation, Vec::new());
    }
    let open = machine.begin();
    machine.add(open, &[good_run(); 500]).unwrap();
    machine.withdraw();
    machine.fake.root = Some(machine.stats().root_pfn);
    assert!(machine.fake.view().unwrap().active.is_none());
    assert_eq!((machine.stats().list_pages, machine.fake.pages_held()), (1, 1));
    assert_eq!(machine.add(open, &[good_run()]), Err(Errno::ESTALE));
    assert!(machine.begin() > open);
    machine.stop();
}

#[test]
fn unknown_requests_are_refused() {
    let mut machine = machine();
    for command in [0, BEGIN + 1, BEGIN ^ 1 << 30, STATS ^ 1 << 31, WITHDRAW | 1 << 16, u32::MAX] {
        assert_eq!(machine.call(command), Err(Errno::ENOTTY), "{command:#x}");
    }
    for command in [BEGIN, ADD, PUBLISH, STATS] {
        for address in [0, ARGUMENT + 250, u64::MAX, u64::MAX - 15] {
            let result = machine.module.ioctl(&mut machine.fake, command, address);
            assert_eq!(result, Err(Errno::EFAULT), "{command:#x} at {address:#x}");
        }
    }
    machine.stop();
}

proptest! {
    /// Whatever a caller sends, in whatever order: no panic, no leak, and what dom0 reads is whole.
    #[test]
    fn any_bytes_in_any_order_do_no_harm(
        calls in prop::collection::vec(
            (0_usize..8, prop::collection::vec(prop_oneof![Just(0_u64), 1_u64..8, Just(ARRAY), any::<u64>()], 6), 0_u32..300),
            1..40,
        ),
        array in prop::collection::vec(any::<u8>(), 0..4096),
    ) {
        let mut machine = machine();
        let root = machine.fake.root.take();
        let good = fake::user_run_bytes(&good_run()).repeat(300);
        for (what, words, count) in calls {
            machine.fake.put(ARRAY, if count % 2 == 0 { &good } else { &array });
            let generation = words[0];
            let _ = match what {
                0 => machine.begin_as(Begin { version: ABI_VERSION, flags: 0, generation }).map(drop),
                1 => machine.add_as(Add { count, runs: ARRAY, ..add(generation) }).map(drop),
                2 => machine.publish_as(Publish { generation, answers: words[1], ..Publish::default() }),
                3 => machine.call(WITHDRAW),
                4 => { machine.module.close(&mut machine.fake); Ok(()) }
                5 => machine.add_as(Add { count, runs: words[1], pid: words[2] as i32, ..add(generation) }).map(drop),
                6 => machine.begin_as(Begin { version: words[1] as u32, flags: words[2] as u32, generation }).map(drop),
                _ => machine.call(words[3] as u32),
            };
            machine.fake.root = root;
            machine.fake.read_active();
            machine.fake.root = None;
            prop_assert_eq!(machine.stats().list_pages, machine.fake.pages_held() as u64);
        }
        machine.stop();
    }
}

#[test]
fn a_program_of_the_first_release_gets_the_counters_that_it_knows() {
    let mut machine = machine();
    let generation = machine.begin();
    machine.add(generation, &[good_run()]).unwrap();
    let stats = machine.stats();
    machine.fake.put(ARGUMENT, &[0xAA; 256]);
    machine.call(STATS_FIRST).unwrap();
    let bytes = machine.fake.user[&ARGUMENT].clone();
    assert_eq!(u64::from_le_bytes(bytes[48..56].try_into().unwrap()), stats.root_pfn);
    assert!(
        bytes[Stats::FIRST_SIZE..].iter().all(|byte| *byte == 0xAA),
        "more was written than it has room for"
    );
    // Its argument may end where its mapping ends.
    machine.fake.put(ARGUMENT, &[0; Stats::FIRST_SIZE]);
    machine.call(STATS_FIRST).unwrap();
    assert_eq!(machine.call(STATS), Err(Errno::EFAULT));
    machine.fake.put(ARGUMENT, &[0; 256]);
    machine.stop();
}
