//! A look at a filter's counters, from any thread and after the filter's end.

use std::sync::{Arc, Mutex, PoisonError};

/// The counters that a filter publishes between records.
#[derive(Debug, Default)]
pub struct Watch<T>(pub(crate) Arc<Mutex<T>>);

impl<T: Clone> Watch<T> {
    /// The counters as they are now; those at the end, once the filter has ended.
    pub fn look(&self) -> T {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
