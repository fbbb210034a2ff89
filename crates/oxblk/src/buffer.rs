//! Buffers for workers that process a disk in steps.

use oxblk_ring::IoBufMut;

/// A buffer of `len` bytes. The allocation is rounded up to a power of two, so that a worker usually gets the same
/// memory as for its previous buffer. This memory is often still in the processor's caches.
pub(crate) fn buffer(len: usize) -> IoBufMut {
    let mut buf = IoBufMut::new(len.checked_next_power_of_two().unwrap_or(len));
    buf.truncate(len);
    buf
}
