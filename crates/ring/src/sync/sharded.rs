//! Data of which every I/O thread has its own copy, so that hot paths touch no shared cache line.

use crossbeam_utils::CachePadded;

use crate::runtime::{MAX_IO_THREADS, try_thread_index};

/// Names a copy of [`Sharded`] data. A thread's copy may change: it has another one in each
/// [`block_on`](crate::block_on), so that what is counted up and down notes where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard(usize);

impl Shard {
    /// That of the calling thread.
    pub fn mine() -> Shard {
        Shard(try_thread_index().unwrap_or(MAX_IO_THREADS))
    }
}

/// One `T` per I/O thread, and one that all other threads share.
#[derive(Debug)]
pub struct Sharded<T>(Box<[CachePadded<T>]>);

impl<T> Sharded<T> {
    /// Makes every copy with `make`.
    pub fn new(mut make: impl FnMut() -> T) -> Sharded<T> {
        Sharded((0..=MAX_IO_THREADS).map(|_| CachePadded::new(make())).collect())
    }

    /// The calling thread's copy.
    pub fn mine(&self) -> &T {
        self.at(Shard::mine())
    }

    /// The copy of a shard, for those who must come back to the same one.
    pub fn at(&self, shard: Shard) -> &T {
        &self.0[shard.0.min(MAX_IO_THREADS)]
    }

    /// All copies.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|padded| &**padded)
    }
}

impl<T: Default> Default for Sharded<T> {
    fn default() -> Self {
        Sharded::new(T::default)
    }
}
