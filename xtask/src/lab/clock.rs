//! The clocks of hosts and guest, set to this machine's. A guest that moves takes the time from the host that it comes to, so what it
//! measures across the move is only as good as the two hosts agree; and a resumed lab's clocks go on from when it was frozen.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use super::machine::Machine;
use super::shell::Session;

/// As near as we try to bring a clock at first, and after each [`PATIENCE`]; farther than the last is an error. In seconds.
const TOLERANCES: [f64; 3] = [0.010, 0.025, 0.050];

/// How long a clock is tried to be brought to each of them. The last is long: on a machine that does other things too, it takes luck.
const PATIENCE: [Duration; 3] = [Duration::from_secs(6), Duration::from_secs(24), Duration::from_secs(300)];

/// How far each clock is ahead of this machine's, in seconds, after they were set.
#[derive(Clone, Copy, Debug)]
pub struct Skew {
    /// dom0 of the source.
    pub source: f64,
    /// dom0 of the target.
    pub target: f64,
    /// The guest.
    pub guest: f64,
}

/// Sets a machine's clock; how far it is ahead of ours afterwards, in seconds.
///
/// # Errors
/// When no shell answers, or the clock cannot be brought nearer than 50 ms.
pub(super) fn set(machine: &Machine) -> Result<f64> {
    let mut session = machine.shell(Duration::from_secs(30))?.into_session()?;
    let start = Instant::now();
    // Setting takes the time that `date` takes to start, which is about the same each time but not always: so aim ahead of now by
    // what the tries before were behind, and believe no single one.
    let mut lead = 0.0;
    let mut ahead = measure(&mut session)?;
    let wanted = || TOLERANCES.iter().zip(PATIENCE).find(|(_, until)| start.elapsed() < *until);
    while wanted().is_some_and(|(tolerance, _)| ahead.abs() > *tolerance) {
        session.ask(&format!("date -s @{:.6} >/dev/null; echo", now()? + lead))?;
        ahead = measure(&mut session)?;
        lead -= ahead.clamp(-0.1, 0.1) / 2.0;
    }
    if ahead.abs() > TOLERANCES[2] {
        bail!("a clock is still {ahead:+.3} s ahead after {} s of setting it", start.elapsed().as_secs());
    }
    Ok(ahead)
}

/// How far a clock is ahead, by the quickest of some questions.
fn measure(session: &mut Session) -> Result<f64> {
    let mut best: Option<(Duration, f64)> = None;
    for _ in 0..6 {
        let (start, before) = (Instant::now(), now()?);
        let answer = session.ask("echo $EPOCHREALTIME")?;
        let took = start.elapsed();
        let theirs: f64 = answer.parse().with_context(|| format!("a clock says {answer:?}"))?;
        if best.is_none_or(|(least, _)| took < least) {
            best = Some((took, theirs - before - took.as_secs_f64() / 2.0));
        }
    }
    best.map(|(_, ahead)| ahead).context("no clock was asked")
}

fn now() -> Result<f64> {
    Ok(SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("this machine's clock is before 1970")?
        .as_secs_f64())
}
