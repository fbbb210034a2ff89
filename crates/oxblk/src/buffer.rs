//! Buffers of workers that go through a disk in steps.

use oxblk_ring::IoBufMut;

/// A buffer of `len` bytes. Its memory has one of few sizes, so that a worker is given again what it used last: that is
/// still in the processor's caches, while fresh memory is not.
pub(crate) fn buffer(len: usize) -> IoBufMut {
    let mut buf = IoBufMut::new(len.checked_next_power_of_two().unwrap_or(len));
    buf.truncate(len);
    buf
}
