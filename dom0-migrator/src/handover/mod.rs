//! The hand-over: who may run the guest, whatever is lost and whoever dies.
//!
//! xl's own hand-over is one message ("GO") and one reply; when the reply is lost, nobody knows which side runs the domain. Here GO
//! never crosses the network. The source's carrier holds back what its xl says, and the target's `receive` says GO to its own xl
//! once both sides have written down what it means:
//!
//! ```text
//! xl        carry/migrate          control connection          receive        xl migrate-receive
//!  │            record: sending                          record: receiving            │
//!  │ ══════════════════════════ memory, state ═══════════════════════════════════════►│
//!  │            │                                        record: ready ◄───── "ready" │
//!  │ ◄──────────┼───────────────────── ready ────────────────────┤                    │
//!  │ ── GO ────►│ held                                           │                    │
//!  │            record: GIVEN                                    │                    │
//!  │            │ ── Given ─────────────────────────────────────►│                    │
//!  │            │                                        record: ACCEPTED             │
//!  │            │                                                │ ────── GO ────────►│ starts
//!  │            │                                        record: running ◄── report 0 │
//!  │            │ ◄────────────────────────────── Verdict: runs ─┤                    │
//!  │            record: gone                                     │                    │
//!  │ ◄ report 0 ┤                                                │                    │
//!  destroys its copy; record: removed
//! ```
//!
//! * **The source may run the domain** while its record says `sending` (the target has no permission yet), and after the target has
//!   promised not to run it (`kept`). From `given` on it asks.
//! * **The target may run it** from `accepted` on, and it accepts only in answer to `Given`. Until then it may give up by itself,
//!   at any time and for any reason: it writes `discarded`, which is that promise.
//! * So there is one moment that decides, the writing of `accepted`, on one disk. Both verdicts are facts that never change again:
//!   however often and late they arrive, they are right.
//! * **In doubt the domain stands at the source**, suspended and complete, until the target can be asked ([`Duty::Ask`]).
//!
//! A state is on disk ([`record`]) before what it permits is begun, and what is to be done in a state ([`Duty`]) may be done
//! again: so a process that ends anywhere is continued by another (`dom0-migrator resolve`, or the next command that meets the
//! record). The test in `model.rs` walks through all of it: each message lost, each side ended at each step, in every order.

#[cfg(test)]
mod model;
pub mod record;
mod source;
mod target;

pub use source::{SourceEvent, SourceState};
pub use target::{TargetEvent, TargetState};

use serde::{Deserialize, Serialize};

/// What the target says of a domain, once for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It runs at the target.
    Runs,
    /// It does not run at the target, and never will.
    Discarded,
    /// The target had taken it over, and it is not there any more: the host went down, or somebody destroyed it. It may have run
    /// and written to its disks, so the source's copy is not to be resumed either.
    Lost,
}

/// What is to be done in a state by whoever finds it on disk and its process gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Duty {
    /// Nothing: it is closed.
    Nothing,
    /// Source: nobody else may run it. Write that it is kept, then resume it.
    TakeBack,
    /// Source: ask the target.
    Ask,
    /// Source: resume it, if it is suspended.
    Resume,
    /// Source: destroy the suspended copy, if it is still there.
    RemoveCopy,
    /// Target: write that it is discarded, then remove what has come of it.
    Discard,
    /// Target: give it its name and let it run, if that has not been done.
    Start,
    /// Target: remove what has come of it.
    RemoveIncoming,
}

/// Something that may not happen in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a migration that is {state} cannot take the step {event:?}")]
pub struct IllegalStep<E: std::fmt::Debug> {
    /// The state, as the record names it.
    pub state: &'static str,
    /// What was to happen.
    pub event: E,
}

/// States of one side.
pub trait State: Copy + Eq + std::fmt::Debug + Serialize + serde::de::DeserializeOwned {
    /// What happens to it.
    type Event: Copy + std::fmt::Debug;
    /// As in the record.
    fn name(self) -> &'static str;
    /// The side, as in the record and its file's name.
    const SIDE: record::Side;
    /// The state after an event.
    ///
    /// # Errors
    /// [`IllegalStep`] when that may not happen here; nothing has changed then.
    fn after(self, event: Self::Event) -> Result<Self, IllegalStep<Self::Event>>;
    /// What is to be done when the process is gone.
    fn duty(self) -> Duty;
    /// Whether the domain may run on this side, or be made to.
    fn may_run(self) -> bool;
}
