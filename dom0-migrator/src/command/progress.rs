//! How far a migration is: on a terminal as a bar, elsewhere as a line now and then, or as JSON for programs.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::remaining::Remaining;
use crate::timeline::SourceSample;

/// Seconds between two lines.
const LINE_SECONDS: f64 = 10.0;

/// How progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// A bar on a terminal, lines elsewhere.
    #[default]
    Auto,
    /// A bar.
    Bar,
    /// A line for each pass and every ten seconds, on stderr.
    Lines,
    /// An object a line on stdout, about one a second; the summary is the last.
    Json,
    /// Nothing but what xl says.
    None,
}

/// How far it is.
#[derive(Clone, Copy, Debug)]
pub struct Status {
    /// Seconds since the command began.
    pub seconds: f64,
    /// The pass: 1 is the first; 0 before it.
    pub round: u32,
    /// Pages done in it.
    pub done: u64,
    /// Pages in it.
    pub total: u64,
    /// Bytes on all connections.
    pub wire_bytes: u64,
    /// Bytes per second, over the last second or so.
    pub wire_rate: f64,
    /// The source's counters, when our helper runs.
    pub source: Option<SourceSample>,
    /// How long it will still take.
    pub remaining: Remaining,
}

/// Shows progress.
#[derive(Debug)]
pub struct Progress {
    form: Form,
    bar: Option<ProgressBar>,
    round: u32,
    line_at: f64,
}

impl Progress {
    /// For a domain that goes to a target.
    pub fn new(form: Form, domain: &str, target: &str) -> Self {
        let form = match form {
            Form::Auto if std::io::stderr().is_terminal() => Form::Bar,
            Form::Auto => Form::Lines,
            form => form,
        };
        let bar = (form == Form::Bar).then(|| {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template("{prefix}  {bar:24} {msg}  {elapsed}");
            if let Ok(style) = style {
                bar.set_style(style);
            }
            bar.set_prefix(format!("{domain} → {target}"));
            bar.enable_steady_tick(std::time::Duration::from_millis(500));
            bar
        });
        let this = Self { form, bar, round: 0, line_at: 0.0 };
        match form {
            Form::Lines => eprintln!("migrating {domain} to {target}"),
            Form::Json => this.object(&json!({"event": "begun", "domain": domain, "target": target})),
            _ => {}
        }
        this
    }

    /// Something is going on.
    pub fn phase(&self, what: &str) {
        match (&self.bar, self.form) {
            (Some(bar), _) => bar.set_message(what.to_owned()),
            (None, Form::Lines) => eprintln!("{what}"),
            (None, Form::Json) => self.object(&json!({"event": "phase", "phase": what})),
            _ => {}
        }
    }

    /// It is this far.
    pub fn status(&mut self, status: &Status) {
        if let Some(bar) = &self.bar {
            // One of length 0 would be drawn as done.
            bar.set_length(status.total.max(1));
            bar.set_position(status.done.min(status.total));
            bar.set_message(bar_words(status));
        }
        match self.form {
            Form::Lines if status.round > 0 => {
                let is_new = status.round != self.round;
                if is_new || status.seconds - self.line_at >= LINE_SECONDS {
                    eprintln!("{}", line(status));
                    self.line_at = status.seconds;
                }
            }
            Form::Json => self.object(&object(status)),
            _ => {}
        }
        self.round = status.round;
    }

    /// A line of xl's.
    pub fn line(&self, line: &str) {
        match (&self.bar, self.form) {
            (Some(bar), _) => bar.println(line),
            (None, Form::Json) => self.object(&json!({"event": "xl", "line": line})),
            _ => eprintln!("{line}"),
        }
    }

    /// The end: the bar goes away. The summary, as JSON or for people.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// One object on a line of its own. Whoever reads may be gone; the migration goes on.
    fn object(&self, object: &Value) {
        let _ = writeln!(std::io::stdout().lock(), "{object}");
    }
}

/// Shows the summary, in the form that was asked for.
pub fn show_summary(form: Form, summary: &(impl std::fmt::Display + serde::Serialize)) {
    let mut stdout = std::io::stdout().lock();
    let _ = match form {
        Form::Json => writeln!(stdout, "{}", json!({"event": "summary", "summary": summary})),
        _ => write!(stdout, "{summary}"),
    };
}

