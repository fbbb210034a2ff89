//! Shared parts of formats with a simple block map.
//!
//! Such a format has a map with one entry for each block of the disk, and allocates blocks of the file when the disk is
//! written. This module contains the map in memory (`map`), its dirty sectors (`dirty`), the allocator of blocks
//! (`allocator`), freed blocks before they return to the allocator (`freed`), the extents that the map describes
//! (`extent`), the data of a write (`content`), the requests (`image`), reading all entries (`survey`), and reopen
//! (`reopen`). The formats vdi and parallels use all parts, and add the header, the layout and the order of writes. vpc and
//! qed use some of the parts.

mod allocator;
mod content;
mod dirty;
pub(crate) mod extent;
mod freed;
mod image;
mod map;
pub(crate) mod reopen;
pub(crate) mod survey;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use allocator::{Allocator, Run};
pub(crate) use content::Content;
pub(crate) use dirty::DirtySectors;
pub(crate) use extent::Extent;
pub(crate) use freed::FreedBlocks;
pub(crate) use image::{BlockImage, Parts};
pub(crate) use map::{ENTRY_BYTES, EntryMap};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The length of a buffer in bytes.
pub(crate) fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
