//! The synchronisation primitives of [`wake`](super::wake), [`oneshot`](super::oneshot) and others, in one module, so
//! that the model tests can compile the same files against the primitives of a model checker.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Locks. A panic while the lock is held does not matter, because every update of the locked data is a single
/// assignment.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
