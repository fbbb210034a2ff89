//! What workers that go through a disk in pieces find first, counted by offset and not by time.

use std::sync::{Mutex, PoisonError};

/// Of all that is kept, what has the lowest offset.
#[derive(Debug)]
pub(crate) struct FirstByOffset<T>(Mutex<Option<(u64, T)>>);

impl<T> Default for FirstByOffset<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> FirstByOffset<T> {
    /// Keeps `value` unless something with an offset as low is kept already.
    pub(crate) fn keep(&self, offset: u64, value: T) {
        let mut lowest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lowest.as_ref().is_none_or(|(earlier, _)| offset < *earlier) {
            *lowest = Some((offset, value));
        }
    }

    /// Whether anything is kept.
    pub(crate) fn is_some(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Whether something with an offset below `offset` is kept.
    pub(crate) fn is_below(&self, offset: u64) -> bool {
        let lowest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lowest.as_ref().is_some_and(|(earlier, _)| *earlier < offset)
    }

    /// Gives out what is kept.
    pub(crate) fn take(&self) -> Option<T> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        kept.map(|(_, value)| value)
    }
}
