//! The source's states.

use serde::{Deserialize, Serialize};

use super::record::Side;
use super::{Duty, IllegalStep, State, Verdict};

/// What the source's record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceState {
    /// The domain is being sent, and nobody but this side may run it.
    Sending,
    /// The target was told, or may have been, that it may run the domain. It does not run here until the target has said what became
    /// of that.
    Given,
    /// The target does not run it and never will; it is about to run on here.
    Kept,
    /// It runs on here. Closed.
    Resumed,
    /// The target runs it; the copy here is about to be removed.
    Gone,
    /// The copy here is removed. Closed.
    Removed,
    /// The target had it and lost it; the copy here stays suspended, and is never resumed. Closed.
    Stranded,
}

/// What happens at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// xl is ready to give the domain away: its copy is suspended, the target's is complete.
    Permission,
    /// It failed, was cancelled, or was found without its process, before permission was given.
    GaveUp,
    /// The target has said what became of it.
    Verdict(Verdict),
    /// It runs here again.
    Resumed,
    /// The copy here is gone.
    Removed,
}

impl State for SourceState {
    type Event = SourceEvent;
    const SIDE: Side = Side::Source;

    fn name(self) -> &'static str {
        match self {
            Self::Sending => "sending",
            Self::Given => "given",
            Self::Kept => "kept",
            Self::Resumed => "resumed",
            Self::Gone => "gone",
            Self::Removed => "removed",
            Self::Stranded => "stranded",
        }
    }

    fn after(self, event: SourceEvent) -> Result<Self, IllegalStep<SourceEvent>> {
        Ok(match (self, event) {
            (Self::Sending, SourceEvent::Permission) => Self::Given,
            (Self::Sending, SourceEvent::GaveUp) => Self::Kept,
            (Self::Given, SourceEvent::Verdict(Verdict::Runs)) => Self::Gone,
            (Self::Given, SourceEvent::Verdict(Verdict::Discarded)) => Self::Kept,
            (Self::Given, SourceEvent::Verdict(Verdict::Lost)) => Self::Stranded,
            (Self::Kept, SourceEvent::Resumed) => Self::Resumed,
            (Self::Gone, SourceEvent::Removed) => Self::Removed,
            (state, event) => return Err(IllegalStep { state: state.name(), event }),
        })
    }

    fn duty(self) -> Duty {
        match self {
            Self::Sending => Duty::TakeBack,
            Self::Given => Duty::Ask,
            Self::Kept => Duty::Resume,
            Self::Gone => Duty::RemoveCopy,
            Self::Resumed | Self::Removed | Self::Stranded => Duty::Nothing,
        }
    }

    fn may_run(self) -> bool {
        matches!(self, Self::Sending | Self::Kept | Self::Resumed)
    }
}
