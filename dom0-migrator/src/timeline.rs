//! What a migration did from second to second: counters, looked at about once a second, in bounded number.
//!
//! Samples hold running counters, so that leaving samples out loses resolution and no byte.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::engine::{RefusalCounts, SourceStats, TargetStats, WayCounts};

/// How often counters are looked at.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// Most samples that are kept of one side: when there are more, every other one is left out.
pub const SAMPLES_MAX: usize = 240;
/// Most marks that are kept.
pub const MARKS_MAX: usize = 256;

/// Anything with a time.
pub trait At {
    /// Seconds since the beginning of whatever it is a sample of.
    fn seconds(&self) -> f64;
}

/// The source's filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceSample {
    /// Seconds since the helper began.
    pub seconds: f64,
    /// Passes begun.
    pub rounds: u32,
    /// Pages by the way that they went, up to now.
    pub ways: WayCounts,
    /// Bytes taken from libxenguest.
    pub bytes_in: u64,
    /// Bytes written to the network.
    pub bytes_out: u64,
    /// Of these: contents of pages.
    pub bytes_page_data: u64,
    /// Of these: references.
    pub bytes_references: u64,
    /// Of these: markers.
    pub bytes_markers: u64,
    /// Pages retained until their references are settled: how full the window is.
    pub window_pages: u64,
    /// Time spent hashing so far.
    pub hashing_seconds: f64,
    /// Pages left for a later pass, each time.
    #[serde(default)]
    pub pages_left_out: u64,
}

impl SourceSample {
    /// Of the counters at a moment.
    pub fn new(elapsed: Duration, stats: &SourceStats) -> Self {
        Self {
            seconds: milliseconds(elapsed.as_secs_f64()),
            rounds: stats.rounds,
            ways: stats.ways,
            bytes_in: stats.bytes_in,
            bytes_out: stats.bytes_out,
            bytes_page_data: stats.bytes_page_data,
            bytes_references: stats.bytes_references,
            bytes_markers: stats.bytes_markers,
            window_pages: stats.references_outstanding,
            pages_left_out: stats.pages_left_out,
            hashing_seconds: milliseconds(stats.hashing_seconds),
        }
    }

    /// Bytes that are neither contents, references nor markers.
    pub fn bytes_other(&self) -> u64 {
        let classes = [self.bytes_page_data, self.bytes_references, self.bytes_markers];
        classes.into_iter().fold(self.bytes_out, u64::saturating_sub)
    }
}

/// The target's filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetSample {
    /// Seconds since the helper began.
    pub seconds: f64,
    /// Bytes taken from the network.
    pub bytes_in: u64,
    /// Bytes handed to libxenguest.
    pub bytes_out: u64,
    /// References accepted.
    pub accepted: u64,
    /// References refused.
    pub refused: u64,
    /// References for which libxenguest has nothing yet.
    pub outstanding: u64,
    /// Reads from disks.
    pub disk_reads: u64,
    /// Bytes read from disks.
    pub disk_bytes: u64,
    /// Time that all readers spent reading.
    pub disk_seconds: f64,
    /// Time that all readers spent hashing.
    pub hashing_seconds: f64,
}

impl TargetSample {
    /// Of the counters at a moment.
    pub fn new(elapsed: Duration, stats: &TargetStats) -> Self {
        Self {
            seconds: milliseconds(elapsed.as_secs_f64()),
            bytes_in: stats.bytes_in,
            bytes_out: stats.bytes_out,
            accepted: stats.references_accepted,
            refused: RefusalCounts::total(&stats.refused),
            outstanding: stats.references_outstanding,
            disk_reads: stats.disk_reads,
            disk_bytes: stats.disk_bytes,
            disk_seconds: milliseconds(stats.disk_seconds),
            hashing_seconds: milliseconds(stats.hashing_seconds),
        }
    }
}

/// The connections, as the kernel counts them: of a migration with libxl's own helper nothing more can be seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WireSample {
    /// Seconds since the command began.
    pub seconds: f64,
    /// Bytes on all connections, both directions.
    pub bytes: u64,
}

/// Something that happened at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// Seconds since the source's helper began.
    pub seconds: f64,
    /// What.
    pub what: Moment,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Moment {
    /// libxenguest begins a pass over memory.
    Round {
        /// 1 is the first.
        number: u32,
        /// Pages that are to be sent in it, when that is known.
        pages: Option<u64>,
    },
    /// The window begins to drain.
    Drain,
    /// It has drained.
    Drained,
    /// The domain is suspended.
    Suspended,
}

macro_rules! at {
    ($($sample:ty),*) => {$(
        impl At for $sample {
            fn seconds(&self) -> f64 {
                self.seconds
            }
        }
    )*};
}
at!(SourceSample, TargetSample, WireSample, Mark);

/// To the millisecond: more digits are noise, and make files long.
pub fn milliseconds(seconds: f64) -> f64 {
    (seconds * 1e3).round() / 1e3
}

/// Keeps samples, evenly spread, and the last one.
#[derive(Clone, Debug)]
pub struct Recorder<S> {
    kept: Vec<S>,
    last: Option<S>,
    pushed: u64,
    stride: u64,
}

impl<S> Default for Recorder<S> {
    fn default() -> Self {
        Self { kept: Vec::new(), last: None, pushed: 0, stride: 1 }
    }
}

