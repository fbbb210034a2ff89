//! Shared by formats that have a map with an entry for each block of the disk, and blocks of the file that are allocated as the
//! disk is written.

mod allocator;
mod content;
mod dirty;
pub(crate) mod extent;
mod map;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use allocator::{Allocator, Run};
pub(crate) use content::Content;
pub(crate) use dirty::DirtySectors;
pub(crate) use extent::Extent;
pub(crate) use map::{ENTRY_BYTES, EntryMap};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The length of a buffer.
pub(crate) fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
