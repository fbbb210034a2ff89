//! [`IoBuf`]: the shared view.

use std::fmt;
use std::ops::{Bound, Deref, RangeBounds};
use std::ptr::NonNull;
use std::sync::OnceLock;

use super::block::BlockRef;
use super::pool::{self, Arena};
use super::{IoBufMut, is_zero};

/// Length of the process-wide run of zeroes of which [`IoBuf::zeroes`] returns views.
const SHARED_ZEROES: usize = 2 << 20;

/// A shared, immutable view of refcounted memory. Cloning and slicing are O(1).
#[derive(Clone)]
pub struct IoBuf {
    pub(super) block: BlockRef,
    pub(super) ptr: NonNull<u8>,
    pub(super) len: usize,
}

// SAFETY: shared views only read, and no unique view overlaps them (module invariant).
unsafe impl Send for IoBuf {}
// SAFETY: as above.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    /// A view of the bytes in `range`. O(1).
    ///
    /// # Panics
    /// If the range is not within the view.
    #[must_use]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> IoBuf {
        let start = match range.start_bound() {
            Bound::Included(&n) => n,
            Bound::Excluded(&n) => n.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&n) => n.saturating_add(1),
            Bound::Excluded(&n) => n,
            Bound::Unbounded => self.len,
        };
        assert!(
            start <= end && end <= self.len,
            "slice {start}..{end} of a buffer of {} bytes",
            self.len
        );
        // SAFETY: `start <= len`.
        let ptr = unsafe { self.ptr.add(start) };
        IoBuf { block: self.block.clone(), ptr, len: end - start }
    }

    /// Splits off and returns the first `at` bytes. `self` becomes a view of the remaining bytes. O(1).
    ///
    /// # Panics
    /// If `at` is beyond the end.
    #[must_use = "the part before `at` is lost when it is not used"]
    pub fn split_to(&mut self, at: usize) -> IoBuf {
        let front = self.slice(..at);
        *self = self.slice(at..);
        front
    }

    /// Whether the memory is part of `arena`.
    pub(crate) fn is_in(&self, arena: Option<&Arena>) -> bool {
        self.block.is_in(arena)
    }

    /// Shortens the view to `len` bytes; no effect if the view is not longer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes the view unique again. O(1).
    ///
    /// # Errors
    /// Returns the view unchanged if another view uses the same block of memory, or if the memory is static.
    pub fn try_into_mut(self) -> Result<IoBufMut, IoBuf> {
        if self.block.is_unique() {
            Ok(IoBufMut { block: self.block, ptr: self.ptr, len: self.len })
        } else {
            Err(self)
        }
    }

    /// Returns `len` zero bytes. Up to 2 MiB, the result is a view of pages that map the zero page of the kernel, so
    /// it uses no memory.
    pub fn zeroes(len: usize) -> IoBuf {
        static ZEROES: OnceLock<IoBuf> = OnceLock::new();
        if len > SHARED_ZEROES {
            return IoBufMut::zeroed(len).freeze();
        }
        let shared = ZEROES.get_or_init(|| {
            let block = pool::static_zeroes(SHARED_ZEROES);
            let ptr = block.start();
            IoBuf { block, ptr, len: SHARED_ZEROES }
        });
        shared.slice(..len)
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        is_zero(self)
    }
}

impl Deref for IoBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies in the block, its bytes are initialised, and nobody may write to them (module
        // invariant).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for IoBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Vec<u8>> for IoBuf {
    fn from(vec: Vec<u8>) -> Self {
        IoBufMut::from(vec).freeze()
    }
}

impl From<&'static [u8]> for IoBuf {
    fn from(bytes: &'static [u8]) -> Self {
        let block = pool::from_static(bytes);
        let ptr = block.start();
        IoBuf { block, ptr, len: bytes.len() }
    }
}

impl From<IoBufMut> for IoBuf {
    fn from(buf: IoBufMut) -> Self {
        buf.freeze()
    }
}

impl Default for IoBuf {
    fn default() -> Self {
        Self::from(Vec::new())
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBuf").field("len", &self.len).finish_non_exhaustive()
    }
}
