//! [`Change`]: a change of the content or the size of a simulated disk.

use super::media::Media;
use crate::buf::{IoBuf, IoVec};
use crate::reactor::{Op, Payload};

/// The change that an operation makes to the content or the size of the disk.
#[derive(Clone)]
pub(super) enum Change {
    /// A write: the offset of the first byte, and the data.
    Write(u64, IoVec),
    /// Zeroing or a hole: the range reads as zeroes. With `extend`, the disk grows to the end of the range if necessary;
    /// otherwise the part of the range past the end is ignored.
    Zero { offset: u64, len: u64, extend: bool },
    /// An allocation: the disk grows to this size, unless the disk is already as large.
    Grow(u64),
    /// A change of the size: the disk gets this size.
    Truncate(u64),
}

impl Change {
    /// The change that an operation makes if the operation succeeds completely. `None` for an operation that changes
    /// nothing, for example a read, and for an `fallocate` with an invalid range.
    pub(super) fn of(op: Op, payload: &Payload) -> Option<Change> {
        match op {
            Op::Write { offset, .. } => match payload {
                Payload::Write(buf) => {
                    Some(Change::Write(offset, std::iter::once(buf.clone()).collect()))
                }
                Payload::WriteV(bufs) => Some(Change::Write(offset, bufs.clone())),
                Payload::WriteForeign(memory) => {
                    Some(Change::Write(offset, std::iter::once(memory.to_buf()).collect()))
                }
                _ => None,
            },
            Op::Fallocate { mode, offset, len } => Change::of_fallocate(mode, offset, len),
            Op::Truncate { len } => Some(Change::Truncate(len)),
            _ => None,
        }
    }

    /// The change that `fallocate` makes. `None` if the range is empty or ends past the range of `u64`.
    pub(super) fn of_fallocate(mode: i32, offset: u64, len: u64) -> Option<Change> {
        let end = offset.checked_add(len).filter(|_| len > 0)?;
        let extend = mode & libc::FALLOC_FL_KEEP_SIZE == 0;
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
            return Some(Change::Zero { offset, len, extend });
        }
        Some(Change::Grow(if extend { end } else { 0 }))
    }

    /// Makes the change. The next flush makes the change durable.
    pub(super) fn apply(&self, media: &mut Media) {
        match self {
            Change::Write(offset, data) => media.write(*offset, &joined(data), false),
            Change::Zero { offset, len, extend } => media.zero(*offset, *len, *extend),
            Change::Grow(len) if *len <= media.len() => {}
            Change::Grow(len) | Change::Truncate(len) => media.truncate(*len),
        }
    }
}

/// The bytes of all buffers.
pub(super) fn joined(bufs: &[IoBuf]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bufs.iter().for_each(|buf| bytes.extend_from_slice(buf));
    bytes
}
