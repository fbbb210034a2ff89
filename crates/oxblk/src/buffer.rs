//! Buffers of workers that go through a disk in steps.

use oxblk_ring::IoBufMut;

/// A buffer of `len` bytes. Its memory has one of a few sizes, so a worker usually gets the memory that it used last,
/// which is still in the processor's caches.
pub(crate) fn buffer(len: usize) -> IoBufMut {
    let mut buf = IoBufMut::new(len.checked_next_power_of_two().unwrap_or(len));
    buf.truncate(len);
    buf
}
