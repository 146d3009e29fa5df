//! How a migration ended, told from all that was seen of it.

use std::process::ExitStatus;

use super::settle::SettleError;
use super::summary::Outcome;
use crate::control::TargetOutcome;
use crate::handover::SourceState;
use crate::report::SaveReport;

/// What is known at the end.
pub struct Ended<'a> {
    /// How xl ended; none when it was lost.
    pub status: Option<ExitStatus>,
    /// Whether a signal or `cancel` came in time.
    pub interrupted: bool,
    /// What xl said last.
    pub said: &'a [String],
    /// What the helper reported.
    pub saved: Option<&'a SaveReport>,
    /// What the target reported, or why not.
    pub target: Result<&'a TargetOutcome, &'a String>,
}

/// How it ended, and why it failed. Where the domain is, is what the record says, and whether that could be brought about.
pub fn judge(
    ended: &Ended<'_>,
    state: SourceState,
    unsettled: Option<SettleError>,
) -> (Outcome, Option<String>) {
    let Ended { status, interrupted, said, saved, target } = *ended;
    let outcome = match (state, interrupted) {
        (SourceState::Gone | SourceState::Removed, _) => {
            let left = unsettled.map(|error| format!("it runs at the target; here: {error}"));
            return (Outcome::Migrated, left);
        }
        (SourceState::Stranded, _) => {
            let text = "the target had taken it over and lost it: start it anew from its configuration; the copy here stays \
                        suspended and must not be resumed, for its disks may have changed since";
            return (Outcome::Undefined, Some(text.into()));
        }
        (SourceState::Given, _) => Outcome::Undefined,
        (_, true) => Outcome::Interrupted,
        (_, false) => Outcome::Failed,
    };
    if let Some(error) = unsettled {
        return (outcome, Some(error.to_string()));
    }
    if outcome == Outcome::Interrupted {
        return (
            outcome,
            Some("it was told to give up before the target had permission to run the domain".into()),
        );
    }
    // Each side's error is the other's consequence; the one that is not is wanted.
    let restore = target.ok().and_then(|target| target.restore.as_ref());
    let restore_error =
        restore.filter(|restore| !restore.cut_short).and_then(|restore| restore.error.clone());
    let at_target = |error| format!("at the target: {error}");
    let helper_lost = restore.is_some_and(|restore| restore.cut_short) && saved.is_none();
    let why = restore_error
        .map(at_target)
        .or_else(|| saved.and_then(|saved| saved.error.clone()))
        .or_else(|| helper_lost.then(|| "the save helper ended without a report: was it killed?".into()))
        .or_else(|| target.ok().and_then(|target| target.error.clone()).map(at_target))
        .or_else(|| target.err().cloned())
        .or_else(|| said.last().cloned())
        .unwrap_or_else(|| format!("xl ended with {status:?}"));
    (outcome, Some(why))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::RestoreReport;
    use std::os::unix::process::ExitStatusExt;

    fn ended<'a>(
        interrupted: bool,
        saved: Option<&'a SaveReport>,
        target: Result<&'a TargetOutcome, &'a String>,
    ) -> Ended<'a> {
        Ended { status: Some(ExitStatus::from_raw(1 << 8)), interrupted, said: &[], saved, target }
    }

    fn target(error: &str, cut_short: bool) -> TargetOutcome {
        let restore = RestoreReport { error: Some(error.into()), cut_short, ..RestoreReport::default() };
        TargetOutcome { error: Some("xl gave up".into()), restore: Some(restore), ..TargetOutcome::default() }
    }

    #[test]
    fn the_cause_is_told_and_not_its_consequence() {
        let saved = SaveReport { error: Some("broken pipe".into()), ..SaveReport::default() };
        let cause = |saved, target: &TargetOutcome| {
            judge(&ended(false, saved, Ok(target)), SourceState::Resumed, None).1.unwrap()
        };
        assert_eq!(cause(Some(&saved), &target("2 pages differ", false)), "at the target: 2 pages differ");
        assert_eq!(cause(Some(&saved), &target("stream ended", true)), "broken pipe");
        assert_eq!(cause(Some(&saved), &TargetOutcome::default()), "broken pipe");
        let killed = cause(None, &target("stream ended", true));
        assert!(killed.contains("without a report"), "{killed}");
    }

    #[test]
    fn the_record_decides_where_the_domain_is() {
        let gone = "no answer".to_owned();
        let outcome = |state, interrupted| judge(&ended(interrupted, None, Err(&gone)), state, None).0;
        assert_eq!(outcome(SourceState::Removed, true), Outcome::Migrated);
        assert_eq!(outcome(SourceState::Resumed, false), Outcome::Failed);
        assert_eq!(outcome(SourceState::Resumed, true), Outcome::Interrupted);
        assert_eq!(outcome(SourceState::Given, true), Outcome::Undefined);
        assert_eq!(outcome(SourceState::Stranded, false), Outcome::Undefined);
    }
}
