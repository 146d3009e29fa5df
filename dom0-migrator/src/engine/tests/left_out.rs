//! Pages that are left for a later pass, against a model of a guest, of its log of dirty pages, and of what libxenguest does with it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::guest_stream::{
    Sent, beginning, beginning_pvh, disk_page, ending, other_page, page_data, record, restore,
};
use super::pair::{Pair, config, disk, map, only};
use crate::engine::xen_stream::{NOTAB, PAGE, XALLOC, record as kinds};
use crate::engine::{Config, DirtyLog, EngineError, SourceStats};

const PFNS: u64 = 64;
/// No page there.
const XTAB: u8 = 15;

/// A log of dirty pages.
#[derive(Debug, Default)]
struct Log(Mutex<Marks>);

#[derive(Debug, Default)]
struct Marks {
    dirty: BTreeSet<u64>,
    gone: BTreeSet<u64>,
}

impl Log {
    fn mark(&self, pfn: u64) {
        self.0.lock().unwrap().dirty.insert(pfn);
    }

    /// What libxenguest reads, and clears.
    fn clean(&self) -> Vec<u64> {
        std::mem::take(&mut self.0.lock().unwrap().dirty).into_iter().collect()
    }

    /// The guest no longer has the page; of a PV guest the mark stays.
    fn remove(&self, pfn: u64, translated: bool) {
        let mut marks = self.0.lock().unwrap();
        marks.gone.insert(pfn);
        if translated {
            marks.dirty.remove(&pfn);
        } else {
            marks.dirty.insert(pfn);
        }
    }
}

impl DirtyLog for Log {
    fn peek(&self, bits: &mut Vec<u64>) -> io::Result<()> {
        bits.clear();
        bits.resize(PFNS.div_ceil(64) as usize, 0);
        for pfn in &self.0.lock().unwrap().dirty {
            bits[(pfn / 64) as usize] |= 1 << (pfn % 64);
        }
        Ok(())
    }

    fn are_gone(&self, pfns: &[u64]) -> io::Result<Vec<bool>> {
        let marks = self.0.lock().unwrap();
        Ok(pfns.iter().map(|pfn| marks.gone.contains(pfn)).collect())
    }
}

/// A guest, its log, and the filters between the save and the restore.
struct World {
    log: Arc<Log>,
    /// What each page holds; none where there is no page.
    memory: BTreeMap<u64, Option<Vec<u8>>>,
    pair: Pair,
    stream: Vec<u8>,
    translated: bool,
}

impl World {
    fn start(translated: bool, ahead_bytes: u64, hints: &[(u64, u64)]) -> Self {
        let log = Arc::new(Log::default());
        let image = disk(PFNS);
        let disks = only(&image);
        let config = Config { window_bytes: 8 << 20, ahead_bytes, ..config() };
        let held = Some(log.clone() as Arc<dyn DirtyLog>);
        let pair = Pair::with_log(map(hints.iter().copied()), disks, held, config.clone(), config);
        let memory = (0..PFNS).map(|pfn| (pfn, Some(disk_page(pfn)))).collect();
        let mut world = Self { log, memory, pair, stream: Vec::new(), translated };
        let head = if translated { beginning_pvh() } else { beginning() };
        world.write(&head);
        world
    }

    /// One whose first pass has left out PFN 7.
    fn with_a_page_left_out(translated: bool) -> Self {
        let mut world = Self::start(translated, 12 << 20, &[]);
        world.enter(0);
        world.dirty(7, 1);
        world.look();
        world.send(&ALL);
        world
    }

    fn write(&mut self, bytes: &[u8]) {
        self.pair.write(bytes);
        self.stream.extend(bytes);
    }

    /// The guest writes.
    fn dirty(&mut self, pfn: u64, seed: u64) {
        self.memory.insert(pfn, Some(if seed == 0 { vec![0; PAGE] } else { other_page(seed) }));
        self.log.0.lock().unwrap().gone.remove(&pfn);
        self.log.mark(pfn);
    }

    fn remove(&mut self, pfn: u64) {
        self.memory.insert(pfn, None);
        self.log.remove(pfn, self.translated);
    }

    /// libxenguest begins a round, and the filter knows.
    fn enter(&self, round: u32) {
        self.pair.source.enter_round(round);
        self.until(|stats| stats.rounds > round);
    }

    fn look(&self) {
        self.pair.source.looks().unwrap().look_now();
    }

