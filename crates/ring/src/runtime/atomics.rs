//! The synchronisation primitives of [`wake`](super::wake), [`oneshot`](super::oneshot) and others. They are in one
//! module, so that the model tests can compile the same source files with the primitives of a model checker.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Locks the mutex. A poisoned mutex is not an error, because no panic leaves the locked data inconsistent.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
