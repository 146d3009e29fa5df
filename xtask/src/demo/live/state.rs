//! What is known of a migration that runs, from what `dom0-migrator migrate --progress json` says of it.

use serde::Deserialize;
use serde_json::Value;

/// How many values of a curve are kept: as many as the widest picture shows.
const CURVE: usize = 200;

/// How many passes in a row may have been over before anything was heard of them.
const PASSES_MISSED: usize = 100;

/// How many lines of xl's are kept.
const LINES: usize = 2;

/// Pages by the way that they went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Ways {
    /// Whole.
    pub raw: u64,
    /// Whole, since the target refused the reference.
    pub resent: u64,
    /// Tables of the guest's own paging, whole.
    pub page_table: u64,
    /// As a reference.
    pub referenced: u64,
    /// As a marker of a zero page.
    pub zero: u64,
    /// References that the target took from its disk.
    pub accepted: u64,
    /// References that the target refused.
    pub refused: u64,
}

impl Ways {
    /// Whole, for whatever reason.
    pub fn whole(&self) -> u64 {
        self.raw + self.resent + self.page_table
    }
}

/// The source's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Source {
    /// Pages by way.
    pub ways: Ways,
    /// Pages that wait to be accepted.
    pub window_pages: u64,
    /// What libxenguest wrote: what the stock helper would have sent.
    pub bytes_in: u64,
    /// What went over the network in its place.
    pub bytes_out: u64,
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Progress {
    seconds: f64,
    round: u32,
    pages_done: u64,
    pages_total: u64,
    wire_bytes: u64,
    wire_bytes_per_second: f64,
    source: Option<Source>,
    remaining: Option<Remaining>,
}

/// What is left.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Remaining {
    seconds: f64,
    is: String,
}

impl std::fmt::Display for Remaining {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:.0} s left", self.is.replace('_', " "), self.seconds)
    }
}

/// A pass over memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pass {
    /// Its number; the first is 1.
    pub number: u32,
    /// Pages in it, 0 when they are not counted; none when it was over before anything was heard of it.
    pub pages: Option<u64>,
    /// How long it has taken, up to now or to its end.
    pub seconds: f64,
    began: f64,
}

/// Where the guest is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// At the source still.
    #[default]
    Source,
    /// At the target.
    Target,
}

/// All that is known.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// What is being done, for the picture's head.
    pub title: String,
    /// The hosts' names: from, to.
    pub hosts: [String; 2],
    /// Where the guest is.
    pub place: Place,
    /// What goes on.
    pub phase: String,
    /// Seconds since the command began.
    pub seconds: f64,
    /// Pages done in this pass, and in it.
    pub done: (u64, u64),
    /// Bytes over the network.
    pub wire_bytes: u64,
    /// Bytes a second, from second to second.
    pub rates: Vec<u64>,
    /// The source's counters; the stock helper has none.
    pub source: Option<Source>,
    /// What is left.
    pub remaining: Option<Remaining>,
    /// Passes, the last as far as it is.
    pub passes: Vec<Pass>,
    /// What xl said last.
    pub lines: Vec<String>,
    /// Transactions that the client was told of, and in each step since it was asked before; none where no client writes.
    pub transactions: Option<(u64, Vec<u64>)>,
}

impl State {
    /// Of a migration that has not begun.
    pub fn new(title: &str, hosts: [&str; 2]) -> Self {
        Self { title: title.to_owned(), hosts: hosts.map(str::to_owned), ..Self::default() }
    }

    /// Takes a line of the migrator's: an event, or words.
    pub fn line(&mut self, line: &str) {
        let event: Value = match serde_json::from_str(line) {
            Ok(event @ Value::Object(_)) => event,
            _ => return self.said(line),
        };
        match event["event"].as_str() {
            Some("phase") => self.phase = event["phase"].as_str().unwrap_or_default().to_owned(),
            Some("xl") => self.said(event["line"].as_str().unwrap_or_default()),
            Some("progress") => {
                if let Ok(progress) = serde_json::from_value(event) {
                    self.progress(progress);
                }
            }
            Some("summary") => {
                // It comes after a failure too; then the guest is where it was.
                if event["summary"]["error"].is_null() {
                    self.place = Place::Target;
                    self.phase = "done".to_owned();
                }
                if let Some(bytes) = event["summary"]["wire_bytes"].as_u64() {
                    self.wire_bytes = bytes;
                }
                if let Some(seconds) = event["summary"]["total_seconds"].as_f64() {
                    self.seconds = seconds;
                }
                self.remaining = None;
            }
            _ => {}
        }
    }

    fn said(&mut self, line: &str) {
        let line: String = line.chars().filter(|c| !c.is_control()).collect();
        if !line.trim().is_empty() {
            self.lines.push(line);
            let surplus = self.lines.len().saturating_sub(LINES);
            self.lines.drain(..surplus);
        }
    }