    /// What libxenguest maps and writes now.
    fn send(&mut self, pfns: &[u64]) {
        let batch: Vec<_> = pfns
            .iter()
            .map(|pfn| match &self.memory[pfn] {
                Some(page) => Sent::page(*pfn, page.clone()),
                None => Sent::typed(*pfn, XTAB, Vec::new()),
            })
            .collect();
        self.write(&page_data(&batch));
    }

    fn hold(&self, is_held: bool) {
        self.pair.is_held.store(is_held, Ordering::Relaxed);
    }

    /// Sends all while nothing passes the wire; returns the pages that had gone before.
    fn send_held(&mut self) -> u64 {
        let before = self.pair.source.stats().pages_raw;
        self.hold(true);
        for batch in ALL.chunks(4) {
            self.send(batch);
        }
        self.until(|stats| stats.pages_raw == before + PFNS);
        before
    }

    fn catch_up(&self) {
        self.hold(false);
        self.pair.source.catch_up().recv().unwrap();
    }

    /// Waits for what the filter's thread does by and by.
    fn until(&self, is_so: impl Fn(&SourceStats) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_so(&self.pair.source.stats()) {
            assert!(Instant::now() < deadline, "{:?}", self.pair.source.stats());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// As the helper does before it suspends the domain.
    fn suspend(&self) {
        self.catch_up();
        self.pair.source.suspending();
        self.pair.source.drain().unwrap();
    }

    /// The last pass, and the end.
    fn finish(mut self, round: impl Into<Option<u32>>, verify: bool) -> Result<SourceStats, EngineError> {
        if let Some(round) = round.into() {
            self.pair.source.suspended();
            self.pair.source.enter_round(round);
        }
        let last = self.log.clean();
        self.look();
        if !last.is_empty() {
            self.send(&last);
        }
        if verify {
            self.write(&record(kinds::VERIFY, &[]));
            let all: Vec<u64> =
                self.memory.iter().filter(|(_, page)| page.is_some()).map(|(pfn, _)| *pfn).collect();
            self.send(&all);
        }
        self.write(&ending());
        let outcome = self.pair.finish();
        let stats = outcome.source?.stats;
        outcome.target.unwrap();
        let restored = restore(&outcome.stream);
        for (pfn, page) in &self.memory {
            // Where the guest has no page it does not matter what is there.
            if let Some(page) = page {
                let found = restored.memory.get(pfn);
                assert!(found == Some(&(NOTAB, Some(page.clone()))), "PFN {pfn} differs");
            }
        }
        assert!(restored.verify_mismatches.is_empty(), "{:?}", restored.verify_mismatches);
        assert_eq!(
            stats.pages_in,
            stats.pages_raw + stats.pages_zero + stats.pages_referenced + stats.pages_left_out
        );
        Ok(stats)
    }
}

const ALL: [u64; PFNS as usize] = {
    let mut all = [0; PFNS as usize];
    let mut pfn = 0;
    while pfn < all.len() {
        all[pfn] = pfn as u64;
        pfn += 1;
    }
    all
};

#[test]
fn what_is_marked_again_is_left_out_and_comes_at_last() {
    for translated in [false, true] {
        let mut world = World::start(translated, 12 << 20, &[(5, 5), (6, 6)]);
        world.enter(0);
        // One that would go raw, one that would go by reference, one of zeros.
        [(3, 1), (6, 2), (9, 0)].into_iter().for_each(|(pfn, seed)| world.dirty(pfn, seed));
        world.look();
        world.send(&ALL);
        world.suspend();
        let stats = world.finish(1, true).unwrap();
        // A marker costs less than what it would be left out for.
        assert_eq!((stats.pages_left_out, stats.pages_referenced, stats.pages_zero), (2, 1, 2));
        assert_eq!(stats.pages_in, PFNS + 3);
        assert_eq!(stats.bytes_page_data, (PFNS - 2 - 1 - 1 + 2 + PFNS) * PAGE as u64);
    }
}

#[test]
fn the_target_has_memory_for_what_is_left_out_of_the_first_pass() {
    let mut world = World::start(false, 12 << 20, &[]);
    world.enter(0);
    world.dirty(3, 1);
    world.look();
    world.send(&[2, 3, 4]);
    world.send(&[6]);
    let (log, named) = (world.log.clone(), [3]);
    world.suspend();
    let stream = {
        world.memory.retain(|pfn, _| [2, 3, 4, 6].contains(pfn));
        world.pair.source.suspended();
        let last = log.clean();
        assert_eq!(last, named);
        // The mark was the only copy: what follows is the page itself.
        world.send(&last);
        world.write(&ending());
        world.pair.finish().stream
    };
    let xalloc = (u64::from(XALLOC) << 60 | 3).to_le_bytes();
    assert!(stream.windows(8).any(|word| word == xalloc), "PFN 3 is not named in the first pass");
    assert_eq!(restore(&stream).memory[&3], (NOTAB, Some(other_page(1))));
}

#[test]
fn what_waits_for_the_wire_is_left_out_too() {
    for (translated, round) in [(false, 0), (true, 0), (false, 1)] {
        let mut world = World::start(translated, 0, &[]);
        world.enter(0);
        if round == 1 {
            world.send(&ALL);
            world.catch_up();
            ALL.into_iter().for_each(|pfn| world.dirty(pfn, 100 + pfn));
            assert_eq!(world.log.clean(), ALL);
            world.enter(1);
        }
        let before = world.send_held();
        for pfn in 40..60 {
            world.dirty(pfn, 1000 + pfn);
        }
        world.look();
        world.until(|stats| stats.pages_left_out == 20);
        world.suspend();
        let stats = world.finish(round + 1, true).unwrap();
        assert_eq!((stats.pages_left_out, stats.pages_raw), (20, before + PFNS));
        assert_eq!(stats.bytes_page_data, (before + PFNS + PFNS) * PAGE as u64);
        assert_eq!(stats.ways.raw + stats.ways.resent, before + PFNS);
    }
}

#[test]
fn a_look_from_before_the_log_was_cleared_does_not_count() {
    let mut world = World::start(false, 12 << 20, &[]);
    world.enter(0);
    world.send(&ALL);
    world.catch_up();
    world.dirty(7, 1);
    world.look();
    assert_eq!(world.log.clean(), [7]);
    // After that, and before the filter is told: such a look is of the round before.
    world.dirty(8, 2);
    world.look();
    world.enter(1);
    world.send(&[7, 8]);
    world.suspend();
    let stats = world.finish(2, true).unwrap();
    assert_eq!((stats.pages_left_out, stats.pages_in), (0, PFNS + 3));
}

#[test]
fn nothing_is_left_out_once_the_domain_is_to_be_suspended() {
    let mut world = World::start(false, 12 << 20, &[]);
    world.enter(0);
    world.send(&ALL);
    world.catch_up();
    world.dirty(7, 1);
    world.look();
    world.suspend();
    world.look();
    // Nothing else says that the last pass begins.
    let stats = world.finish(None, false).unwrap();
    assert_eq!((stats.pages_left_out, stats.pages_in), (0, PFNS + 1));
}

/// Somebody else clears the log: the migration fails, and no page is wrong.
#[test]
fn a_page_that_was_left_out_and_does_not_come_ends_the_migration() {
    for (translated, is_removed, is_cleared, is_well) in [
        (false, false, true, false),
        (true, false, true, false),
        (true, true, false, true),
        (false, true, false, true),
        // That a PV guest has no page there says nothing: its mark should have stayed.
        (false, true, true, false),
    ] {
        let mut world = World::with_a_page_left_out(translated);
        world.suspend();
        if is_removed {
            // Xen takes it out of the log, but for a PV guest.
            world.remove(7);
        }
        if is_cleared {
            assert_eq!(world.log.clean(), [7]);
        }
        let ended = world.finish(1, false);
        match ended {
            Ok(_) => assert!(is_well),
            Err(EngineError::LeftOut { pages: 1, first: 7 }) => assert!(!is_well),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_page_that_was_left_out_while_it_waited_and_does_not_come_ends_the_migration() {
    for translated in [false, true] {
        let mut world = World::start(translated, 0, &[]);
        world.enter(0);
        world.send_held();
        world.dirty(50, 1);
        world.look();
        world.until(|stats| stats.pages_left_out == 1);
        assert_eq!(world.log.clean(), [50]);
        world.suspend();
        let ended = world.finish(1, false);
        assert!(matches!(ended, Err(EngineError::LeftOut { pages: 1, first: 50 })), "{ended:?}");
    }
}

/// Nobody has told the filter that the domain is suspended: the end of memory is one all the same.
#[test]
fn nothing_is_missing_at_the_end_whatever_the_filter_was_told() {
    let world = World::with_a_page_left_out(false);
    world.catch_up();
    assert_eq!(world.log.clean(), [7]);
    let ended = world.finish(None, false);
    assert!(matches!(ended, Err(EngineError::LeftOut { pages: 1, first: 7 })), "{ended:?}");
}

#[test]
fn a_log_that_cannot_be_read_is_not_looked_at_again() {
    #[derive(Debug)]
    struct Broken;
    impl DirtyLog for Broken {
        fn peek(&self, _: &mut Vec<u64>) -> io::Result<()> {
            Err(io::Error::from_raw_os_error(libc::EBUSY))
        }
        fn are_gone(&self, _: &[u64]) -> io::Result<Vec<bool>> {
            unreachable!("nothing is left out")
        }
    }
    let log = Some(Arc::new(Broken) as Arc<dyn DirtyLog>);
    let mut pair = Pair::with_log(map([]), Vec::new(), log, config(), config());
    pair.source.enter_round(0);
    let looks = pair.source.looks().unwrap();
    assert!(looks.patience().is_some());
    looks.look_now();
    assert!(looks.patience().is_none() && looks.of_pass().is_none());
    let mut stream = beginning();
    stream.extend(page_data(&[Sent::page(1, other_page(1))]));
    stream.extend(ending());
    pair.write(&stream);
    let outcome = pair.finish();
    outcome.source.unwrap();
    outcome.target.unwrap();
    assert_eq!(outcome.stream, stream);
}

#[derive(Clone, Debug)]
enum Event {
    /// The guest writes to these: pages of zeros where the number is 0.
    Write(Vec<(u64, u64)>),
    Look,
    Hold,
    LetGo,
    CatchUp,
    Pause,
    Remove(u64),
}

#[derive(Clone, Debug)]
struct Plan {
    hints: Vec<(u64, u64)>,
    passes: u32,
    batch: usize,
    events: Vec<(usize, Event)>,
    ahead_bytes: u64,
    translated: bool,
    verify: bool,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        10 => proptest::collection::vec((0..PFNS, 0_u64..40), 1..12).prop_map(Event::Write),
        10 => Just(Event::Look),
        3 => Just(Event::Hold),
        2 => Just(Event::LetGo),
        2 => Just(Event::CatchUp),
        1 => Just(Event::Pause),
        1 => (0..PFNS).prop_map(Event::Remove),
    ]
}

prop_compose! {
    fn plan()(
        hints in proptest::collection::vec((0..PFNS, 0..PFNS), 0..60),
        passes in 1_u32..5,
        batch in 1_usize..20,
        events in proptest::collection::vec((0_usize..50, event()), 0..60),
        ahead_bytes in prop_oneof![2 => Just(0_u64), 1 => Just(50_000), 1 => Just(12 << 20)],
        (translated, verify) in any::<(bool, bool)>(),
    ) -> Plan {
        Plan { hints, passes, batch, events, ahead_bytes, translated, verify }
    }
}

fn run(plan: &Plan) -> Result<(), TestCaseError> {
    let mut world = World::start(plan.translated, plan.ahead_bytes, &plan.hints);
    let mut step = 0;
    // Whatever happens between two things that libxenguest does.
    let mut happen = |world: &mut World| {
        for (_, event) in plan.events.iter().filter(|event| event.0 == step) {
            match event {
                Event::Write(pages) => pages.iter().for_each(|&(pfn, seed)| world.dirty(pfn, seed)),
                Event::Look => world.look(),
                // A record that need not wait keeps its buffer until it is written, and there are few of these.
                Event::Hold => world.hold(plan.ahead_bytes == 0),
                Event::LetGo => world.hold(false),
                Event::CatchUp => world.catch_up(),
                Event::Pause => std::thread::sleep(Duration::from_millis(1)),
                Event::Remove(pfn) => world.remove(*pfn),
            }
        }
        step += 1;
    };
    let mut dirty = ALL.to_vec();
    for round in 0..plan.passes {
        world.pair.source.enter_round(round);
        for batch in dirty.chunks(plan.batch) {
            happen(&mut world);
            world.send(batch);
        }
        happen(&mut world);
        if round + 1 < plan.passes {
            dirty = world.log.clean();
            // The filter has not been told yet.
            happen(&mut world);
        }
    }
    world.catch_up();
    happen(&mut world);
    world.suspend();
    happen(&mut world);
    world.hold(false);
    world.finish(plan.passes, plan.verify).map(drop).map_err(|error| TestCaseError::fail(error.to_string()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Whenever the guest writes, whenever the log is looked at, and however far the wire is behind: memory is what it was when the domain stood still.
    #[test]
    fn memory_is_what_the_guest_has_whatever_is_left_out(plan in plan()) {
        run(&plan)?;
    }
}
