//! Rates out of running counters.

use crate::timeline::At;

/// A step: from this time to that, so much per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// From.
    pub from: f64,
    /// To.
    pub to: f64,
    /// How much.
    pub value: f64,
}

/// What a counter grew by per second, between each two samples; `shift` is added to all times. The first sample is measured against
/// zero at `began`.
pub fn rates<S: At>(samples: &[S], shift: f64, began: f64, counter: impl Fn(&S) -> u64) -> Vec<Step> {
    let mut before = (began, 0);
    let mut steps = Vec::with_capacity(samples.len());
    for sample in samples {
        let now = (sample.seconds(), counter(sample));
        if now.0 > before.0 {
            // A counter of a foreign file may go down.
            let value = now.1.saturating_sub(before.1) as f64 / (now.0 - before.0);
            steps.push(Step { from: before.0 + shift, to: now.0 + shift, value });
        }
        before = now;
    }
    steps
}

/// A value that holds from each sample to the next.
pub fn levels<S: At>(samples: &[S], shift: f64, level: impl Fn(&S) -> f64) -> Vec<Step> {
    samples
        .windows(2)
        .filter_map(|pair| {
            let [before, after] = pair else { return None };
            let value = (level(before) + level(after)) / 2.0;
            Some(Step { from: before.seconds() + shift, to: after.seconds() + shift, value })
        })
        .collect()
}

/// The largest value.
pub fn most(steps: &[Step]) -> f64 {
    steps.iter().map(|step| step.value).fold(0.0, f64::max)
}

/// A counter at a time, between samples as if it grew evenly.
pub fn at_time<S: At>(samples: &[S], seconds: f64, counter: impl Fn(&S) -> u64) -> f64 {
    let mut before = (0.0, 0.0);
    for sample in samples {
        let now = (sample.seconds(), counter(sample) as f64);
        if now.0 >= seconds {
            let part = if now.0 > before.0 { (seconds - before.0) / (now.0 - before.0) } else { 1.0 };
            return before.1 + (now.1 - before.1) * part.clamp(0.0, 1.0);
        }
        before = now;
    }
    before.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::WireSample;

    #[test]
    fn rates_are_differences() {
        let samples = [(1.0, 10), (3.0, 50), (4.0, 40)].map(|(seconds, bytes)| WireSample { seconds, bytes });
        let steps = rates(&samples, 0.5, 0.5, |sample| sample.bytes);
        assert_eq!(steps[0], Step { from: 1.0, to: 1.5, value: 20.0 });
        assert_eq!(steps[1], Step { from: 1.5, to: 3.5, value: 20.0 });
        assert_eq!(steps[2].value, 0.0);
        assert_eq!(most(&steps), 20.0);
        assert_eq!(at_time(&samples, 2.0, |sample| sample.bytes), 30.0);
        assert_eq!(at_time(&samples, 9.0, |sample| sample.bytes), 40.0);
        assert_eq!(levels(&samples, 0.0, |sample| sample.bytes as f64)[0].value, 30.0);
    }
}
