//! Whatever fails, fails at every place where it can: nothing leaks, and dom0 never sees half a list.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a test says what it holds by its name, and ends where it cannot go on"
)]

mod fake;

use enlightenment::Run;
use enlightenment::device::{Publish, UserRun, WITHDRAW};
use enlightenment::xenstore;
use fake::{ARGUMENT, FIRST_USER_PFN, Fake, Machine, PID};
use kernel_module::{Errno, Module};

const ADDRESS: u64 = 0x4000_0000;
const PAGE: u64 = enlightenment::PAGE_SIZE as u64;
const PAGES: u64 = 800;

/// One page each; no two can be merged.
fn runs(salt: u64) -> (Vec<UserRun>, Vec<Run>) {
    (0..PAGES)
        .map(|page| {
            let disk_offset = (page + salt) * 16_384;
            let asked = UserRun {
                address: ADDRESS + page * PAGE,
                disk_offset,
                vdev: 51712,
                pages: 1,
                list: 1,
                reserved: 0,
            };
            let pfn = FIRST_USER_PFN + 2 * page;
            (asked, Run { pfn, disk_offset, vdev: 51712, pages: 1, list: 1, reserved: 0 })
        })
        .unzip()
}

/// Everything that a module does in its life, going on whatever fails, as a probe would that tries again. `Fake` reads the
/// published lists before each step, and panics if they are not whole.
fn live(machine: &mut Machine) {
    let Machine { fake, module } = machine;
    if module.start(fake, true).is_err() {
        return;
    }
    // Not by `stats`, which may be what fails.
    let failure = machine.fake.failure_after.take();
    machine.fake.root = Some(machine.stats().root_pfn);
    machine.fake.failure_after = failure;
    for turn in 1..=4_u64 {
        let request = format!("{turn} {}", ["snapshot", "begun", "ended", "snapshot"][turn as usize - 1]);
        machine.fake.xenstore.insert(xenstore::REQUEST.to_owned(), request);
        machine.module.watch_fired(&mut machine.fake);
        let _ = machine.module.read(&mut machine.fake, ARGUMENT, 16);
        let begin =
            enlightenment::device::Begin { version: enlightenment::ABI_VERSION, flags: 0, generation: 0 };
        let Ok(generation) = machine.begin_as(begin) else { continue };
        let (asked, listed) = runs(turn);
        let mut published = Vec::new();
        for (asked, listed) in asked.chunks(300).zip(listed.chunks(300)) {
            if machine.add(generation, asked).is_ok() {
                published.extend_from_slice(listed);
            }
        }
        machine.fake.published.insert(generation, published);
        let publish = Publish { generation, answers: turn, ..Publish::default() };
        let was = machine.fake.view().unwrap().active.map(|slot| slot.generation);
        let result = machine.publish_as(publish);
        let is = machine.fake.view().unwrap().active.map(|slot| slot.generation);
        assert_eq!(is, if result.is_ok() { Some(generation) } else { was });
    }
    machine.call(WITHDRAW).unwrap();
    machine.module.close(&mut machine.fake);
}

#[test]
fn one_failure_at_any_place_leaks_nothing_and_shows_dom0_no_half() {
    let (asked, _) = runs(0);
    let pfns: Vec<u64> = (0..PAGES).map(|page| FIRST_USER_PFN + 2 * page).collect();
    assert_eq!(asked.len(), pfns.len());
    let mut places = 0;
    loop {
        let mut machine = Machine { fake: Fake::new(), module: Module::new() };
        machine.fake.put(ARGUMENT, &[0; 256]);
        for (page, pfn) in (0..).zip(&pfns) {
            machine.fake.map(ADDRESS + page * PAGE, &[*pfn]);
        }
        machine.fake.failure_after = Some(places);
        live(&mut machine);
        let never_came = machine.fake.failure_after.take().is_some();
        machine.stop();
        if never_came {
            break;
        }
        places += 1;
    }
    println!("{places} calls of the kernel were made to fail, each once");
    assert!(places > 100, "only {places} places can fail");
}

#[test]
fn a_process_that_ends_in_the_middle_is_listed_up_to_there() {
    let mut machine = Machine::new(false);
    let (asked, listed) = runs(0);
    for (page, run) in (0..).zip(&listed) {
        machine.fake.map(ADDRESS + page * PAGE, &[run.pfn]);
    }
    let generation = machine.begin();
    // 128 runs are translated at once.
    machine.fake.dies_after = Some(2);
    assert_eq!(machine.add(generation, &asked), Ok((256, PAGES - 256)));
    machine.publish(generation, listed[..256].to_vec());
    machine.fake.processes.remove(&PID);
    let generation = machine.begin();
    assert_eq!(machine.add(generation, &asked), Err(Errno::ESRCH));
    machine.stop();
}
