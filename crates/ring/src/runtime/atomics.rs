//! The synchronisation primitives of [`wake`](super::wake), [`oneshot`](super::oneshot) and others, in one place so that the model
//! tests can compile the same files against a model checker's.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Locks; a panic elsewhere does not matter, because every update of what is locked here is a single assignment.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
