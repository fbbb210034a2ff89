//! The result with the lowest disk offset, among the results of several workers.
//!
//! A comparison, a copy and a rebase process a disk in pieces on several threads. A worker may find a difference or a
//! failure at a high offset before another worker finds one at a low offset. [`FirstByOffset`] keeps the value with the
//! lowest offset, so that the outcome is the same on every run and for every number of workers.

use std::sync::{Mutex, PoisonError};

/// Keeps the value with the lowest offset among all values passed to [`keep`](Self::keep).
#[derive(Debug)]
pub(crate) struct FirstByOffset<T>(Mutex<Option<(u64, T)>>);

impl<T> Default for FirstByOffset<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> FirstByOffset<T> {
    /// Keeps `value`, unless a value with the same or a lower offset is already kept.
    pub(crate) fn keep(&self, offset: u64, value: T) {
        let mut lowest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lowest.as_ref().is_none_or(|(earlier, _)| offset < *earlier) {
            *lowest = Some((offset, value));
        }
    }

    /// Whether a value is kept.
    pub(crate) fn is_some(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Whether a value with an offset below `offset` is kept.
    pub(crate) fn is_below(&self, offset: u64) -> bool {
        let lowest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lowest.as_ref().is_some_and(|(earlier, _)| *earlier < offset)
    }

    /// Removes the kept value and returns it.
    pub(crate) fn take(&self) -> Option<T> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        kept.map(|(_, value)| value)
    }
}
