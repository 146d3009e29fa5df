//! How far a migration is, on a terminal as a bar, elsewhere as a line for each pass.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

/// Shows progress.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    round: u32,
}

impl Progress {
    /// For a domain that goes to a target.
    pub fn new(domain: &str, target: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) =
                ProgressStyle::with_template("{prefix} {msg:28} {bar:30} {pos:>9}/{len} pages {elapsed}")
            {
                bar.set_style(style);
            }
            bar.set_prefix(format!("{domain} → {target}"));
            bar.enable_steady_tick(std::time::Duration::from_millis(500));
            bar
        });
        if bar.is_none() {
            eprintln!("migrating {domain} to {target}");
        }
        Self { bar, round: 0 }
    }

    /// Something is going on.
    pub fn phase(&self, what: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(what.to_owned()),
            None => eprintln!("{what}"),
        }
    }

    /// A pass is this far.
    pub fn pass(&mut self, round: u32, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(format!("pass {round}"));
        } else if round != self.round {
            eprintln!("pass {round}: {total} pages");
        }
        self.round = round;
    }

    /// A line of xl's.
    pub fn line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// The bar goes away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
