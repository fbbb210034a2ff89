//! [`IoBufMut`]: the unique view.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use super::IoBuf;
use super::block::BlockRef;
use super::pool::{self, Arena};

/// A unique view of refcounted memory: nobody else can read or write these bytes.
///
/// A buffer of 512 bytes or more from [`IoBufMut::new`] and similar constructors is aligned to 4096 bytes. A buffer
/// made from a `Vec` keeps the alignment of the `Vec`. The memory stays allocated until all views split from it are
/// dropped.
pub struct IoBufMut {
    pub(super) block: BlockRef,
    pub(super) ptr: NonNull<u8>,
    pub(super) len: usize,
}

// SAFETY: the view has exclusive use of its range (module invariant), and the block may be dropped on any thread.
unsafe impl Send for IoBufMut {}
// SAFETY: `&IoBufMut` only reads the range.
unsafe impl Sync for IoBufMut {}

impl IoBufMut {
    /// A buffer of `len` arbitrary but initialised bytes, from the pool.
    pub fn new(len: usize) -> Self {
        Self::take(len).0
    }

    /// Like [`Self::new`], but returns `None` if `len` is more than 16 KiB and there is not enough memory or address
    /// space. Use it for lengths that a peer chooses.
    pub fn try_new(len: usize) -> Option<Self> {
        Some(Self::of(pool::try_take(len)?.0, len))
    }

    fn take(len: usize) -> (Self, bool) {
        let (block, zero) = pool::take(len);
        (Self::of(block, len), zero)
    }

    fn of(block: BlockRef, len: usize) -> Self {
        let ptr = block.start();
        debug_assert!(len <= block.capacity());
        IoBufMut { block, ptr, len }
    }

    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let (mut buf, zero) = Self::take(len);
        if !zero {
            buf.fill(0);
        }
        buf
    }

    /// A buffer of `len` bytes of the given value.
    pub fn filled(len: usize, byte: u8) -> Self {
        let mut buf = Self::new(len);
        buf.fill(byte);
        buf
    }

    /// A buffer with a copy of `bytes`.
    pub fn copy_from(bytes: &[u8]) -> Self {
        let mut buf = Self::new(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Splits the view at `at`. `self` becomes the front part; the back part is returned. O(1).
    ///
    /// # Panics
    /// If `at` is beyond the end.
    #[must_use = "the part after `at` is lost when it is not used; see `truncate`"]
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(at <= self.len, "split at {at} of a buffer of {} bytes", self.len);
        // SAFETY: `at <= len`, so the pointer stays within the block (or one past its end).
        let ptr = unsafe { self.ptr.add(at) };
        let tail = IoBufMut { block: self.block.clone(), ptr, len: self.len - at };
        self.len = at;
        tail
    }

    /// Splits the view at `at`. `self` becomes the back part; the front part is returned. O(1).
    ///
    /// # Panics
    /// If `at` is beyond the end.
    #[must_use = "the part before `at` is lost when it is not used"]
    pub fn split_to(&mut self, at: usize) -> Self {
        let tail = self.split_off(at);
        std::mem::replace(self, tail)
    }

    /// Joins a view that directly follows this one in the same memory. O(1).
    ///
    /// # Errors
    /// Returns `tail` unchanged if it does not directly follow `self`.
    pub fn unsplit(&mut self, tail: Self) -> Result<(), Self> {
        let end = self.ptr.as_ptr().wrapping_add(self.len);
        if self.block.same(&tail.block) && end == tail.ptr.as_ptr() {
            self.len += tail.len;
            Ok(())
        } else {
            Err(tail)
        }
    }

    /// Whether the memory is part of `arena`.
    pub(crate) fn is_in(&self, arena: Option<&Arena>) -> bool {
        self.block.is_in(arena)
    }

    /// Shortens the view to `len` bytes; no effect if the view is not longer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes the view shared and immutable. O(1).
    pub fn freeze(self) -> IoBuf {
        IoBuf { block: self.block, ptr: self.ptr, len: self.len }
    }
}

impl Deref for IoBufMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies in the block, its bytes are initialised, and no other view overlaps it (module
        // invariant).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for IoBufMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes it the only access through this view.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for IoBufMut {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Vec<u8>> for IoBufMut {
    fn from(vec: Vec<u8>) -> Self {
        let len = vec.len();
        let block = pool::from_vec(vec);
        let ptr = block.start();
        IoBufMut { block, ptr, len }
    }
}

impl Default for IoBufMut {
    fn default() -> Self {
        Self::from(Vec::new())
    }
}

impl fmt::Debug for IoBufMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBufMut").field("len", &self.len).finish_non_exhaustive()
    }
}
