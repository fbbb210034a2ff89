//! The first result of several workers, where "first" means the lowest offset on the disk and not the earliest time.
//!
//! The engines that compare, copy and rebase process a disk in pieces on several threads. A difference or a failure at a
//! low offset may be found after one at a high offset. [`FirstByOffset`] keeps the one at the lowest offset, so that the
//! outcome is the same on every run and for any number of workers.

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
