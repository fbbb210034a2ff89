//! Data with one copy for each I/O thread, so that I/O threads do not share cache lines on hot paths.

use crossbeam_utils::CachePadded;

use crate::runtime::{MAX_IO_THREADS, try_thread_index};

/// Identifies one copy of [`Sharded`] data. The shard of a thread may change with each [`block_on`](crate::block_on).
/// So code that increments a counter and decrements it later must store the shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard(usize);

impl Shard {
    /// The shard of the calling thread.
    pub fn current() -> Shard {
        Shard(try_thread_index().unwrap_or(MAX_IO_THREADS))
    }
}

/// One `T` for each I/O thread, and one `T` that all other threads share.
#[derive(Debug)]
pub struct Sharded<T>(Box<[CachePadded<T>]>);

impl<T> Sharded<T> {
    /// Calls `make` for each copy.
    pub fn new(mut make: impl FnMut() -> T) -> Sharded<T> {
        Sharded((0..=MAX_IO_THREADS).map(|_| CachePadded::new(make())).collect())
    }

    /// The calling thread's copy.
    pub fn local(&self) -> &T {
        self.at(Shard::current())
    }

    /// The copy of a shard, for callers that must access the same copy again.
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
