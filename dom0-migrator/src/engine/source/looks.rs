//! When to look at the log of dirty pages, and what it costs.
//!
//! Xen pauses the domain while it copies the log, a bit a page: some 10 microseconds for a small guest, some milliseconds for 1 TiB. So looks
//! are as far apart as it takes for the domain to stand still for no more than one part in a hundred of the time, and further where they spare nothing.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::engine::dirty_log::{DirtyLog, Look};
use crate::engine::summary::SourceStats;

/// Of so many parts of the time one may be spent on looks.
const PARTS: u32 = 100;
/// Time between two looks at least: in less, little is marked and little is sent.
const LEAST: Duration = Duration::from_millis(20);
/// And at most.
const MOST: Duration = Duration::from_secs(5);
/// Looks in vain before they become fewer.
const PATIENCE: u32 = 2;
/// How often the time between two is doubled then.
const DOUBLED: u32 = 6;

/// When the next look is due.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    /// What a look costs: the most that one has cost lately.
    cost: Duration,
    /// Looks that have spared nothing since one did.
    in_vain: u32,
}

impl Pace {
    fn interval(&self) -> Duration {
        let least = (self.cost * PARTS).max(LEAST);
        let doubled = self.in_vain.saturating_sub(PATIENCE).min(DOUBLED);
        least.saturating_mul(1 << doubled).min(MOST.max(least))
    }

    /// A look took so long; the one before it has spared something, or nothing.
    fn looked(&mut self, took: Duration, has_spared: bool) {
        self.cost = took.max(self.cost - self.cost / 8);
        self.in_vain = if has_spared { 0 } else { self.in_vain.saturating_add(1) };
    }
}

/// What the looks of one pass were.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassLooks {
    /// The pass, from 1.
    pub pass: u32,
    /// How many.
    pub looks: u32,
    /// How long they took, all of them: so long the domain stood still.
    pub took: Duration,
    /// Of so long a pass.
    pub of: Duration,
    /// Pages that were left for a later pass.
    pub left: u64,
}

impl fmt::Display for PassLooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (took, of) = (self.took.as_secs_f64(), self.of.as_secs_f64());
        write!(
            f,
            "pass {}: {} looks at the log of dirty pages in {:.2} ms of {:.2} s ({:.2} %, at most 1 %); {} pages left for a later pass",
            self.pass,
            self.looks,
            took * 1e3,
            of,
            100.0 * took / of.max(f64::MIN_POSITIVE),
            self.left
        )
    }
}

#[derive(Debug, Default)]
struct State {
    /// The round under way, and when it began; none before the first and after the last.
    round: Option<(u32, Instant)>,
    over: bool,
    due: Option<Instant>,
    pace: Pace,
    this_pass: PassLooks,
    /// Pages left out when the pass began, and when it was looked last.
    left_before: u64,
    left_at_look: u64,
}

/// Takes looks, on the thread of libxenguest, and hands them to the filter.
#[derive(Debug)]
pub struct Looks {
    log: Arc<dyn DirtyLog>,
    to_filter: Sender<Look>,
    /// Looks that were let go.
    spare: Receiver<Vec<u64>>,
    stats: Arc<Mutex<SourceStats>>,
    state: Mutex<State>,
}

/// The filter's ends.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) looks: Receiver<Look>,
    pub(super) spare: Sender<Vec<u64>>,
}

impl Looks {
    pub(super) fn new(log: Arc<dyn DirtyLog>, stats: Arc<Mutex<SourceStats>>) -> (Self, Taken) {
        let ((to_filter, looks), (spare, spared)) = (bounded(1), bounded(1));
        (Self { log, to_filter, spare: spared, stats, state: Mutex::default() }, Taken { looks, spare })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn left(&self) -> u64 {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).pages_left_out
    }

