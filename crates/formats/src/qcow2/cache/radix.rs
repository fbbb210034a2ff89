//! A sparse array that only grows, read without a lock.

use std::sync::OnceLock;

const BITS: u32 = 10;
const FAN: usize = 1 << BITS;
const TOP: usize = 1 << 12;

type Leaf<T> = Box<[T]>;
type Middle<T> = Box<[OnceLock<Leaf<T>>]>;

/// A sparse array of `T` for indices below 2^32, made where it is touched.
pub(in super::super) struct Radix<T> {
    top: OnceLock<Box<[OnceLock<Middle<T>>]>>,
}

impl<T> Default for Radix<T> {
    fn default() -> Self {
        Self { top: OnceLock::new() }
    }
}

fn digits(index: u64) -> Option<(usize, usize, usize)> {
    let index = usize::try_from(index).ok()?;
    let top = index >> (2 * BITS);
    (top < TOP).then_some((top, (index >> BITS) % FAN, index % FAN))
}

fn cells<T>(count: usize) -> Box<[OnceLock<T>]> {
    (0..count).map(|_| OnceLock::new()).collect()
}

impl<T: Default> Radix<T> {
    /// The element, if its part of the array has been touched.
    pub(in super::super) fn get(&self, index: u64) -> Option<&T> {
        let (top, middle, leaf) = digits(index)?;
        self.top.get()?.get(top)?.get()?.get(middle)?.get()?.get(leaf)
    }

    /// The element, made if need be. Indices of 2^32 and more share the last element; callers do not reach them,
    /// since tables are limited.
    pub(in super::super) fn get_or_make(&self, index: u64) -> &T {
        let (top, middle, leaf) = digits(index).unwrap_or((TOP - 1, FAN - 1, FAN - 1));
        let tops = self.top.get_or_init(|| cells(TOP));
        let middles = tops[top].get_or_init(|| cells(FAN));
        let leaves = middles[middle].get_or_init(|| (0..FAN).map(|_| T::default()).collect());
        &leaves[leaf]
    }
}
