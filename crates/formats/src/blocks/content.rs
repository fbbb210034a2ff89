//! What is to be written.

use oxblk_core::ZeroFlags;
use oxblk_ring::IoBuf;

use super::length;

/// What a range of the disk is to hold.
pub(crate) enum Content {
    /// These bytes.
    Data(IoBuf),
    /// So many zeroes.
    Zeroes(u64, ZeroFlags),
}

impl Content {
    /// How many bytes it is.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Data(data) => length(data),
            Self::Zeroes(len, _) => *len,
        }
    }

    /// Takes the first `len` bytes, or all that there are.
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
