//! `status`, `list` and `cancel`: what the records tell of the migrations of this host.

use std::path::Path;

use serde::Serialize;

use super::{Cancel, EXIT_FAILED, EXIT_MIGRATED, EXIT_NOT_BEGUN, List, Status};
use crate::control::Token;
use crate::handover::record::{Content, Progress, RecordError, Records, Side};
use crate::handover::{Duty, SourceState, State, TargetState};

/// One migration, as it is shown.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Shown {
    id: Token,
    side: Side,
    domain: String,
    peer: String,
    state: &'static str,
    /// Whether nothing is left to be done.
    closed: bool,
    /// Whether a process works on it.
    active: bool,
    /// Seconds after 1970.
    began: u64,
    changed: u64,
    progress: Option<Progress>,
    note: Option<String>,
}

impl Shown {
    fn of<S: State>(records: &Records, content: Content<S>) -> Self {
        let when = |at: Option<&(S, u64)>| at.map_or(0, |(_, when)| *when);
        Self {
            active: records.is_busy(&content.id, content.side),
            progress: records.progress(&content.id, content.side),
            state: content.state.name(),
            closed: content.state.duty() == Duty::Nothing,
            began: when(content.history.first()),
            changed: when(content.history.last()),
            id: content.id,
            side: content.side,
            domain: content.domain,
            peer: content.peer,
            note: content.note,
        }
    }

    /// What an operator is to know or do.
    fn advice(&self) -> String {
        match (self.closed, self.active) {
            (true, _) => self.note.clone().unwrap_or_default(),
            (false, true) => self.progress.as_ref().map_or(String::new(), |progress| match progress.total {
                0 => progress.phase.clone(),
                total => format!("pass {}, {} of {total} pages", progress.round, progress.done),
            }),
            (false, false) => "cut off; `dom0-migrator resolve` settles it".to_owned(),
        }
    }
}

fn all(records: &Records) -> Result<Vec<Shown>, RecordError> {
    let mut shown: Vec<Shown> =
        records.all::<SourceState>()?.into_iter().map(|content| Shown::of(records, content)).collect();
    shown.extend(records.all::<TargetState>()?.into_iter().map(|content| Shown::of(records, content)));
    shown.sort_by_key(|shown| (shown.began, shown.side));
    Ok(shown)
}

fn print(shown: &[Shown], json: bool) {
    if json {
        println!("{}", serde_json::to_string_pretty(shown).unwrap_or_default());
        return;
    }
    println!("{:<32} {:<6} {:<16} {:<10} {:<24} ", "migration", "side", "domain", "state", "peer");
    for one in shown {
        let line = format!(
            "{:<32} {:<6} {:<16} {:<10} {:<24} {}",
            one.id,
            one.side,
            one.domain,
            one.state,
            one.peer,
            one.advice()
        );
        println!("{}", line.trim_end());
    }
}

fn failed(error: &RecordError) -> u8 {
    eprintln!("dom0-migrator: {error}");
    EXIT_NOT_BEGUN
}

/// Shows all migrations that are kept on record.
pub fn list(options: &List, records: Option<&Path>) -> u8 {
    match Records::open(records).and_then(|records| all(&records)) {
        Ok(shown) => {
            print(&shown, options.json);
            EXIT_MIGRATED
        }
        Err(error) => failed(&error),
    }
}

/// Shows those that are open, or of one domain or number. 1: one is cut off and waits for `resolve`.
pub fn status(options: &Status, records: Option<&Path>) -> u8 {
    let shown = match Records::open(records).and_then(|records| all(&records)) {
        Ok(shown) => shown,
        Err(error) => return failed(&error),
    };
    let wanted: Vec<Shown> = shown
        .into_iter()
        .filter(|one| match &options.migration {
            Some(wanted) => one.id.to_string() == *wanted || one.domain == *wanted,
            None => !one.closed,
        })
        .collect();
    print(&wanted, options.json);
    if wanted.iter().any(|one| !one.closed && !one.active) { EXIT_FAILED } else { EXIT_MIGRATED }
}

/// Asks the running command to give up. That it has is what `status` tells.
pub fn cancel(options: &Cancel, records: Option<&Path>) -> u8 {
    let asked = Records::open(records).and_then(|records| {
        let mut found = all(&records)?;
        found.retain(|one| one.id.to_string() == options.migration || one.domain == options.migration);
        found.retain(|one| one.active && !one.closed);
        for one in &found {
            records.ask_to_cancel(&one.id, one.side)?;
            println!("{} {} is told to give up", one.id, one.domain);
        }
        Ok(found.len())
    });
    match asked {
        Ok(0) => {
            eprintln!("dom0-migrator: no migration of {:?} is running here", options.migration);
            EXIT_FAILED
        }
        Ok(_) => EXIT_MIGRATED,
        Err(error) => failed(&error),
    }
}
