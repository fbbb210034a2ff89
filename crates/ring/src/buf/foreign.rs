//! Foreign memory: memory that others may change at any time, such as the memory of a guest or a shared buffer.
//!
//! The bytes of an [`IoBuf`] cannot change while it exists, and code relies on this. Foreign memory has no such guarantee,
//! so there is no slice of it: the host transfers data from and to it, or it is copied as a whole. Copies use atomic
//! accesses, because another thread may write at the same time. A copy may contain old and new bytes.
//!
//! The owner of the memory is kept until the operation of the host has completed, even if the future of the operation was
//! dropped: the slot of the operation owns the vector, and so the owner.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use smallvec::SmallVec;

use super::{IoBuf, IoBufMut};

/// Keeps foreign memory valid: a mapping, for example.
pub type ForeignOwner = Arc<dyn Any + Send + Sync>;

/// A range of memory that the owner of the vector keeps valid.
#[derive(Clone, Copy)]
struct Part {
    base: *mut u8,
    len: usize,
}

type Parts = SmallVec<[Part; 4]>;

/// The ranges and the owner of foreign memory.
#[derive(Clone)]
struct Memory {
    parts: Parts,
    len: usize,
    owner: ForeignOwner,
}

// SAFETY: the pointers are valid on every thread as long as the owner exists, and the owner may be used and dropped on every
// thread. All accesses of this module are atomic.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(owner: ForeignOwner, ranges: impl IntoIterator<Item = (*mut u8, usize)>) -> Self {
        let parts = ranges.into_iter().filter(|(_, len)| *len > 0);
        let parts: Parts = parts.map(|(base, len)| Part { base, len }).collect();
        let len = parts.iter().fold(0_usize, |sum, part| sum.saturating_add(part.len));
        Self { parts, len, owner }
    }

    /// Splits off the first `at` bytes.
    fn split_to(&mut self, at: usize) -> Self {
        let (mut head, mut rest, mut left) = (Parts::new(), Parts::new(), at.min(self.len));
        for part in self.parts.drain(..) {
            let first = part.len.min(left);
            left -= first;
            if first > 0 {
                head.push(Part { base: part.base, len: first });
            }
            if first < part.len {
                // `first` is less than the length of the part, so the pointer stays inside it.
                rest.push(Part { base: part.base.wrapping_add(first), len: part.len - first });
            }
        }
        let taken = at.min(self.len);
        self.parts = rest;
        self.len -= taken;
        Self { parts: head, len: taken, owner: Arc::clone(&self.owner) }
    }

    fn is_aligned(&self, alignment: usize) -> bool {
        let mask = alignment.max(1) - 1;
        self.parts.iter().all(|part| (part.base.addr() | part.len) & mask == 0)
    }

    /// Copies the start of the memory to `out`.
    fn copy_to(&self, mut out: &mut [u8]) {
        for part in &self.parts {
            let Some((to, rest)) = out.split_at_mut_checked(part.len.min(out.len())) else {
                return;
            };
            // SAFETY: `to` is not longer than the part, which the owner keeps valid.
            unsafe { load(part.base, to) };
            out = rest;
        }
    }

    /// Copies `data` to the start of the memory.
    fn copy_from(&self, mut data: &[u8]) {
        for part in &self.parts {
            let Some((from, rest)) = data.split_at_checked(part.len.min(data.len())) else {
                return;
            };
            // SAFETY: `from` is not longer than the part, which the owner keeps valid.
            unsafe { store(part.base, from) };
            data = rest;
        }
    }
}

const WORD: usize = size_of::<u64>();

/// The number of bytes before the first aligned word.
fn to_word(base: *mut u8) -> usize {
    base.addr().next_multiple_of(WORD) - base.addr()
}

/// Copies `out.len()` bytes at `base` to `out`.
///
/// # Safety
/// The bytes are valid for reads.
unsafe fn load(base: *mut u8, out: &mut [u8]) {
    let (head, rest) = out.split_at_mut(to_word(base).min(out.len()));
    let (words, tail) = rest.as_chunks_mut::<WORD>();
    let mut from = base;
    let byte = |to: &mut u8, from: &mut *mut u8| {
        // SAFETY: inside the range that the caller guarantees; the loop moves forward by one byte.
        *to = unsafe { AtomicU8::from_ptr(*from) }.load(Relaxed);
        *from = from.wrapping_add(1);
    };
    head.iter_mut().for_each(|to| byte(to, &mut from));
    for to in words {
        // SAFETY: inside the range, and aligned: the head ends at a word.
        let word = unsafe { AtomicU64::from_ptr(from.cast()) }.load(Relaxed);
        *to = word.to_ne_bytes();
        from = from.wrapping_add(WORD);
    }
    tail.iter_mut().for_each(|to| byte(to, &mut from));
}