    /// The log was cleared, or this is the first round; nothing of it is sent yet.
    pub(super) fn enter(&self, round: u32) {
        let (left, mut state) = (self.left(), self.lock());
        if state.over {
            return;
        }
        let now = Instant::now();
        state.round = Some((round, now));
        // Nothing is marked yet.
        state.due = Some(now + state.pace.interval());
        state.this_pass = PassLooks { pass: round.saturating_add(1), ..PassLooks::default() };
        (state.left_before, state.left_at_look) = (left, left);
    }

    /// No look is taken from here on: the domain is to be suspended.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        (state.round, state.over) = (None, true);
    }

    /// Takes a look if one is due. Call it on libxenguest's thread, while it sends a pass or waits after one.
    pub fn look_if_due(&self) {
        let left = self.left();
        let mut state = self.lock();
        let is_due = state.due.is_some_and(|due| due <= Instant::now());
        // The filter has not taken the last one yet: it has enough to do.
        if is_due && !self.to_filter.is_full() {
            self.look(&mut state, left);
        }
    }

    fn look(&self, state: &mut State, left: u64) {
        let Some((round, _)) = state.round else { return };
        let mut bits = self.spare.try_recv().unwrap_or_default();
        let began = Instant::now();
        if let Err(error) = self.log.peek(&mut bits) {
            tracing::warn!(%error, "cannot look at the log of dirty pages: no page is left for a later pass");
            (state.round, state.over) = (None, true);
            return;
        }
        let took = began.elapsed();
        // A filter that has ended is noticed elsewhere.
        let _ = self.to_filter.send(Look { round, bits });
        state.pace.looked(took, left > state.left_at_look);
        state.left_at_look = left;
        state.due = Some(began + took + state.pace.interval());
        state.this_pass.looks += 1;
        state.this_pass.took += took;
    }

    /// How long until a look is due, if there will be one: so long one may wait for something else.
    pub fn patience(&self) -> Option<Duration> {
        let state = self.lock();
        state.round?;
        Some(state.due?.saturating_duration_since(Instant::now()))
    }

    /// What the looks of the pass were; none when there was no pass, or no look in it.
    pub fn of_pass(&self) -> Option<PassLooks> {
        let (left, state) = (self.left(), self.lock());
        let (_, began) = state.round?;
        let looks = PassLooks { of: began.elapsed(), left: left - state.left_before, ..state.this_pass };
        (looks.looks > 0).then_some(looks)
    }

    /// Takes a look whether or not one is due.
    #[cfg(test)]
    pub(crate) fn look_now(&self) {
        let left = self.left();
        self.look(&mut self.lock(), left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_take_one_part_in_a_hundred() {
        let mut pace = Pace::default();
        assert_eq!(pace.interval(), LEAST);
        pace.looked(Duration::from_micros(50), true);
        assert_eq!(pace.interval(), LEAST);
        pace.looked(Duration::from_millis(10), true);
        assert_eq!(pace.interval(), Duration::from_secs(1));
        // A log that takes longer than the longest time between two allows.
        pace.looked(Duration::from_millis(80), false);
        assert_eq!(pace.interval(), Duration::from_secs(8));
        // Cheaper ones are believed by and by.
        (0..100).for_each(|_| pace.looked(Duration::from_millis(1), true));
        assert_eq!(pace.interval(), Duration::from_millis(100));
    }

    #[test]
    fn looks_in_vain_become_few_and_come_back() {
        let mut pace = Pace::default();
        (0..100).for_each(|_| pace.looked(Duration::from_micros(10), false));
        assert_eq!(pace.interval(), LEAST * 64);
        pace.looked(Duration::from_micros(10), true);
        assert_eq!(pace.interval(), LEAST);
    }

    #[test]
    fn numbers_are_in_the_log() {
        let took = Duration::from_micros(2600);
        let looks = PassLooks { pass: 2, looks: 34, took, of: Duration::from_secs(2), left: 5321 };
        assert_eq!(
            looks.to_string(),
            "pass 2: 34 looks at the log of dirty pages in 2.60 ms of 2.00 s (0.13 %, at most 1 %); 5321 pages left for a later pass"
        );
    }
}
