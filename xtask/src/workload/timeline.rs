//! What a load did in each second, from the lines that it wrote.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// One step of a time line.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Second {
    /// Its end, in seconds since 1970 by the guest's wall clock.
    pub wall: f64,
    /// Its length by the guest's monotonic clock, which stands still while the guest is suspended.
    pub seconds: f64,
    /// Transactions that were committed in it.
    pub committed: f64,
}

/// A line of `tpcc run`.
#[derive(Deserialize)]
struct Tpcc {
    wall: f64,
    seconds: f64,
    committed: f64,
    summary: bool,
}

/// Reads the lines of `tpcc run`, or of sysbench with `--report-interval=1`, each behind the wall clock and a space. Other lines are
/// left out.
///
/// # Errors
/// When a line that has transactions in it has them in another form, or time goes back.
pub fn parse(log: &str) -> Result<Vec<Second>> {
    let mut steps: Vec<Second> = Vec::new();
    // sysbench says at which second a line is, not how long its step was.
    let mut reported = 0.0;
    for line in log.lines() {
        let Some((stamp, words)) = line.split_once(' ') else { continue };
        let step = if words.starts_with('{') {
            let line: Tpcc = serde_json::from_str(words).with_context(|| format!("cannot read {words:?}"))?;
            if line.summary {
                continue;
            }
            Second { wall: line.wall, seconds: line.seconds, committed: line.committed }
        } else if let Some((at, rate)) = sysbench(words) {
            let wall = stamp.parse().with_context(|| format!("no time before {words:?}"))?;
            let at: f64 = at.parse().with_context(|| format!("no second in {words:?}"))?;
            let rate: f64 = rate.parse().with_context(|| format!("no rate in {words:?}"))?;
            let seconds = at - reported;
            reported = at;
            Second { wall, seconds, committed: rate * seconds }
        } else {
            continue;
        };
        ensure!(
            step.wall.is_finite() && step.seconds >= 0.0 && step.committed >= 0.0,
            "a step of a time line cannot be {step:?}"
        );
        ensure!(
            steps.last().is_none_or(|last| last.wall <= step.wall),
            "the time line goes back at {words:?}"
        );
        steps.push(step);
    }
    Ok(steps)
}

/// The second and the rate in `[ 1s ] thds: 2 tps: 10.00 qps: 200.00 (...) ...`.
fn sysbench(words: &str) -> Option<(&str, &str)> {
    let (at, rest) = words.strip_prefix("[ ")?.split_once("s ]")?;
    let (_, rate) = rest.split_once(" tps: ")?;
    Some((at, rate.split(' ').next()?))
}

/// Transactions a second of wall clock, of the steps that end between two moments; none where there is no whole step.
pub fn mean_between(steps: &[Second], from: f64, to: f64) -> Option<f64> {
    let mut committed = 0.0;
    let (mut first, mut last) = (None, None);
    for pair in steps.windows(2) {
        let (before, step) = (pair[0], pair[1]);
        // A step begins where the one before ended.
        if before.wall >= from && step.wall <= to {
            committed += step.committed;
            first.get_or_insert(before.wall);
            last = Some(step.wall);
        }
    }
    let length = last? - first?;
    (length > 0.0).then(|| committed / length)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYSBENCH: &str = "\
1795460287.000000 Threads started!
1795460287.000010
1795460288.000000 [ 1s ] thds: 2 tps: 10.00 qps: 220.00 (r/w/o: 150.00/46.00/24.00) lat (ms,95%): 31.94 err/s: 0.00 reconn/s: 0.00
1795460289.000000 [ 2s ] thds: 2 tps: 12.00 qps: 240.00 (r/w/o: 168.00/48.00/24.00) lat (ms,95%): 30.00 err/s: 0.00 reconn/s: 0.00
1795460293.000000 [ 3s ] thds: 2 tps: 4.00 qps: 80.00 (r/w/o: 56.00/16.00/8.00) lat (ms,95%): 3000.00 err/s: 0.00 reconn/s: 0.00
";

    #[test]
    fn sysbench_s_lines_are_stamped_by_the_wall_clock() {
        let steps = parse(SYSBENCH).unwrap();
        assert_eq!(steps.len(), 3);
        assert_eq!(steps[1], Second { wall: 1_795_460_289.0, seconds: 1.0, committed: 12.0 });
        // Suspended for three seconds that sysbench does not know of.
        assert_eq!(steps[2].wall - steps[1].wall, 4.0);
    }

    #[test]
    fn tpcc_s_lines_have_their_own_clock_and_the_summary_is_no_step() {
        let line = |wall: f64, summary: bool| {
            format!(
                "9.0 {{\"monotonic\":1,\"wall\":{wall},\"seconds\":1.0,\"committed\":5,\"rolled_back\":0,\"summary\":{summary}}}\n"
            )
        };
        let steps = parse(&(line(7.5, false) + &line(8.5, false) + &line(8.6, true))).unwrap();
        assert_eq!(steps.iter().map(|step| step.wall).collect::<Vec<_>>(), [7.5, 8.5]);
    }

    #[test]
    fn what_is_broken_is_named() {
        assert!(parse("1.0 {\"wall\":1\n").unwrap_err().to_string().contains("cannot read"));
        assert!(parse("1.0 [ 1s ] thds: 1 tps: x qps\n").is_err());
        assert!(parse("x [ 1s ] thds: 1 tps: 1 qps\n").is_err());
        let back = "2.0 [ 1s ] thds: 1 tps: 1 q\n1.0 [ 2s ] thds: 1 tps: 1 q\n";
        assert!(parse(back).unwrap_err().to_string().contains("goes back"));
        assert!(parse("1.0 [ 2s ] thds: 1 tps: 1 q\n2.0 [ 1s ] thds: 1 tps: 1 q\n").is_err());
        assert!(parse("garbage\n\n").unwrap().is_empty());
    }

    #[test]
    fn a_suspension_counts_as_time_in_which_nothing_is_committed() {
        let steps = parse(SYSBENCH).unwrap();
        let at = |seconds: f64| 1_795_460_288.0 + seconds;
        assert_eq!(mean_between(&steps, at(0.0), at(1.0)), Some(12.0));
        assert_eq!(mean_between(&steps, at(0.0), at(5.0)), Some(16.0 / 5.0));
        assert_eq!(mean_between(&steps, at(0.5), at(1.2)), None);
    }
}
