//! Dirty bitmaps in memory: a record of the parts of a disk that were written since some moment.
//!
//! The layers, one file each:
//!
//! | file | content |
//! |---|---|
//! | `tree` | a set of bits: atomic leaf words under summary levels, pages allocated on first use |
//! | `ranges` | the same in bytes: granularity, areas, merging, [`RangeMap`] |
//! | `serial` | the bits as little-endian bytes, chunk by chunk, as images and migration streams store them |
//! | `current` | marking in a state that another thread may replace concurrently |
//! | `dirty`, `list` | [`DirtyBitmap`] with a name, flags and a successor; the [`BitmapList`] of a node |
//! | `persistent` | the interface of formats that store bitmaps in their images |
//!
//! Every write, on every I/O thread, marks its range. Therefore marking takes no lock, and it writes to no shared cache
//! line if the bits are set already. Rare changes (clearing, resizing, successors) swap in a new state.
//! [`DirtyBitmap::mark`] checks for such a swap afterwards and marks again, so a mark that races with a swap reaches
//! the new state too. Marks may stay too long, but are never lost.
//!
//! Sizes come from images and from QMP. So every allocation here is either proportional to the number of dirty bits or
//! bounded by [`MAX_GRANULES`].

mod current;
mod dirty;
mod error;
mod list;
mod persistent;
mod ranges;
mod serial;
#[cfg(test)]
mod tests;
mod tree;
#[cfg(test)]
mod under_loom;

/// The atomics of the files that also run under loom.
mod atomics {
    pub(super) use std::sync::atomic::{Ordering, fence};
}

pub use dirty::{BitmapInfo, Busy, Checks, DirtyBitmap, Successor};
pub use error::BitmapError;
pub use list::BitmapList;
pub use persistent::PersistentBitmaps;
pub use ranges::{MAX_GRANULARITY, MAX_GRANULES, MIN_GRANULARITY, RangeMap, default_granularity};

/// Longest name of a bitmap, in bytes.
pub const MAX_NAME: usize = 1023;
