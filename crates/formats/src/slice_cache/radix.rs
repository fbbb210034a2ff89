//! A sparse array that never shrinks and that is read without a lock.
//!
//! The array is a tree of four levels with 256 children each. Only used parts of the array take memory (about 20 KiB for
//! the first element), so that a backing chain of a thousand images takes little memory.

use std::sync::OnceLock;

const ENTRIES_PER_NODE: usize = 256;

type Leaf<T> = Box<[T]>;
type Low<T> = Box<[OnceLock<Leaf<T>>]>;
type High<T> = Box<[OnceLock<Low<T>>]>;
type Top<T> = Box<[OnceLock<High<T>>]>;

/// A sparse array of `T` for indices below 2^32. Its parts are allocated when they are first used.
pub(crate) struct Radix<T> {
    top: OnceLock<Top<T>>,
}

impl<T> Default for Radix<T> {
    fn default() -> Self {
        Self { top: OnceLock::new() }
    }
}

fn digits(index: u64) -> Option<[usize; 4]> {
    let [a, b, c, d] = u32::try_from(index).ok()?.to_be_bytes();
    Some([a.into(), b.into(), c.into(), d.into()])
}

fn cells<T>() -> Box<[OnceLock<T>]> {
    (0..ENTRIES_PER_NODE).map(|_| OnceLock::new()).collect()
}

impl<T: Default> Radix<T> {
    /// The element at `index`, if its part of the array has been allocated.
    pub(crate) fn get(&self, index: u64) -> Option<&T> {
        let [top, high, low, leaf] = digits(index)?;
        self.top.get()?.get(top)?.get()?.get(high)?.get()?.get(low)?.get()?.get(leaf)
    }

    /// The element at `index`. Allocates its part of the array if necessary. Indices of 2^32 and more share the last
    /// element. Callers do not use such indices, because tables are limited in size.
    pub(crate) fn get_or_make(&self, index: u64) -> &T {
        let [top, high, low, leaf] = digits(index).unwrap_or([ENTRIES_PER_NODE - 1; 4]);
        let tops = self.top.get_or_init(cells);
        let highs = tops[top].get_or_init(cells);
        let lows = highs[high].get_or_init(cells);
        let leaves =
            lows[low].get_or_init(|| (0..ENTRIES_PER_NODE).map(|_| T::default()).collect());
        &leaves[leaf]
    }
}
