//! `guest-probe watch`: the status of a running probe again and again, with what happens in a second.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::status::{Status, StatusError, ask};

/// Clears a terminal and goes to its first place (ECMA-48: ED 2, CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Shows the status until the output is closed or the probe has ended, or so many times; on a terminal each in place of the one before.
///
/// # Errors
/// [`StatusError`] when no probe answers any more.
pub fn watch(socket: &Path, every: Duration, times: Option<u64>) -> Result<(), StatusError> {
    let mut out = io::stdout();
    let clear = if out.is_terminal() { CLEAR } else { "" };
    let mut before: Option<(Instant, Status)> = None;
    let mut shown = 0;
    loop {
        let now = Instant::now();
        let status = ask(socket)?;
        let rates = before.as_ref().map(|(then, before)| rates(before, &status, now - *then));
        let rates = rates.unwrap_or_else(|| "a second    (from the next look on)".to_owned());
        let written = writeln!(out, "{clear}{status}\n{rates}\n").and_then(|()| out.flush());
        shown += 1;
        if written.is_err() || times.is_some_and(|times| shown >= times) {
            return Ok(());
        }
        before = Some((now, status));
        sleep(every);
    }
}

/// What happened between two looks, a second, over all servers.
fn rates(before: &Status, after: &Status, passed: Duration) -> String {
    let seconds = passed.as_secs_f64().max(1e-3);
    let mut events: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut runs, mut nanoseconds) = (0, 0);
    for server in &after.servers {
        let old = before.servers.iter().find(|old| old.mysqld_pid == server.mysqld_pid);
        for (kind, count) in &server.events {
            let old = old.and_then(|old| old.events.get(kind)).copied().unwrap_or_default();
            *events.entry(kind).or_default() += count.saturating_sub(old);
        }
        for program in &server.programs {
            let old = old.and_then(|old| old.programs.iter().find(|old| old.name == program.name));
            runs += program.runs.saturating_sub(old.map_or(0, |old| old.runs));
            nanoseconds += program.nanoseconds.saturating_sub(old.map_or(0, |old| old.nanoseconds));
        }
    }
    let rate = |count: u64| format!("{:.0}", count as f64 / seconds);
    let mut words: Vec<String> =
        events.iter().map(|(kind, count)| format!("{} {kind}", rate(*count))).collect();
    if runs > 0 {
        let share = nanoseconds as f64 / 1e7 / seconds;
        words.push(format!("{} runs of programs in {share:.2} % of a processor", rate(runs)));
    }
    let words = if words.is_empty() { "nothing".to_owned() } else { words.join(", ") };
    format!("a second    {words}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statistics::ProgramStatistics;
    use crate::status::ServerStatus;

    fn status(reads: u64, runs: u64) -> Status {
        let program = ProgramStatistics { name: "x".into(), runs, nanoseconds: runs * 1000 };
        let server = ServerStatus {
            events: [("read".to_owned(), reads)].into(),
            programs: vec![program],
            ..ServerStatus::default()
        };
        Status { servers: vec![server], ..Status::default() }
    }

    #[test]
    fn what_happened_is_told_by_the_second() {
        let words = rates(&status(100, 10), &status(300, 20_010), Duration::from_secs(2));
        assert_eq!(words, "a second    100 read, 10000 runs of programs in 1.00 % of a processor");
        let words = rates(&Status::default(), &Status::default(), Duration::from_secs(2));
        assert_eq!(words, "a second    nothing");
    }
}
