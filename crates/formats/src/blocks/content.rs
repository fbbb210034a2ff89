//! The data of a write.

use oxblk_core::ZeroFlags;
use oxblk_ring::IoBuf;

use super::length;

/// The new contents of a range of the disk.
pub(crate) enum Content {
    /// These bytes.
    Data(IoBuf),
    /// This number of zero bytes.
    Zeroes(u64, ZeroFlags),
}

impl Content {
    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Data(data) => length(data),
            Self::Zeroes(len, _) => *len,
        }
    }

    /// Splits off and returns the first `len` bytes, or all if there are fewer.
    pub(crate) fn split_to(&mut self, len: u64) -> Self {
        match self {
            Self::Data(data) => {
                let len = usize::try_from(len).unwrap_or(usize::MAX).min(data.len());
                Self::Data(data.split_to(len))
            }
            Self::Zeroes(left, flags) => {
                let len = len.min(*left);
                *left -= len;
                Self::Zeroes(len, *flags)
            }
        }
    }
}