/// How much of the pass is done, in hundredths. None: nobody has counted its pages yet, as those of the last pass before it has begun.
fn percent(status: &Status) -> Option<u64> {
    let done = status.done.min(status.total);
    done.saturating_mul(100).checked_div(status.total)
}

/// What is known of a pass whose pages nobody has counted.
fn uncounted(status: &Status) -> String {
    match status.done {
        0 => "pages not counted yet".to_owned(),
        done => format!("{done} pages, not counted yet of how many"),
    }
}

/// A line for people.
fn line(status: &Status) -> String {
    let far = percent(status)
        .map_or_else(|| uncounted(status), |percent| format!("{percent:>3} % of {} pages", status.total));
    format!("{:>5.0} s  {far}  {}", status.seconds, words(status))
}

/// What stands beside the bar.
fn bar_words(status: &Status) -> String {
    let far = percent(status).map_or_else(|| uncounted(status), |percent| format!("{percent:>3} %"));
    format!("{far}  {}", words(status))
}

/// For people.
fn words(status: &Status) -> String {
    let mut words = format!("pass {}, {:.1} MB/s", status.round, status.wire_rate / 1e6);
    if let Some(source) = &status.source {
        let ways = &source.ways;
        words += &format!(
            ", {} by reference, {} whole, {} zero",
            ways.referenced,
            ways.raw + ways.resent + ways.page_table,
            ways.zero
        );
        if source.window_pages > 0 {
            words += &format!(", {} MiB in the window", source.window_pages >> 8);
        }
    }
    format!("{words}, {}", status.remaining)
}

/// For programs.
fn object(status: &Status) -> Value {
    let remaining = match status.remaining {
        Remaining::Unknown => Value::Null,
        Remaining::AtLeast(seconds) => json!({"seconds": seconds.round(), "is": "at_least"}),
        Remaining::About(seconds) => json!({"seconds": seconds.round(), "is": "about"}),
    };
    json!({
        "event": "progress",
        "seconds": crate::timeline::milliseconds(status.seconds),
        "round": status.round,
        "pages_done": status.done,
        "pages_total": status.total,
        "wire_bytes": status.wire_bytes,
        "wire_bytes_per_second": status.wire_rate.round(),
        "source": status.source,
        "remaining": remaining,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(remaining: Remaining) -> Status {
        let source = SourceSample { window_pages: 512, ..SourceSample::default() };
        Status {
            seconds: 5.0,
            round: 2,
            done: 10,
            total: 40,
            wire_bytes: 7_000_000,
            wire_rate: 1_500_000.0,
            source: Some(source),
            remaining,
        }
    }

    #[test]
    fn people_read_rates_and_what_is_left() {
        let words = words(&status(Remaining::AtLeast(130.0)));
        for part in ["pass 2", "1.5 MB/s", "2 MiB in the window", "3 min left at least"] {
            assert!(words.contains(part), "{words}");
        }
    }

    #[test]
    fn a_pass_that_nobody_has_counted_has_no_share() {
        let line = |done, total| line(&Status { done, total, ..status(Remaining::Unknown) });
        assert!(line(10, 40).starts_with("    5 s   25 % of 40 pages  pass 2, "), "{}", line(10, 40));
        assert!(line(0, 40).contains("  0 % of 40 pages"), "{}", line(0, 40));
        for (uncounted, known) in [(line(0, 0), "pages not counted yet"), (line(7, 0), "7 pages")] {
            assert!(uncounted.contains(known) && !uncounted.contains('%'), "{uncounted}");
            assert!(uncounted.ends_with("time left unknown"), "{uncounted}");
        }
        let beside = |total| bar_words(&Status { total, ..status(Remaining::Unknown) });
        assert!(beside(40).starts_with(" 25 %  pass 2, "), "{}", beside(40));
        assert!(beside(0).starts_with("10 pages") && !beside(0).contains('%'), "{}", beside(0));
    }

    #[test]
    fn programs_are_told_when_nothing_is_known() {
        let object = object(&status(Remaining::Unknown));
        assert_eq!(object["remaining"], Value::Null);
        assert_eq!((&object["round"], &object["source"]["window_pages"]), (&2.into(), &512.into()));
        assert_eq!(super::object(&status(Remaining::About(7.2)))["remaining"]["seconds"], 7.0);
    }
}
