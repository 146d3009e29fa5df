//! Where the threads of a bundle meet: lanes put blocks in as they come, one thread takes them out in order.

use super::order::{Order, OrderError};
// Of the standard library, or of loom ([`super::under_loom`]).
use super::sync::{Condvar, Mutex, MutexGuard};

/// What taking brings.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken<T> {
    /// The next block.
    Block(T),
    /// There is no more, and nothing is missing.
    Complete,
    /// It was broken off.
    Broken,
}

#[derive(Debug)]
struct State<T> {
    order: Order<T>,
    broken: bool,
}

/// The meeting place.
#[derive(Debug)]
pub struct Gate<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> Gate<T> {
    /// One in which so many blocks may wait for their turn.
    pub fn new(ahead_most: u64) -> Self {
        Self {
            state: Mutex::new(State { order: Order::new(ahead_most), broken: false }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<T>>) -> MutexGuard<'a, State<T>> {
        self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Puts a block in, once there is room for it; false: it was broken off.
    ///
    /// # Errors
    /// [`OrderError`].
    pub fn put(&self, number: u64, block: T) -> Result<bool, OrderError> {
        let mut state = self.state();
        while !state.order.has_room(number) && !state.broken {
            state = self.wait(state);
        }
        if state.broken {
            return Ok(false);
        }
        state.order.put(number, block)?;
        drop(state);
        self.changed.notify_all();
        Ok(true)
    }

    /// A lane tells how many blocks there are in all.
    ///
    /// # Errors
    /// [`OrderError`].
    pub fn end(&self, blocks: u64) -> Result<(), OrderError> {
        self.state().order.end(blocks)?;
        self.changed.notify_all();
        Ok(())
    }

    /// Waits for the next block.
    pub fn take(&self) -> Taken<T> {
        let mut state = self.state();
        let taken = loop {
            if state.broken {
                return Taken::Broken;
            }
            if let Some(block) = state.order.take() {
                break Taken::Block(block);
            }
            if state.order.is_complete() {
                return Taken::Complete;
            }
            state = self.wait(state);
        };
        drop(state);
        self.changed.notify_all();
        taken
    }

    /// Everybody who waits, or will, hears that it is over. Whether it was not yet.
    pub fn break_off(&self) -> bool {
        let before = std::mem::replace(&mut self.state().broken, true);
        self.changed.notify_all();
        !before
    }

    /// Whether it was broken off.
    pub fn is_broken(&self) -> bool {
        self.state().broken
    }
}
