//! The source's filter against a reference model of the target: random interleavings of send, resend, accept, refuse, disk change and
//! storage stall.
//!
//! The model is trivial: a table of what each PFN holds, and a list of references that nobody has looked at yet. When it looks at one is
//! drawn, and so is the order; while its storage stalls it looks at none. In [`chaos`](super::chaos) the target is our own; here it
//! does what ours would do only under loads that a test cannot make. The wire is narrow, so that what is sent waits for it, and is
//! overtaken by what may overtake it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use enlightenment::Vdev;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use proptest::prelude::*;

use super::guest_stream::{Sent, beginning, disk_page, ending, other_page, page_data};
use super::pair::{XVDA, config, map};
use crate::engine::memory_record::{self, Hash, PrivateRecord, SpanKind};
use crate::engine::side_message::{Answer, Hello, Refusal, Report, Verdicts};
use crate::engine::summary::DiskSummary;
use crate::engine::xen_stream::{PAGE, PageData, RecordHeader, record as kinds};
use crate::engine::{Config, DiskName, SourceFilter, SourceParts};

const PFNS: u64 = 96;
const DISK_PAGES: u64 = 64;

/// One step of the save.
#[derive(Clone, Debug)]
enum Step {
    /// A record: these PFNs, each with the page of the disk that it holds, or another page, or zeros.
    Send(Vec<(u64, Holds)>),
    DiskChange(u64),
    Stall(bool),
    CatchUp,
    Drain,
}

#[derive(Clone, Copy, Debug)]
enum Holds {
    AsHinted,
    Other(u64),
    Zeros,
}

#[derive(Clone, Debug)]
struct Plan {
    hints: Vec<(u64, u64)>,
    steps: Vec<Step>,
    /// Which of the waiting references is looked at next, and how many at a time.
    draws: Vec<(usize, usize)>,
    /// Whether equal bytes are refused all the same, as when a read fails.
    failing: Vec<bool>,
    window_pages: u64,
    ahead_bytes: u64,
    drain_timeout: Duration,
}

fn step() -> impl Strategy<Value = Step> {
    let holds = prop_oneof![
        5 => Just(Holds::AsHinted),
        2 => (0_u64..40).prop_map(Holds::Other),
        1 => Just(Holds::Zeros),
    ];
    prop_oneof![
        6 => proptest::collection::btree_map(0..PFNS, holds, 1..32).prop_map(|pages| Step::Send(pages.into_iter().collect())),
        2 => (0..DISK_PAGES).prop_map(Step::DiskChange),
        1 => any::<bool>().prop_map(Step::Stall),
        1 => Just(Step::CatchUp),
        1 => Just(Step::Drain),
    ]
}

prop_compose! {
    fn plan()(
        hints in proptest::collection::vec((0..PFNS, 0..DISK_PAGES), 20..150),
        steps in proptest::collection::vec(step(), 1..24),
        draws in proptest::collection::vec((any::<usize>(), 1_usize..12), 1..16),
        failing in proptest::collection::vec(proptest::bool::weighted(0.2), 1..16),
        window_pages in prop_oneof![0_u64..24, 24_u64..150, Just(1000)],
        ahead_bytes in prop_oneof![2 => Just(0_u64), 1 => Just(100_000), 1 => Just(12 << 20)],
        drain_timeout in prop_oneof![Just(Duration::ZERO), Just(Duration::from_millis(30)), Just(Duration::from_secs(20))],
    ) -> Plan {
        Plan { hints, steps, draws, failing, window_pages, ahead_bytes, drain_timeout }
    }
}

/// What the model's storage is: its pages, and whether it answers.
#[derive(Debug)]
struct Storage {
    pages: Vec<Vec<u8>>,
    stalled: bool,
}

#[derive(Debug)]
struct Waiting {
    pfn: u64,
    number: u64,
    place: u64,
    hash: Hash,
}

/// The model.
struct Model {
    wire: UnixStream,
    side: UnixStream,
    key: [u8; 32],
    storage: Arc<Mutex<Storage>>,
    plan: Plan,
    memory: BTreeMap<u64, Vec<u8>>,
    /// PFN -> number: whoever comes with another number is too late.
    held: BTreeMap<u64, u64>,
    most_held: usize,
    waiting: Vec<Waiting>,
    looked: usize,
}