impl<S: Copy + At> Recorder<S> {
    /// Takes a sample. One that is not later than the one before takes its place.
    pub fn push(&mut self, sample: S) {
        if self.last.as_ref().is_some_and(|last| last.seconds() >= sample.seconds()) {
            return;
        }
        if self.pushed.is_multiple_of(self.stride) {
            if self.kept.len() + 1 >= SAMPLES_MAX {
                let mut index = 0;
                self.kept.retain(|_| {
                    index += 1;
                    index % 2 == 1
                });
                self.stride *= 2;
            }
            if self.pushed.is_multiple_of(self.stride) {
                self.kept.push(sample);
            }
        }
        self.pushed += 1;
        self.last = Some(sample);
    }

    /// The sample that came last.
    pub fn last(&self) -> Option<S> {
        self.last
    }

    /// All that were kept, and the last one: [`SAMPLES_MAX`] at most.
    pub fn finish(mut self) -> Vec<S> {
        if let Some(last) = self.last
            && self.kept.last().is_some_and(|kept| kept.seconds() < last.seconds())
        {
            self.kept.push(last);
        }
        self.kept
    }
}

/// Does something about once a [`INTERVAL`], on a thread of its own, until it is ended.
#[derive(Debug)]
pub struct Ticker {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    /// Starts; `tick` is given the time since `began`.
    ///
    /// # Errors
    /// What the system says, when no thread can be had.
    pub fn start(began: Instant, mut tick: impl FnMut(Duration) + Send + 'static) -> std::io::Result<Self> {
        let (end, ended) = channel();
        let thread = std::thread::Builder::new().name("sampler".into()).spawn(move || {
            while ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                tick(began.elapsed());
            }
            tick(began.elapsed());
        })?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Ticker {
    /// A last tick, then the end.
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What is wrong with samples that came from elsewhere.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplesProblem {
    /// Too many.
    #[error("{found} of them: at most {most} are kept")]
    Number {
        /// How many.
        found: usize,
        /// How many may be.
        most: usize,
    },
    /// Time that does not go on.
    #[error("number {index} is at {seconds} s, which is not a time after the one before")]
    Time {
        /// Which.
        index: usize,
        /// Its time.
        seconds: f64,
    },
}

/// Checks that samples are few, and ascend in time (`strictly`, or at least do not go back).
///
/// # Errors
/// The first thing that is wrong.
pub fn check<S: At>(samples: &[S], most: usize, strictly: bool) -> Result<(), SamplesProblem> {
    if samples.len() > most {
        return Err(SamplesProblem::Number { found: samples.len(), most });
    }
    let mut before = -1.0;
    for (index, sample) in samples.iter().enumerate() {
        let seconds = sample.seconds();
        let ascends = if strictly { seconds > before } else { seconds >= before };
        if !ascends || !(0.0..1e9).contains(&seconds) {
            return Err(SamplesProblem::Time { index, seconds });
        }
        before = seconds;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> WireSample {
        WireSample { seconds, bytes: seconds as u64 * 10 }
    }

    #[test]
    fn a_long_migration_has_few_samples_from_end_to_end() {
        for length in [1, 2, 239, 240, 241, 1000, 86_400, 123_457] {
            let mut recorder = Recorder::default();
            (0..length).for_each(|second| recorder.push(at(f64::from(second))));
            let kept = recorder.finish();
            assert!(kept.len() <= SAMPLES_MAX, "{} of {length}", kept.len());
            assert!(kept.len() >= SAMPLES_MAX / 2 - 1 || kept.len() == length as usize);
            assert_eq!((kept[0], kept[kept.len() - 1]), (at(0.0), at(f64::from(length - 1))));
            assert_eq!(check(&kept, SAMPLES_MAX, true), Ok(()));
            let widest = kept.windows(2).map(|pair| pair[1].seconds - pair[0].seconds).fold(0.0, f64::max);
            assert!(widest <= f64::from(length) / f64::from(SAMPLES_MAX as u32 / 2 - 2) + 1.0, "{widest}");
        }
    }

    #[test]
    fn time_goes_on_or_is_refused() {
        let mut recorder = Recorder::default();
        [1.0, 1.0, 0.5, 2.0].into_iter().for_each(|seconds| recorder.push(at(seconds)));
        assert_eq!(recorder.finish(), [at(1.0), at(2.0)]);
        assert!(matches!(check(&[at(2.0), at(1.0)], 9, true), Err(SamplesProblem::Time { index: 1, .. })));
        assert!(matches!(check(&[at(f64::NAN)], 9, true), Err(SamplesProblem::Time { index: 0, .. })));
        assert!(matches!(check(&[at(1e12)], 9, false), Err(SamplesProblem::Time { index: 0, .. })));
        assert!(matches!(check(&[at(1.0); 3], 2, false), Err(SamplesProblem::Number { found: 3, most: 2 })));
        assert_eq!(check(&[at(1.0); 2], 2, false), Ok(()));
    }

    #[test]
    fn a_ticker_ticks_once_more_when_it_ends() {
        let (tell, told) = channel();
        drop(Ticker::start(Instant::now(), move |elapsed| tell.send(elapsed).unwrap()).unwrap());
        assert_eq!(told.iter().count(), 1);
    }
}
