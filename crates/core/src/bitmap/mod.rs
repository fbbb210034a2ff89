//! Dirty bitmaps in memory: which parts of a disk have been written since some moment.
//!
//! Layers, each one file:
//!
//! | file | what |
//! |---|---|
//! | `tree` | a set of bits: atomic leaf words under summary levels, pages made on first use |
//! | `ranges` | the same in bytes: granularity, areas, merging, [`RangeMap`] |
//! | `serial` | the bits as little-endian bytes, chunk by chunk, as images and migration store them |
//! | `current` | marking through a state that may be replaced meanwhile |
//! | `dirty`, `list` | [`DirtyBitmap`] with a name, flags and a successor; the [`BitmapList`] of a node |
//! | `persistent` | what a format offers that keeps bitmaps in its images |
//!
//! Marking is on the path of every write, from every I/O thread at once: it takes no lock, and where the
//! bits are set already it writes to no shared cache line. What is done seldom (clearing, resizing,
//! successors) swaps a whole state in, and [`DirtyBitmap::mark`] looks again afterwards, so a mark that
//! races with a swap lands in the new state too: marks may be kept too long, never lost.
//!
//! Sizes come from images and from QMP, so every allocation here is either proportional to the bits really
//! set or bounded by [`MAX_GRANULES`].

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

/// The primitives of the parts that also run under loom.
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
