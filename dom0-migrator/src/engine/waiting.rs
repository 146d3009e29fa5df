//! Where a filter's thread and the one that writes meet: what was sent and is not written yet.

use std::time::Duration;

use super::epochs::Epochs;
// Of the standard library, or of loom ([`super::under_loom`]).
use super::sync::{AtomicU64, Condvar, Mutex, MutexGuard, Ordering};

/// Anything that takes room while it waits.
pub trait Length {
    /// Its bytes.
    fn length(&self) -> u64;
}

/// Nobody writes any more.
#[derive(Debug, PartialEq, Eq)]
pub struct Gone;

/// What was there to be taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken<P> {
    /// The next one.
    One(P),
    /// Nothing has come so long.
    Nothing,
    /// There will be no more.
    Over,
}

#[derive(Debug)]
struct State<P> {
    epochs: Epochs<P>,
    /// No more will be sent.
    over: bool,
    /// Nobody writes any more.
    gone: bool,
}

/// The meeting place.
#[derive(Debug)]
pub struct Waiting<P> {
    state: Mutex<State<P>>,
    changed: Condvar,
    /// Bytes of what waits, and of what is being written.
    backlog: AtomicU64,
    most: usize,
}

impl<P: Length> Waiting<P> {
    /// One in which so many may wait.
    pub fn new(most: usize) -> Self {
        let state = State { epochs: Epochs::default(), over: false, gone: false };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            backlog: AtomicU64::new(0),
            most: most.max(1),
        }
    }

    fn state(&self) -> MutexGuard<'_, State<P>> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<P>>) -> MutexGuard<'a, State<P>> {
        self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Bytes that were sent and are not written yet.
    pub fn backlog(&self) -> u64 {
        self.backlog.load(Ordering::Acquire)
    }

    /// Whether one can be put in without waiting.
    pub fn has_room(&self) -> bool {
        self.state().epochs.len() < self.most
    }

    /// What is put in from here on is taken after all that was put in before.
    pub fn fence(&self) {
        self.state().epochs.fence();
    }

    /// Puts one in; waits while too many are there. `first`: it overtakes what was not put in first since the last fence.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn put(&self, parcel: P, first: bool) -> Result<(), Gone> {
        let mut state = self.state();
        while state.epochs.len() >= self.most && !state.gone {
            state = self.wait(state);
        }
        if state.gone {
            return Err(Gone);
        }
        self.backlog.fetch_add(parcel.length(), Ordering::AcqRel);
        state.epochs.put(parcel, first);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits for the next one, as long as it takes or for a while. Its length stays in the backlog until it is [written](Self::written).
    pub fn take(&self, patience: Option<Duration>) -> Taken<P> {
        let mut state = self.state();
        let mut has_waited = false;
        loop {
            if let Some(parcel) = state.epochs.take() {
                drop(state);
                self.changed.notify_all();
                return Taken::One(parcel);
            }
            if state.over {
                return Taken::Over;
            }
            state = match patience {
                None => self.wait(state),
                Some(_) if has_waited => return Taken::Nothing,
                Some(patience) => {
                    let waited = self.changed.wait_timeout(state, patience);
                    waited.unwrap_or_else(std::sync::PoisonError::into_inner).0
                }
            };
            has_waited = true;
        }
    }

    /// So many bytes of what was taken are written.
    pub fn written(&self, bytes: u64) {
        self.backlog.fetch_sub(bytes, Ordering::AcqRel);
    }

    /// Lets `revise` change what waits since the last fence and was not put in first, one after the other, the last one first. The bytes by
    /// which they became shorter. For the thread that puts in: no other may meanwhile.
    pub fn revise(&self, mut revise: impl FnMut(&mut P)) -> u64 {
        let (mut behind, mut less) = (0, 0);
        loop {
            // Whoever takes need not wait for long: it is let in between two of them, and takes them from the front.
            let mut state = self.state();
            let Some(parcel) = state.epochs.back_by(behind) else { return less };
            let before = parcel.length();
            revise(parcel);
            let gone = before.saturating_sub(parcel.length());
            self.backlog.fetch_sub(gone, Ordering::AcqRel);
            less += gone;
            behind += 1;
        }
    }

    /// No more will be put in.
    pub fn end(&self) {
        self.state().over = true;
        self.changed.notify_all();
    }

    /// Nobody takes any more: whoever waits for room goes on, and what waits is let go.
    pub fn go(&self) {
        let mut state = self.state();
        state.gone = true;
        let left = std::mem::take(&mut state.epochs);
        drop(state);
        self.changed.notify_all();
        drop(left);
    }
}
