//! How long a migration will still take, from what was measured so far and nothing else.

use std::collections::VecDeque;

use crate::helper::policy::{FEW_DIRTY_PAGES, MOST_ROUNDS, STOCK_ROUNDS};

/// Seconds over which the present rate is taken: long enough for a mean over runs of zeros, references and contents.
const WINDOW_SECONDS: f64 = 10.0;
/// Seconds of a pass before which nothing is said.
const FIRST_SECONDS: f64 = 3.0;

/// What can be said.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Remaining {
    /// Nothing: it has just begun, or nothing moves.
    Unknown,
    /// Seconds that this pass takes. What is written to meanwhile will be sent again, and how much that is nobody knows yet.
    AtLeast(f64),
    /// Seconds of this pass and, at the rates of the last ones, of those after it.
    About(f64),
}

/// Measures passes.
#[derive(Debug, Default)]
pub struct Estimator {
    round: u32,
    began: f64,
    done: u64,
    total: u64,
    /// Seconds and pages done, over the last [`WINDOW_SECONDS`].
    recent: VecDeque<(f64, u64)>,
    /// Pages that became dirty per second during the last whole pass.
    dirty_rate: Option<f64>,
}

impl Estimator {
    /// A pass of so many pages begins at this time.
    pub fn round(&mut self, seconds: f64, number: u32, pages: Option<u64>) {
        let lasted = seconds - self.began;
        if let Some(pages) = pages.filter(|_| number > 1 && number == self.round + 1 && lasted > 0.0) {
            self.dirty_rate = Some(pages as f64 / lasted);
        }
        (self.round, self.began, self.done) = (number, seconds, 0);
        self.total = pages.unwrap_or(0);
        self.recent.clear();
    }

    /// The pass is this far.
    pub fn progress(&mut self, seconds: f64, done: u64, total: u64) {
        if done < self.done {
            self.recent.clear();
        }
        (self.done, self.total) = (done, total);
        self.recent.push_back((seconds, done));
        while self.recent.len() > 2
            && self.recent.get(1).is_some_and(|(at, _)| *at < seconds - WINDOW_SECONDS)
        {
            self.recent.pop_front();
        }
    }

    /// Pages per second, measured up to now.
    fn rate(&self, now: f64) -> Option<f64> {
        let (from, done) = *self.recent.front()?;
        let (seconds, pages) = (now - from, self.done.saturating_sub(done) as f64);
        (seconds >= FIRST_SECONDS && pages > 0.0).then(|| pages / seconds)
    }

    /// What can be said now.
    pub fn remaining(&self, now: f64) -> Remaining {
        // Of a pass whose pages nobody has counted, nobody knows how many are left.
        let Some(rate) = self.rate(now).filter(|_| self.total > 0) else { return Remaining::Unknown };
        let left = self.total.saturating_sub(self.done) as f64 / rate;
        let Some(dirty_rate) = self.dirty_rate else { return Remaining::AtLeast(left) };
        // Each pass after this one sends what became dirty during the one before it.
        let mut pass = now - self.began + left;
        let mut all = left;
        for number in self.round.saturating_add(1)..=MOST_ROUNDS + 1 {
            // So does the policy, unless it was told to go on when passes no longer shrink. It may stop sooner, too: then it was less.
            if number > STOCK_ROUNDS + 1 && dirty_rate >= rate {
                break;
            }
            let pages = dirty_rate * pass;
            pass = pages / rate;
            all += pass;
            if pages < FEW_DIRTY_PAGES as f64 {
                break;
            }
        }
        Remaining::About(all)
    }
}

impl std::fmt::Display for Remaining {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let time = |seconds: f64| match seconds.ceil() as u64 {
            seconds @ 0..120 => format!("{seconds} s"),
            seconds @ 120..7200 => format!("{} min", seconds.div_ceil(60)),
            seconds => format!("{:.1} h", seconds as f64 / 3600.0),
        };
        match self {
            Self::Unknown => f.write_str("time left unknown"),
            Self::AtLeast(seconds) => write!(f, "{} left at least", time(*seconds)),
            Self::About(seconds) => write!(f, "about {} left", time(*seconds)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes at `rate` pages per second while `dirty` become dirty per second: what was said each second, and when it was over.
    fn simulate(pages: u64, rate: f64, dirty: f64) -> (Vec<(f64, Remaining)>, f64) {
        let (mut estimator, mut said) = (Estimator::default(), Vec::new());
        let (mut now, mut left, mut number) = (0.0, pages, 1);
        loop {
            estimator.round(now, number, Some(left));
            let began = now;
            let end = began + left as f64 / rate;
            while now < end {
                let done = ((now - began) * rate) as u64;
                estimator.progress(now, done, left);
                said.push((now, estimator.remaining(now)));
                now += 1.0;
            }
            now = end;
            if number > STOCK_ROUNDS || left < FEW_DIRTY_PAGES {
                return (said, now);
            }
            (left, number) = (((end - began) * dirty) as u64, number + 1);
        }
    }

    #[test]
    fn a_steady_migration_is_foretold() {
        let (said, end) = simulate(100_000, 1000.0, 200.0);
        assert_eq!(said[0].1, Remaining::Unknown);
        for &(at, remaining) in &said[4..] {
            match remaining {
                // In the first pass only its own end is known.
                Remaining::AtLeast(left) => assert!(at < 100.0 && (left - (100.0 - at)).abs() < 2.0),
                Remaining::About(left) => assert!((left - (end - at)).abs() < 0.1 * (end - at) + 2.0, "{at}"),
                Remaining::Unknown => assert!(!(4.0..=99.0).contains(&at), "nothing is said at {at}"),
            }
        }
        assert!(said.iter().any(|(_, remaining)| matches!(remaining, Remaining::About(_))));
    }

    #[test]
    fn what_does_not_move_is_not_foretold() {
        let mut estimator = Estimator::default();
        estimator.round(0.0, 1, Some(1000));
        estimator.progress(0.0, 0, 1000);
        assert_eq!(estimator.remaining(60.0), Remaining::Unknown);
        estimator.progress(61.0, 100, 1000);
        estimator.progress(64.0, 400, 1000);
        assert!(matches!(estimator.remaining(64.0), Remaining::AtLeast(_)));
    }

    #[test]
    fn a_pass_that_nobody_has_counted_is_not_foretold() {
        let mut estimator = Estimator::default();
        estimator.round(0.0, 7, None);
        estimator.progress(0.0, 0, 0);
        estimator.progress(5.0, 500, 0);
        assert_eq!(estimator.remaining(5.0), Remaining::Unknown);
    }

    #[test]
    fn one_that_does_not_converge_ends_where_the_policy_ends_it() {
        let (said, end) = simulate(100_000, 1000.0, 1500.0);
        let (at, last) = said.iter().rev().find(|(_, left)| matches!(left, Remaining::About(_))).unwrap();
        let Remaining::About(left) = last else { unreachable!() };
        assert!(left.is_finite() && *left < 20.0 * (end - at) + 10.0);
    }
}
