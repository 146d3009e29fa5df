//! The gate with loom's locks in place of the standard library's: every interleaving of its threads in which no more than
//! [`PREEMPTIONS`] of them come where a thread could have gone on. All of them would take hours.

use loom::sync::Arc;
use loom::thread;

use super::order;

mod sync {
    pub use loom::sync::{Condvar, Mutex, MutexGuard};
}

// The same source a second time, on other locks: no build of its own is needed for it.
#[path = "gate.rs"]
mod gate;

use gate::{Gate, Taken};

/// Nearly all mistakes show with two (M. Musuvathi and S. Qadeer, "Iterative context bounding", PLDI 2007).
const PREEMPTIONS: usize = 2;

fn every_interleaving(work: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(PREEMPTIONS);
    model.check(work);
}

/// Takes until it is over: what came, and whether it was all.
fn take_all(gate: &Gate<u64>) -> (Vec<u64>, bool) {
    let mut came = Vec::new();
    loop {
        match gate.take() {
            Taken::Block(block) => came.push(block),
            Taken::Complete => return (came, true),
            Taken::Broken => return (came, false),
        }
    }
}

#[test]
fn two_lanes_come_out_in_order_and_nobody_waits_for_good() {
    every_interleaving(|| {
        // Room for the one whose turn it is alone: each lane waits for the other.
        let gate = Arc::new(Gate::new(1));
        let lanes: Vec<_> = [[0, 2], [1, 3]]
            .into_iter()
            .map(|numbers| {
                let gate = gate.clone();
                thread::spawn(move || {
                    for number in numbers {
                        assert!(gate.put(number, number).unwrap());
                    }
                    gate.end(4).unwrap();
                })
            })
            .collect();
        assert_eq!(take_all(&gate), (vec![0, 1, 2, 3], true));
        lanes.into_iter().for_each(|lane| lane.join().unwrap());
    });
}

#[test]
fn the_end_wakes_who_waits_for_a_turn_that_never_comes() {
    every_interleaving(|| {
        let gate = Arc::new(Gate::new(1));
        let (waits, ends) = (gate.clone(), gate.clone());
        let lane = thread::spawn(move || waits.put(7, 7));
        let other = thread::spawn(move || ends.end(1));
        gate.put(0, 0).unwrap();
        assert_eq!(take_all(&gate), (vec![0], true));
        other.join().unwrap().unwrap();
        assert!(lane.join().unwrap().is_err());
    });
}

#[test]
fn a_failure_wakes_whoever_waits() {
    every_interleaving(|| {
        let gate = Arc::new(Gate::new(1));
        let (waits, fails) = (gate.clone(), gate.clone());
        // Block 1 has no room before block 0 was taken, which never comes.
        let lane = thread::spawn(move || waits.put(1, 1).unwrap());
        let other = thread::spawn(move || fails.break_off());
        assert_eq!(take_all(&gate), (vec![], false));
        assert!(!lane.join().unwrap());
        assert!(other.join().unwrap() && gate.is_broken());
    });
}