    fn progress(&mut self, progress: Progress) {
        self.seconds = progress.seconds;
        self.done = (progress.pages_done, progress.pages_total);
        self.wire_bytes = progress.wire_bytes;
        push(&mut self.rates, progress.wire_bytes_per_second.max(0.0) as u64);
        self.source = progress.source.or(self.source);
        self.remaining = progress.remaining;
        if progress.round == 0 {
            return;
        }
        if self.passes.last().is_none_or(|pass| pass.number != progress.round) {
            // Only of the pass that is sent while the guest is paused the pages are not counted.
            let is_paused = progress.pages_total == 0;
            self.phase = if is_paused { "the guest is paused" } else { "its memory is sent" }.to_owned();
            let last = self.passes.last().map_or(0, |pass| pass.number);
            // Those that came and went between two lines.
            self.passes.extend((last..progress.round).skip(1).take(PASSES_MISSED).map(|number| Pass {
                number,
                pages: None,
                seconds: 0.0,
                began: progress.seconds,
            }));
            self.passes.push(Pass {
                number: progress.round,
                pages: Some(progress.pages_total),
                seconds: 0.0,
                began: progress.seconds,
            });
        }
        if let Some(pass) = self.passes.last_mut() {
            pass.pages = Some(progress.pages_total);
            pass.seconds = progress.seconds - pass.began;
        }
    }

    /// In one line.
    pub fn words(&self) -> String {
        let pass = self.passes.last().map_or(0, |pass| pass.number);
        let ways = self.source.unwrap_or_default().ways;
        format!(
            "{:>5.0} s  {}  pass {pass}, {} of {} pages, {:.1} MB, {} by reference, {} whole, {} zero",
            self.seconds,
            self.phase,
            self.done.0,
            self.done.1,
            self.wire_bytes as f64 / 1e6,
            ways.referenced,
            ways.whole(),
            ways.zero
        )
    }

    /// The client has been told of so many transactions by now.
    pub fn committed(&mut self, total: u64) {
        let (before, steps) = self.transactions.get_or_insert((total, Vec::new()));
        push(steps, total.saturating_sub(*before));
        *before = total;
    }
}

fn push(curve: &mut Vec<u64>, value: u64) {
    curve.push(value);
    let surplus = curve.len().saturating_sub(CURVE);
    curve.drain(..surplus);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(seconds: f64, round: u32, done: u64) -> String {
        format!(
            r#"{{"event":"progress","seconds":{seconds},"round":{round},"pages_done":{done},"pages_total":100,"wire_bytes":5000,
            "wire_bytes_per_second":2000,"source":{{"ways":{{"raw":1,"referenced":7}},"window_pages":256}},"remaining":{{"seconds":9,"is":"at_least"}}}}"#
        )
        .replace('\n', "")
    }

    #[test]
    fn passes_and_classes_are_followed() {
        let mut state = State::new("a", ["x", "y"]);
        state.line(r#"{"event":"begun","domain":"db1","target":"y"}"#);
        for line in [progress(1.0, 1, 10), progress(3.0, 1, 90), progress(4.0, 2, 5), progress(4.5, 2, 50)] {
            state.line(&line);
        }
        let mut later = State { passes: state.passes.clone(), ..State::new("a", ["x", "y"]) };
        later.line(&progress(5.0, 4, 1));
        let pages: Vec<_> = later.passes.iter().map(|pass| (pass.number, pass.pages)).collect();
        assert_eq!(pages, [(1, Some(100)), (2, Some(100)), (3, None), (4, Some(100))]);
        let passes: Vec<(u32, f64)> = state.passes.iter().map(|pass| (pass.number, pass.seconds)).collect();
        assert_eq!(passes, [(1, 2.0), (2, 0.5)]);
        let ways = state.source.unwrap().ways;
        assert_eq!((ways.whole(), ways.referenced, state.rates.len()), (1, 7, 4));
        assert_eq!(state.remaining.as_ref().unwrap().to_string(), "at least 9 s left");
        assert_eq!(state.place, Place::Source);
        state.line(r#"{"event":"summary","summary":{"wire_bytes":7000,"total_seconds":6.0}}"#);
        assert_eq!((state.place, state.wire_bytes), (Place::Target, 7000));
    }

    /// The recorded lines that pictures are tried with have the migrator's own types.
    #[test]
    fn the_lines_that_are_tried_have_the_migrator_s_form() {
        let mut seen = 0;
        for line in include_str!("../files/progress.jsonl").lines() {
            let event: Value = serde_json::from_str(line).unwrap();
            // Before the helper begins there are no counters.
            if event["event"] == "progress" && !event["source"].is_null() {
                let theirs: dom0_migrator::timeline::SourceSample =
                    serde_json::from_value(event["source"].clone()).unwrap();
                let ours: Source = serde_json::from_value(event["source"].clone()).unwrap();
                assert_eq!(
                    (ours.ways.referenced, ours.ways.accepted, ours.ways.zero, ours.window_pages),
                    (theirs.ways.referenced, theirs.ways.accepted, theirs.ways.zero, theirs.window_pages)
                );
                seen += 1;
            }
        }
        assert!(seen > 20, "{seen}");
    }

    #[test]
    fn a_migration_that_failed_leaves_the_guest_where_it_was() {
        let mut state = State::new("a", ["x", "y"]);
        state.line(r#"{"event":"summary","summary":{"error":"the link broke"}}"#);
        assert_eq!(state.place, Place::Source);
    }

    #[test]
    fn whatever_comes_is_taken() {
        let mut state = State::new("a", ["x", "y"]);
        for line in
            ["", "words", "[1]", "{}", r#"{"event":7}"#, r#"{"event":"progress","seconds":"x"}"#, "\x1b[2J"]
        {
            state.line(line);
        }
        assert_eq!(state.lines, ["[1]", "[2J"]);
        (0..1000).for_each(|n| state.committed(n));
        assert_eq!(state.transactions.unwrap().1.len(), CURVE);
    }
}
