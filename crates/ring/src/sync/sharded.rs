//! Data of which every I/O thread has its own copy, so that hot paths touch no shared cache line.

use crossbeam_utils::CachePadded;

use crate::runtime::{MAX_IO_THREADS, try_thread_index};

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
        let index = try_thread_index().unwrap_or(MAX_IO_THREADS);
        &self.0[index.min(MAX_IO_THREADS)]
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
