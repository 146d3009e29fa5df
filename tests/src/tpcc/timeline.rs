//! What was done in each second, as lines of JSON.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::TpccError;
use super::transactions::{Ended, Kind};

/// Counters that all terminals share.
#[derive(Debug, Default)]
pub struct Counters {
    new_order: AtomicU64,
    payment: AtomicU64,
    order_status: AtomicU64,
    delivery: AtomicU64,
    stock_level: AtomicU64,
    rolled_back: AtomicU64,
    retries: AtomicU64,
    /// Longest transaction since the counters were last read.
    slowest_microseconds: AtomicU64,
}

impl Counters {
    /// Counts a transaction that came to its end.
    pub fn count(&self, kind: Kind, ended: Ended, took: Duration) {
        let counter = match (ended, kind) {
            (Ended::RolledBack, _) => &self.rolled_back,
            (_, Kind::NewOrder) => &self.new_order,
            (_, Kind::Payment) => &self.payment,
            (_, Kind::OrderStatus) => &self.order_status,
            (_, Kind::Delivery) => &self.delivery,
            (_, Kind::StockLevel) => &self.stock_level,
        };
        counter.fetch_add(1, Relaxed);
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.slowest_microseconds.fetch_max(microseconds, Relaxed);
    }

    /// Counts a try that a deadlock or a lock wait ended.
    pub fn retried(&self) {
        self.retries.fetch_add(1, Relaxed);
    }

    fn totals(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        Counts {
            new_order: read(&self.new_order),
            payment: read(&self.payment),
            order_status: read(&self.order_status),
            delivery: read(&self.delivery),
            stock_level: read(&self.stock_level),
            rolled_back: read(&self.rolled_back),
            retries: read(&self.retries),
        }
    }
}

/// Transactions by kind; those that were rolled back are none of the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// New-Order, committed.
    pub new_order: u64,
    /// Payment.
    pub payment: u64,
    /// Order-Status.
    pub order_status: u64,
    /// Delivery.
    pub delivery: u64,
    /// Stock-Level.
    pub stock_level: u64,
    /// New-Order, rolled back as the standard wants it.
    pub rolled_back: u64,
    /// Tries that had to be made again.
    pub retries: u64,
}

impl Counts {
    /// Committed transactions.
    pub fn committed(&self) -> u64 {
        self.new_order + self.payment + self.order_status + self.delivery + self.stock_level
    }

    fn since(self, before: Self) -> Self {
        Self {
            new_order: self.new_order - before.new_order,
            payment: self.payment - before.payment,
            order_status: self.order_status - before.order_status,
            delivery: self.delivery - before.delivery,
            stock_level: self.stock_level - before.stock_level,
            rolled_back: self.rolled_back - before.rolled_back,
            retries: self.retries - before.retries,
        }
    }
}

/// A line of the time line, or the last one, which has the sums.
#[derive(Debug, Serialize)]
struct Line {
    /// Seconds on the monotonic clock since the run began, at the end of this step. It stands still while a guest is suspended.
    monotonic: f64,
    /// The wall clock at that moment, in seconds since 1970: it shows the time that the monotonic one leaves out.
    wall: f64,
    /// Length of the step on the monotonic clock.
    seconds: f64,
    /// Committed transactions in it.
    committed: u64,
    #[serde(flatten)]
    counts: Counts,
    /// The longest transaction that ended in it.
    slowest_milliseconds: f64,
    /// True in the last line only, which is of the whole run.
    summary: bool,
}

/// Writes a line for each step until told to end; the sums.
///
/// # Errors
/// When a line cannot be written.
pub fn write(
    counters: &Counters,
    out: &mut impl Write,
    step: Duration,
    mut go_on: impl FnMut() -> bool,
) -> Result<Counts, TpccError> {
    let start = Instant::now();
    let (mut before, mut last, mut next) = (Counts::default(), start, start + step);
    let mut slowest_of_all = 0;
    let mut going = true;
    while going {
        loop {
            going = go_on();
            let left = next.saturating_duration_since(Instant::now());
            if !going || left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(Duration::from_millis(20)));
        }
        let (now, counts) = (Instant::now(), counters.totals());
        let slowest = counters.slowest_microseconds.swap(0, Relaxed);
        slowest_of_all = slowest_of_all.max(slowest);
        let done = counts.since(before);
        let length = (now - last).as_secs_f64();
        line(out, start, length, done, slowest, false)?;
        // A step that came late is a long one; the next still ends where it would have.
        while next <= now {
            next += step;
        }
        (before, last) = (counts, now);
    }
    let counts = counters.totals();
    line(out, start, start.elapsed().as_secs_f64(), counts, slowest_of_all, true)?;
    Ok(counts)
}

fn line(
    out: &mut impl Write,
    start: Instant,
    seconds: f64,
    counts: Counts,
    slowest_microseconds: u64,
    summary: bool,
) -> Result<(), TpccError> {
    let line = Line {
        monotonic: start.elapsed().as_secs_f64(),
        // A wall clock before 1970 is no time at all: it counts as 0.
        wall: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
        seconds,
        committed: counts.committed(),
        counts,
        // Exact: a transaction of 2^53 us would take centuries.
        slowest_milliseconds: slowest_microseconds as f64 / 1e3,
        summary,
    };
    let mut text = serde_json::to_string(&line).map_err(std::io::Error::other)?;
    text.push('\n');
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_add_up_to_the_summary() {
        let counters = Counters::default();
        let mut out = Vec::new();
        let mut looks = 0;
        let sums = write(&counters, &mut out, Duration::from_millis(1), || {
            counters.count(Kind::Payment, Ended::Committed, Duration::from_millis(3));
            counters.count(Kind::NewOrder, Ended::RolledBack, Duration::from_millis(1));
            looks += 1;
            looks < 10
        })
        .unwrap();
        let lines: Vec<serde_json::Value> =
            String::from_utf8(out).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let (summary, steps) = lines.split_last().unwrap();
        let sum = |name: &str| steps.iter().map(|line| line[name].as_u64().unwrap()).sum::<u64>();
        assert_eq!(summary["summary"], true);
        assert!(steps.iter().all(|line| line["summary"] == false));
        assert_eq!((sum("committed"), sum("payment"), sum("rolled_back")), (10, 10, 10));
        assert_eq!((sums.committed(), sums.rolled_back), (10, 10));
        assert_eq!(summary["slowest_milliseconds"], 3.0);
    }
}
