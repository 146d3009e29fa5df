//! Deliberately wrong hints: a test aid, which shows that a wrong hint cannot change a byte of the guest.

use enlightenment::PAGE_SIZE;
use enlightenment::device::UserRun;

/// Makes runs wrong, the same ones for the same seed: about one in four.
#[derive(Clone, Debug)]
pub struct WrongHints {
    state: u64,
    /// Runs that were made wrong.
    made_wrong: u64,
}

impl WrongHints {
    /// Begins with a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed, made_wrong: 0 }
    }

    /// Shifts the offsets of some runs by up to 64 pages, and swaps the addresses of others with that of the run before.
    pub fn spoil(&mut self, runs: &mut [UserRun]) {
        for index in 0..runs.len() {
            let dice = self.next();
            let (before, rest) = runs.split_at_mut(index);
            let Some(run) = rest.first_mut() else { continue };
            match dice % 8 {
                0 => {
                    let pages = 1 + (dice >> 8) % 64;
                    run.disk_offset = run.disk_offset.saturating_add(pages * PAGE_SIZE as u64);
                    self.made_wrong += 1;
                }
                1 => {
                    // Of equal length, so that both stay inside the frames that were meant.
                    let other = before.iter_mut().rev().take(64).find(|other| other.pages == run.pages);
                    if let Some(other) = other {
                        std::mem::swap(&mut run.address, &mut other.address);
                        self.made_wrong += 2;
                    }
                }
                _ => {}
            }
        }
    }

    /// Runs that were made wrong so far.
    pub fn made_wrong(&self) -> u64 {
        self.made_wrong
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.state;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs() -> Vec<UserRun> {
        let run = |index: u64| UserRun {
            address: 0x10_0000 + index * 0x8000,
            disk_offset: 0x100_0000 + index * 0x1_0000,
            vdev: 51712,
            pages: 4,
            list: 1,
            reserved: 0,
        };
        (0..1000).map(run).collect()
    }

    #[test]
    fn some_hints_are_wrong_and_the_same_ones_each_time() {
        let (mut once, mut again) = (runs(), runs());
        let mut hints = WrongHints::new(7);
        hints.spoil(&mut once);
        WrongHints::new(7).spoil(&mut again);
        assert_eq!(once, again);
        let wrong = once.iter().zip(runs()).filter(|(spoiled, right)| *spoiled != right).count() as u64;
        assert!((100..500).contains(&wrong), "{wrong} of 1000");
        assert!(hints.made_wrong() >= wrong);
        assert!(once.iter().all(|run| run.disk_offset.is_multiple_of(512)));
        let mut other = runs();
        WrongHints::new(8).spoil(&mut other);
        assert_ne!(once, other);
    }
}
