//! The target's states.

use serde::{Deserialize, Serialize};

use super::record::Side;
use super::{Duty, IllegalStep, State, Verdict};

/// What the target's record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetState {
    /// The domain is coming.
    Receiving,
    /// It is here as a whole, paused, and waits for permission.
    Ready,
    /// Permission was taken: from here on it runs here or nowhere.
    Accepted,
    /// It runs here. Closed.
    Running,
    /// It does not run here and never will; what has come of it is about to be removed.
    Discarded,
    /// That is removed. Closed.
    Removed,
    /// It had been taken over, and is not here any more. Closed.
    Lost,
}

/// What happens at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetEvent {
    /// All of it has come.
    Complete,
    /// The source gives permission.
    Given,
    /// xl says that it runs, or it was made to.
    Started,
    /// xl says that it could not start it, and it has never run.
    NotStarted,
    /// It failed, was cancelled, or was found without its process; or the source asks before permission was taken.
    GaveUp,
    /// What had come of it is gone.
    Removed,
    /// It is to be started, and is not there.
    NotThere,
}

impl TargetState {
    /// What a source that asks is to be told; none as long as that is not decided.
    pub fn verdict(self) -> Option<Verdict> {
        match self {
            Self::Receiving | Self::Ready | Self::Accepted => None,
            Self::Running => Some(Verdict::Runs),
            Self::Discarded | Self::Removed => Some(Verdict::Discarded),
            Self::Lost => Some(Verdict::Lost),
        }
    }
}

impl State for TargetState {
    type Event = TargetEvent;
    const SIDE: Side = Side::Target;

    fn name(self) -> &'static str {
        match self {
            Self::Receiving => "receiving",
            Self::Ready => "ready",
            Self::Accepted => "accepted",
            Self::Running => "running",
            Self::Discarded => "discarded",
            Self::Removed => "removed",
            Self::Lost => "lost",
        }
    }

    fn after(self, event: TargetEvent) -> Result<Self, IllegalStep<TargetEvent>> {
        Ok(match (self, event) {
            (Self::Receiving, TargetEvent::Complete) => Self::Ready,
            (Self::Ready, TargetEvent::Given) => Self::Accepted,
            (Self::Receiving | Self::Ready, TargetEvent::GaveUp) => Self::Discarded,
            (Self::Accepted, TargetEvent::Started) => Self::Running,
            (Self::Accepted, TargetEvent::NotStarted) => Self::Discarded,
            (Self::Accepted, TargetEvent::NotThere) => Self::Lost,
            (Self::Discarded, TargetEvent::Removed) => Self::Removed,
            (state, event) => return Err(IllegalStep { state: state.name(), event }),
        })
    }

    fn duty(self) -> Duty {
        match self {
            Self::Receiving | Self::Ready => Duty::Discard,
            Self::Accepted => Duty::Start,
            Self::Discarded => Duty::RemoveIncoming,
            Self::Running | Self::Removed | Self::Lost => Duty::Nothing,
        }
    }

    fn may_run(self) -> bool {
        matches!(self, Self::Accepted | Self::Running)
    }
}