impl Model {
    /// Lives until END; what memory holds then.
    fn run(mut self) -> Self {
        self.wire.read_exact(&mut [0; 40]).unwrap();
        loop {
            self.look_at_some();
            // With nothing to read it goes on looking.
            let mut fds = [PollFd::new(self.wire.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(1_u8)).unwrap() == 0 {
                continue;
            }
            let mut head = [0; 8];
            self.wire.read_exact(&mut head).unwrap();
            let header = RecordHeader::parse(&head, 0);
            let mut body = vec![0; header.padded() as usize];
            self.wire.read_exact(&mut body).unwrap();
            let body = &body[..header.length as usize];
            match header.kind {
                kinds::END => {
                    assert!(self.held.is_empty(), "{:?} are held at the end", self.held);
                    return self;
                }
                kinds::PAGE_DATA => {
                    for (entry, page) in PageData::parse(body).unwrap().pages_by_entry() {
                        self.held.remove(&entry.pfn);
                        self.memory.insert(entry.pfn, page.unwrap().to_vec());
                    }
                }
                memory_record::RECORD_TYPE => self.private_record(body),
                _ => assert!(self.held.is_empty(), "{:?} are held after the memory", self.held),
            }
        }
    }

    fn private_record(&mut self, body: &[u8]) {
        let record = match PrivateRecord::parse(body).unwrap() {
            PrivateRecord::Sync(number) => {
                assert!(self.held.is_empty(), "{:?} are held when all is said to be settled", self.held);
                let _ = Report::Synced(number).write(&mut self.side);
                return;
            }
            PrivateRecord::LateWrites(_) => panic!("nothing was told of late writes"),
            PrivateRecord::Memory(record) => record,
        };
        let (mut hashes, mut pages) = (record.hashes(), record.data.chunks_exact(PAGE));
        let mut number = record.first_reference;
        for span in record.spans() {
            for (index, entry) in span.entries().enumerate() {
                self.held.remove(&entry.pfn);
                match span.kind {
                    SpanKind::Raw => drop(self.memory.insert(entry.pfn, pages.next().unwrap().to_vec())),
                    SpanKind::Zero => drop(self.memory.insert(entry.pfn, vec![0; PAGE])),
                    SpanKind::NoData => panic!("no such entry was sent"),
                    SpanKind::Reference { offset, .. } => {
                        let place = offset / PAGE as u64 + index as u64;
                        let hash = hashes.next().unwrap();
                        self.held.insert(entry.pfn, number);
                        self.waiting.push(Waiting { pfn: entry.pfn, number, place, hash });
                        number += 1;
                    }
                }
            }
        }
        self.most_held = self.most_held.max(self.held.len());
    }

    /// Looks at as many as were drawn, in the order that was drawn.
    fn look_at_some(&mut self) {
        let storage = Arc::clone(&self.storage);
        let storage = storage.lock().unwrap();
        if storage.stalled {
            return;
        }
        let (which, count) = self.plan.draws[self.looked % self.plan.draws.len()];
        self.looked += 1;
        let mut verdicts = Verdicts::default();
        for _ in 0..count.min(self.waiting.len()) {
            let waiting = self.waiting.swap_remove(which % self.waiting.len());
            if self.held.get(&waiting.pfn) != Some(&waiting.number) {
                // Overtaken by a newer entry; a target that had begun to read may say something all the same.
                if which.is_multiple_of(2) {
                    verdicts.refused.push((waiting.number, Refusal::Hash));
                }
                continue;
            }
            let page = &storage.pages[waiting.place as usize];
            let fails = self.plan.failing[waiting.number as usize % self.plan.failing.len()];
            if fails {
                verdicts.refused.push((waiting.number, Refusal::IoError));
            } else if memory_record::hash(&self.key, page) != waiting.hash {
                verdicts.refused.push((waiting.number, Refusal::Hash));
            } else {
                self.held.remove(&waiting.pfn);
                self.memory.insert(waiting.pfn, page.clone());
                verdicts.accepted.push((waiting.number, 1));
            }
        }
        // A source that is done no longer listens.
        let _ = verdicts.write(&mut self.side);
    }
}

/// A source's filter with the model as its target.
fn start(plan: &Plan, storage: &Arc<Mutex<Storage>>) -> (UnixStream, SourceFilter, JoinHandle<Model>) {
    let [save, wire, side] = std::array::from_fn(|_| UnixStream::pair().unwrap());
    // The least that there is.
    setsockopt(&wire.0, sockopt::SndBuf, &1).unwrap();
    let (mut target_side, storage, own_plan) = (side.1, Arc::clone(storage), plan.clone());
    let model = std::thread::spawn(move || {
        let hello = Hello::read(&mut target_side).unwrap();
        let disks = vec![DiskSummary { vdev: XVDA, size_bytes: DISK_PAGES * PAGE as u64, problem: None }];
        Answer { max_outstanding: hello.window_pages, disks }.write(&mut target_side).unwrap();
        Model {
            wire: wire.1,
            side: target_side,
            key: hello.key,
            storage,
            plan: own_plan,
            memory: BTreeMap::new(),
            held: BTreeMap::new(),
            most_held: 0,
            waiting: Vec::new(),
            looked: 0,
        }
        .run()
    });
    let source = SourceFilter::start(SourceParts {
        from_save: OwnedFd::from(save.1),
        to_wire: OwnedFd::from(wire.0),
        side: Some(OwnedFd::from(side.0)),
        map: map(plan.hints.iter().copied()),
        disks: vec![DiskName { vdev: Vdev(XVDA), path: "/disk".into() }],
        config: Config {
            window_bytes: plan.window_pages * PAGE as u64,
            ahead_bytes: plan.ahead_bytes,
            // Every pass: so that references overtake each other.
            reference_passes: u32::MAX,
            drain_timeout: plan.drain_timeout,
            ..config()
        },
    })
    .unwrap();
    (save.0, source, model)
}

fn run(plan: &Plan) -> Result<(), TestCaseError> {
    let pages = (0..DISK_PAGES).map(disk_page).collect();
    let storage = Arc::new(Mutex::new(Storage { pages, stalled: false }));
    let (mut save, source, model) = start(plan, &storage);
    let hints: BTreeMap<u64, u64> = plan.hints.iter().copied().collect();
    let mut expected = BTreeMap::new();
    save.write_all(&beginning()).unwrap();
    for step in &plan.steps {
        match step {
            Step::Send(pages) => {
                let batch: Vec<_> = pages
                    .iter()
                    .map(|&(pfn, holds)| {
                        let page = match (holds, hints.get(&pfn)) {
                            (Holds::Zeros, _) => vec![0; PAGE],
                            (Holds::Other(seed), _) => other_page(seed),
                            (Holds::AsHinted, Some(&place)) => disk_page(place),
                            (Holds::AsHinted, None) => other_page(pfn),
                        };
                        expected.insert(pfn, page.clone());
                        Sent::page(pfn, page)
                    })
                    .collect();
                save.write_all(&page_data(&batch)).unwrap();
            }
            Step::DiskChange(place) => {
                storage.lock().unwrap().pages[*place as usize] = other_page(1000 + place);
            }
            Step::Stall(stalled) => storage.lock().unwrap().stalled = *stalled,
            Step::CatchUp => source.catch_up().recv().unwrap(),
            Step::Drain => {
                // Storage that stalls for good: only the time that the drain may take ends it.
                let patient = plan.drain_timeout > Duration::from_secs(1);
                if patient {
                    storage.lock().unwrap().stalled = false;
                }
                let report = source.drain().unwrap();
                let stats = source.stats();
                prop_assert_eq!(stats.references_outstanding, 0, "{:?}", report);
                prop_assert!(!patient || (report.synced && report.replaced == 0), "{:?}", report);
            }
        }
    }
    if plan.drain_timeout > Duration::from_secs(1) {
        storage.lock().unwrap().stalled = false;
    }
    save.write_all(&ending()).unwrap();
    drop(save);
    let stats = source.finish().map_err(|error| TestCaseError::fail(format!("source: {error}")))?.stats;
    let model = model.join().map_err(|_| TestCaseError::fail("the model found something wrong"))?;
    for (pfn, page) in &expected {
        prop_assert!(model.memory.get(pfn) == Some(page), "PFN {} differs", pfn);
    }
    prop_assert_eq!(model.memory.len(), expected.len());
    prop_assert!(!stats.side_channel_lost);
    prop_assert!(model.most_held as u64 <= plan.window_pages);
    prop_assert!(stats.references_outstanding_peak <= plan.window_pages);
    prop_assert_eq!(
        stats.pages_referenced,
        stats.references_accepted
            + stats.references_refused
            + stats.references_superseded
            + stats.references_replaced
    );
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, max_shrink_iters: 60, ..ProptestConfig::default() })]

    #[test]
    fn memory_is_what_the_model_says(plan in plan()) {
        run(&plan)?;
    }
}
