//! Shared by formats that have a map with an entry for each block of the disk, and blocks of the file that are allocated as the
//! disk is written.

mod allocator;
mod dirty;
mod map;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use allocator::{Allocator, Run};
pub(crate) use dirty::DirtySectors;
pub(crate) use map::{ENTRY_BYTES, EntryMap};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