/// Copies `data` to `base`.
///
/// # Safety
/// `data.len()` bytes at `base` are valid for writes.
unsafe fn store(base: *mut u8, data: &[u8]) {
    let (head, rest) = data.split_at(to_word(base).min(data.len()));
    let (words, tail) = rest.as_chunks::<WORD>();
    let mut to = base;
    let byte = |from: u8, to: &mut *mut u8| {
        // SAFETY: inside the range that the caller guarantees; the loop moves forward by one byte.
        unsafe { AtomicU8::from_ptr(*to) }.store(from, Relaxed);
        *to = to.wrapping_add(1);
    };
    head.iter().for_each(|from| byte(*from, &mut to));
    for from in words {
        // SAFETY: inside the range, and aligned: the head ends at a word.
        unsafe { AtomicU64::from_ptr(to.cast()) }.store(u64::from_ne_bytes(*from), Relaxed);
        to = to.wrapping_add(WORD);
    }
    tail.iter().for_each(|from| byte(*from, &mut to));
}

macro_rules! foreign {
    ($(#[$doc:meta])* $name:ident, $pointer:ty, $cast:ident, $access:literal) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub struct $name(Memory);

        impl $name {
            /// Foreign memory in several ranges, in order: pointers and lengths in bytes. `owner` is dropped when the
            /// last operation on the memory has completed.
            ///
            /// # Safety
            #[doc = concat!("Each range is valid for ", $access, " as long as `owner` exists. No Rust reference to the")]
            /// bytes exists during this time, except to atomics and `UnsafeCell`s. Others may change the bytes.
            pub unsafe fn new(
                owner: ForeignOwner,
                ranges: impl IntoIterator<Item = ($pointer, usize)>,
            ) -> Self {
                let ranges = ranges.into_iter();
                Self(Memory::new(owner, ranges.map(|(base, len)| (base.$cast(), len))))
            }

            /// Number of bytes.
            pub fn len(&self) -> usize {
                self.0.len
            }

            /// Whether there are no bytes.
            pub fn is_empty(&self) -> bool {
                self.0.len == 0
            }

            /// Whether the address and the length of each range are multiples of `alignment`, a power of two.
            pub fn is_aligned(&self, alignment: usize) -> bool {
                self.0.is_aligned(alignment)
            }

            /// Splits off the first `at` bytes, or all if there are fewer.
            #[must_use]
            pub fn split_to(&mut self, at: usize) -> Self {
                Self(self.0.split_to(at))
            }

            /// The ranges, for system calls.
            pub(crate) fn ranges(&self) -> impl Iterator<Item = (*const u8, usize)> {
                self.0.parts.iter().map(|part| (part.base.cast_const(), part.len))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name))
                    .field("len", &self.0.len)
                    .field("ranges", &self.0.parts.len())
                    .finish_non_exhaustive()
            }
        }
    };
}

foreign!(
    /// Foreign memory from which data is written to a disk.
    ForeignVec,
    *const u8,
    cast_mut,
    "reads and writes (nothing is written)"
);
foreign!(
    /// Foreign memory to which data of a disk is read.
    ForeignVecMut,
    *mut u8,
    cast,
    "reads and writes"
);

impl ForeignVec {
    /// Copies the bytes to an owned buffer, which nobody can change.
    pub fn to_buf(&self) -> IoBuf {
        let mut buf = IoBufMut::new(self.len());
        self.copy_to(&mut buf);
        buf.freeze()
    }

    /// Copies the first bytes to `out`.
    pub fn copy_to(&self, out: &mut [u8]) {
        self.0.copy_to(out);
    }
}

impl ForeignVecMut {
    /// Copies `data` to the first bytes.
    pub fn copy_from(&self, data: &[u8]) {
        self.0.copy_from(data);
    }

