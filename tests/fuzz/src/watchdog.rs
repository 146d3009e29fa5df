//! Whether one input takes too long, on a machine that may be busy or asleep.
//!
//! libFuzzer's own limit goes by the clock: a process that is starved, frozen or moved to another host while it works on an input would be a
//! finding there. This one goes by what the process has had of the processors, and by how often it was looked at.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Time of the processors for one input; one that takes more is a finding.
const MOST: Duration = Duration::from_secs(30);
/// Between two looks.
const BETWEEN: Duration = Duration::from_secs(1);
/// Looks at which the process has got nowhere with an input: its threads wait for each other. A frozen process is not looked at.
const IDLE_LOOKS: u32 = 120;
/// Less than this between two looks is what waiting costs.
const NOTHING: Duration = Duration::from_millis(2);

/// The number of the input that is being run; even when none is.
static RUN: AtomicU64 = AtomicU64::new(0);

/// Runs a target on an input while it is watched.
pub fn watched(run: impl FnOnce()) {
    RUN.fetch_add(1, Ordering::Relaxed);
    run();
    RUN.fetch_add(1, Ordering::Relaxed);
}

/// Ends the process, as a panic of the target would, when an input takes too long. libFuzzer keeps the input then.
pub fn start() {
    std::thread::spawn(|| {
        let mut watch = Watch::default();
        loop {
            std::thread::sleep(BETWEEN);
            if let Some(problem) = watch.look(RUN.load(Ordering::Relaxed), spent()) {
                // In the words that a finding is looked for by.
                eprintln!("the watchdog panicked at this input: {problem}");
                std::process::abort();
            }
        }
    });
}

/// What this process has had of the processors.
fn spent() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// What was seen at the looks before.
#[derive(Debug, Default)]
struct Watch {
    run: u64,
    /// Processor time when the input was first seen, and when it last got on.
    began: Duration,
    last: Duration,
    idle_looks: u32,
}

impl Watch {
    fn look(&mut self, run: u64, spent: Duration) -> Option<String> {
        if run != self.run || run.is_multiple_of(2) {
            *self = Self { run, began: spent, last: spent, idle_looks: 0 };
            return None;
        }
        if spent.saturating_sub(self.last) < NOTHING {
            self.idle_looks += 1;
        } else {
            self.idle_looks = 0;
        }
        self.last = spent;
        let took = spent.saturating_sub(self.began);
        if took > MOST {
            return Some(format!("it has taken {} s of the processors", took.as_secs()));
        }
        (self.idle_looks >= IDLE_LOOKS)
            .then(|| format!("its threads have waited for each other at {IDLE_LOOKS} looks in turn"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(mut at: impl FnMut(u64) -> (u64, Duration), count: u64) -> Option<(u64, String)> {
        let mut watch = Watch::default();
        (0..count).find_map(|look| {
            let (run, spent) = at(look);
            Some((look, watch.look(run, spent)?))
        })
    }

    #[test]
    fn an_input_that_keeps_the_processors_is_a_finding() {
        let (look, problem) = looks(|look| (7, Duration::from_secs(look)), 100).unwrap();
        assert_eq!((look, problem.as_str()), (31, "it has taken 31 s of the processors"));
        // One input after the other, each of them short.
        assert_eq!(looks(|look| (2 * look + 1, Duration::from_secs(look)), 1000), None);
        // Between two inputs, as when a corpus is read.
        assert_eq!(looks(|look| (8, Duration::from_secs(look)), 1000), None);
    }

    #[test]
    fn threads_that_wait_for_each_other_are_a_finding_and_a_starved_process_is_not() {
        let (look, _) = looks(|_| (7, Duration::from_secs(3)), 1000).unwrap();
        assert_eq!(look, u64::from(IDLE_LOOKS));
        // A hundredth of a processor, and a breath of it at every hundredth look.
        assert_eq!(looks(|look| (7, Duration::from_millis(10 * look)), 2000), None);
        assert_eq!(looks(|look| (7, Duration::from_millis(look / 100 * 10)), 2000), None);
    }

    #[test]
    fn the_processors_time_is_counted() {
        let before = spent();
        while spent() == before {
            std::hint::black_box((0..1000).sum::<u64>());
        }
        assert!(spent() > before);
    }
}
