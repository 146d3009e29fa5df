//! How many reads are kept in flight.
//!
//! As few as the disk needs: what waits in the queue instead can still be merged, superseded and cancelled. So the depth begins low, and is
//! doubled as long as that brings more bytes a second; when it no longer does, the last step is taken back, and tried again
//! after a while, since disks are shared.

use std::time::Duration;

/// Rate that a step must bring to be kept, in hundredths of the one before.
const WORTH_IT: u64 = 110;
/// Measurements for which a depth that was not worth raising is kept.
const REST: u32 = 32;

/// The depth, and what it is judged by.
#[derive(Debug)]
pub(super) struct Depth {
    now: usize,
    most: usize,
    /// The measurement under way.
    reads: usize,
    bytes: u64,
    began: Duration,
    /// Bytes a second of the last one, and whether the depth was raised after it.
    last_rate: u64,
    raised: bool,
    rest: u32,
}

impl Depth {
    /// Between `first` and `most` reads.
    pub(super) fn new(first: usize, most: usize) -> Self {
        let most = most.max(1);
        Self {
            now: first.clamp(1, most),
            most,
            reads: 0,
            bytes: 0,
            began: Duration::ZERO,
            last_rate: 0,
            raised: false,
            rest: 0,
        }
    }

    /// Reads to be kept in flight.
    pub(super) fn get(&self) -> usize {
        self.now
    }

    /// Nothing, or less than could be, is in flight: what was measured so far says nothing of the disk.
    pub(super) fn was_idle(&mut self, at: Duration) {
        (self.reads, self.bytes, self.began) = (0, 0, at);
    }

    /// A read of so many bytes was completed at this time, and there was more to read.
    pub(super) fn completed(&mut self, bytes: u64, at: Duration) {
        self.reads += 1;
        self.bytes += bytes;
        if self.reads < (4 * self.now).max(16) {
            return;
        }
        let elapsed = at.saturating_sub(self.began).as_micros().max(1) as u64;
        let rate = self.bytes.saturating_mul(1_000_000) / elapsed;
        self.was_idle(at);
        if self.raised && rate.saturating_mul(100) < self.last_rate.saturating_mul(WORTH_IT) {
            self.now = (self.now / 2).max(1);
            (self.raised, self.rest) = (false, REST);
        } else if self.rest > 0 {
            self.rest -= 1;
            self.last_rate = rate;
        } else {
            let next = (self.now * 2).min(self.most);
            (self.raised, self.last_rate) = (next > self.now, rate);
            self.now = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk whose rate grows with the depth up to `enough`; the depth at the end and the highest one seen.
    fn settle(enough: usize, most: usize) -> (usize, usize) {
        let mut depth = Depth::new(2, most);
        let (mut at, mut highest) = (Duration::ZERO, 0);
        for _ in 0..20_000 {
            at += Duration::from_micros(1000 / depth.get().min(enough) as u64);
            depth.completed(65_536, at);
            highest = highest.max(depth.get());
        }
        (depth.get(), highest)
    }

    #[test]
    fn it_rises_as_long_as_that_helps() {
        for enough in [1, 4, 16] {
            let (end, highest) = settle(enough, 64);
            assert!(end >= enough && highest <= 2 * enough.max(2), "{enough}: {end}, {highest}");
        }
        assert_eq!(settle(64, 8), (8, 8));
    }

    #[test]
    fn a_depth_of_one_stays() {
        assert_eq!(settle(16, 1), (1, 1));
        assert_eq!(Depth::new(9, 0).get(), 1);
    }
}
