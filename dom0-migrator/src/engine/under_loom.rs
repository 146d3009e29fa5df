//! The place where the filter's thread and the writing one meet, with loom's locks in place of the standard library's: every interleaving in which no
//! more than [`PREEMPTIONS`] come where a thread could have gone on.

use loom::sync::Arc;
use loom::thread;

use super::epochs;

mod sync {
    pub use loom::sync::atomic::{AtomicU64, Ordering};
    pub use loom::sync::{Condvar, Mutex, MutexGuard};
}

// The same source a second time, on other locks: no build of its own is needed for it.
#[path = "waiting.rs"]
mod waiting;

use waiting::{Gone, Length, Taken, Waiting};

/// Nearly all mistakes show with two (M. Musuvathi and S. Qadeer, "Iterative context bounding", PLDI 2007).
const PREEMPTIONS: usize = 2;

/// Bytes of a parcel: its name, and a page or none.
#[derive(Debug, PartialEq, Eq)]
struct Parcel(char, u64);

impl Length for Parcel {
    fn length(&self) -> u64 {
        1 + self.1
    }
}

fn every_interleaving(work: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(PREEMPTIONS);
    model.check(work);
}

/// Writes until it is over: the names of what was written, and their bytes.
fn write_all(waiting: &Waiting<Parcel>) -> (String, u64) {
    let (mut names, mut bytes) = (String::new(), 0);
    while let Taken::One(parcel) = waiting.take(None) {
        names.push(parcel.0);
        bytes += parcel.length();
        waiting.written(parcel.length());
    }
    (names, bytes)
}

#[test]
fn who_waits_for_room_goes_on_and_nothing_passes_a_fence() {
    every_interleaving(|| {
        let waiting = Arc::new(Waiting::new(1));
        let writes = waiting.clone();
        let writer = thread::spawn(move || write_all(&writes));
        waiting.put(Parcel('a', 0), false).unwrap();
        waiting.fence();
        waiting.put(Parcel('b', 0), false).unwrap();
        waiting.put(Parcel('c', 0), true).unwrap();
        waiting.end();
        let (names, bytes) = writer.join().unwrap();
        // With room for one, none is there to be overtaken.
        assert_eq!((names.as_str(), bytes, waiting.backlog()), ("abc", 3, 0));
    });
}

#[test]
fn what_is_sent_first_overtakes_no_fence() {
    every_interleaving(|| {
        let waiting = Arc::new(Waiting::new(9));
        let writes = waiting.clone();
        let writer = thread::spawn(move || write_all(&writes).0);
        waiting.put(Parcel('a', 0), false).unwrap();
        waiting.fence();
        waiting.put(Parcel('b', 0), false).unwrap();
        waiting.put(Parcel('c', 0), true).unwrap();
        waiting.end();
        let names = writer.join().unwrap();
        assert!(["abc", "acb"].contains(&names.as_str()) && waiting.has_room(), "{names}");
    });
}

/// A page is left out of what waits while the other thread takes: each parcel goes with it or without, as a whole, and the bytes are right.
#[test]
fn what_is_revised_is_written_as_it_was_or_as_it_is() {
    every_interleaving(|| {
        let waiting = Arc::new(Waiting::new(9));
        let writes = waiting.clone();
        let writer = thread::spawn(move || write_all(&writes));
        waiting.put(Parcel('a', 100), false).unwrap();
        waiting.put(Parcel('b', 100), false).unwrap();
        let less = waiting.revise(|parcel| parcel.1 = 0);
        waiting.end();
        let (names, bytes) = writer.join().unwrap();
        assert_eq!((names.as_str(), bytes + less, waiting.backlog()), ("ab", 202, 0));
    });
}

#[test]
fn a_writer_that_goes_leaves_nobody_waiting() {
    every_interleaving(|| {
        let waiting = Arc::new(Waiting::new(1));
        let goes = waiting.clone();
        let writer = thread::spawn(move || {
            let taken = goes.take(None);
            goes.go();
            taken
        });
        waiting.put(Parcel('a', 0), false).unwrap();
        // Room, or nobody there: whichever is first. In the end nobody.
        while waiting.put(Parcel('b', 0), true) != Err(Gone) {
            thread::yield_now();
        }
        assert_eq!(writer.join().unwrap(), Taken::One(Parcel('a', 0)));
    });
}