    /// Sets all bytes to zero.
    pub fn zero(&self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        for part in &self.0.parts {
            let mut done = 0;
            while let Some(zeroes) = ZEROES.get(..(part.len - done).min(ZEROES.len()))
                && !zeroes.is_empty()
            {
                // SAFETY: inside the part, which the owner keeps valid.
                unsafe { store(part.base.wrapping_add(done), zeroes) };
                done += zeroes.len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// Memory in words that anybody may change.
    fn words(count: usize) -> Arc<Vec<AtomicU64>> {
        Arc::new((0..count).map(|_| AtomicU64::new(0)).collect())
    }

    fn base(words: &Arc<Vec<AtomicU64>>) -> *mut u8 {
        words.as_ptr().cast::<u8>().cast_mut()
    }

    fn pair(words: &Arc<Vec<AtomicU64>>, ranges: &[(usize, usize)]) -> (ForeignVec, ForeignVecMut) {
        let own = || -> ForeignOwner { Arc::clone(words) as ForeignOwner };
        let start = base(words);
        assert!(ranges.iter().all(|(at, len)| at + len <= words.len() * WORD));
        let all = ranges.iter().map(|(at, len)| (start.wrapping_add(*at), *len));
        // SAFETY: the ranges lie in the words, which the owner keeps and which are atomics.
        unsafe {
            let reads = all.clone().map(|(base, len)| (base.cast_const(), len));
            (ForeignVec::new(own(), reads), ForeignVecMut::new(own(), all))
        }
    }

    #[test]
    fn copies_at_every_alignment_transfer_every_byte() {
        for start in 0..9 {
            for len in [0, 1, 7, 8, 9, 20] {
                let words = words(8);
                let (from, to) = pair(&words, &[(start, len), (40, 3)]);
                let data: Vec<u8> = (1..).take(len + 3).collect();
                to.copy_from(&data);
                assert_eq!(*from.to_buf(), data);
                let (all, _) = pair(&words, &[(0, 64)]);
                let all = all.to_buf();
                assert_eq!(&all[start..start + len], &data[..len]);
                assert!(all[..start].iter().all(|byte| *byte == 0));
                to.zero();
                assert!(from.to_buf().iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn a_split_keeps_the_order_of_the_bytes() {
        let words = words(8);
        let (_, to) = pair(&words, &[(0, 64)]);
        to.copy_from(&(0..64).collect::<Vec<u8>>());
        for at in [0, 1, 9, 10, 19, 20, 21] {
            let (mut from, _) = pair(&words, &[(3, 10), (40, 10)]);
            let whole = from.to_buf();
            let head = from.split_to(at);
            assert_eq!(head.len() + from.len(), 20);
            assert_eq!([&*head.to_buf(), &*from.to_buf()].concat(), *whole);
        }
    }

    #[test]
    fn the_owner_lives_as_long_as_a_part() {
        let words = words(2);
        let (mut from, to) = pair(&words, &[(0, 16)]);
        drop(to);
        let head = from.split_to(4);
        drop(from);
        assert_eq!(Arc::strong_count(&words), 2);
        drop(head);
        assert_eq!(Arc::strong_count(&words), 1);
    }

    #[test]
    fn alignment_concerns_addresses_and_lengths() {
        let words = words(8);
        assert!(pair(&words, &[(0, 8), (16, 24)]).0.is_aligned(8));
        assert!(!pair(&words, &[(0, 8), (16, 23)]).0.is_aligned(8));
        assert!(!pair(&words, &[(4, 8)]).1.is_aligned(8));
        assert!(pair(&words, &[(3, 5)]).1.is_aligned(1));
    }

    #[test]
    fn a_copy_of_memory_that_changes_does_not_change() {
        let words = words(16);
        let stop = Arc::new(AtomicBool::new(false));
        let (scribbled, stopped) = (Arc::clone(&words), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut byte = 0_u8;
            while !stopped.load(Relaxed) {
                byte = byte.wrapping_add(1);
                scribbled
                    .iter()
                    .for_each(|word| word.store(u64::from_ne_bytes([byte; 8]), Relaxed));
            }
        });
        for _ in 0..if cfg!(miri) { 5 } else { 500 } {
            let copy = pair(&words, &[(0, 128)]).0.to_buf();
            let again = copy.to_vec();
            assert_eq!(*copy, again);
            // Each word is copied at once.
            assert!(copy.chunks(8).all(|word| word.iter().all(|byte| *byte == word[0])));
        }
        stop.store(true, Relaxed);
        thread.join().unwrap();
    }
}
