//! Dirty bitmaps in memory. A dirty bitmap records the parts of a disk that were written after the bitmap was created
//! or cleared.
//!
//! The parts, one file each:
//!
//! | file | content |
//! |---|---|
//! | `tree` | a set of bits: atomic leaf words under summary levels, pages allocated on first use |
//! | `ranges` | the same set in units of bytes: granularity, areas, merging, [`RangeMap`] |
//! | `serial` | the bits as little-endian bytes, chunk by chunk, as images and migration streams store them |
//! | `current` | setting bits in a state that another thread may replace concurrently |
//! | `dirty`, `list` | [`DirtyBitmap`] with a name, flags and a successor; the [`BitmapList`] of a node |
//! | `persistent` | the interface of formats that store bitmaps in their images |
//! | `error` | [`BitmapError`] |
//!
//! Every write, on every I/O thread, sets the bits of its range in the enabled bitmaps ([`DirtyBitmap::mark`]).
//! Therefore this function takes no lock. If the bits are set already, it writes to no shared cache line. Rare
//! changes (clearing, resizing, enabling, successors) replace the state. After it has set the bits,
//! [`DirtyBitmap::mark`] checks whether the state was replaced, and if so, sets the bits in the new state too. So a
//! range may stay dirty longer than necessary, but no write is lost.
//!
//! Sizes come from images and from QMP and may be huge. So the size of every allocation is either proportional to the
//! number of dirty bits or limited by [`MAX_GRANULES`].

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

/// The atomics of the module `current`. The loom models replace this module by a module with loom's types.
mod atomics {
    pub(super) use std::sync::atomic::{Ordering, fence};
}

pub use dirty::{BitmapInfo, Busy, Checks, DirtyBitmap, Successor};
pub use error::BitmapError;
pub use list::BitmapList;
pub use persistent::PersistentBitmaps;
pub use ranges::{MAX_GRANULARITY, MAX_GRANULES, MIN_GRANULARITY, RangeMap, default_granularity};

/// Maximum length of a bitmap's name, in bytes.
pub const MAX_NAME: usize = 1023;
