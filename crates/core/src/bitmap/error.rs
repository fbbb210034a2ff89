//! Errors of bitmap operations. The texts are those of QEMU's monitor if QEMU has the same error.

use std::fmt;

use crate::Errno;

/// The reason why a bitmap operation failed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BitmapError {
    /// The granularity is not a power of two, or lies outside the allowed range.
    Granularity,
    /// The bitmap would have more than [`super::MAX_GRANULES`] granules.
    TooBig,
    /// The name is longer than [`super::MAX_NAME`] bytes.
    NameTooLong(String),
    /// The name is empty.
    NameEmpty,
    /// The node has a bitmap with this name already.
    Exists(String),
    /// The node has no bitmap with this name.
    NotFound(String),
    /// Another operation uses the bitmap.
    Busy(String),
    /// The bitmap is read-only.
    ReadOnly(String),
    /// The bitmap is inconsistent: after a crash, for example, it is not known whether the bitmap contains all writes.
    Inconsistent(String),
    /// The bitmap has a successor already.
    HasSuccessor,
    /// Two bitmaps of different sizes cannot be merged.
    SizesDiffer {
        /// Disk size in bytes of the target of the merge.
        destination: u64,
        /// Disk size in bytes of the source of the merge.
        source: u64,
    },
    /// The bounds of a serialised chunk are not valid, or the length of the buffer does not match the range.
    Chunk,
}

impl BitmapError {
    /// The errno of this error.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Busy(_) => Errno::BUSY,
            Self::NotFound(_) => Errno::NOENT,
            Self::Exists(_) => Errno::EXIST,
            Self::ReadOnly(_) => Errno::PERM,
            _ => Errno::INVAL,
        }
    }

    /// A hint that tells the user how to solve the problem, if there is such a hint.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Inconsistent(_) => {
                Some("Try block-dirty-bitmap-remove to delete this bitmap from disk")
            }
            _ => None,
        }
    }
}

impl fmt::Display for BitmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Granularity => f.write_str("Granularity must be power of 2 and at least 512"),
            Self::TooBig => {
                f.write_str("Bitmap would have too many bits; use a larger granularity")
            }
            Self::NameTooLong(name) => write!(f, "Bitmap name too long: {name}"),
            Self::NameEmpty => f.write_str("Bitmap name cannot be empty"),
            Self::Exists(name) => write!(f, "Bitmap already exists: {name}"),
            Self::NotFound(name) => write!(f, "Dirty bitmap '{name}' not found"),
            Self::Busy(name) => write!(
                f,
                "Bitmap '{name}' is currently in use by another operation and cannot be used"
            ),
            Self::ReadOnly(name) => {
                write!(f, "Bitmap '{name}' is readonly and cannot be modified")
            }
            Self::Inconsistent(name) => {
                write!(f, "Bitmap '{name}' is inconsistent and cannot be used")
            }
            Self::HasSuccessor => {
                f.write_str("Cannot create a successor for a bitmap that already has one")
            }
            Self::SizesDiffer { destination, source } => write!(
                f,
                "Bitmaps are of different sizes (destination size is {destination}, source size is \
                 {source}) and can't be merged"
            ),
            Self::Chunk => {
                f.write_str("Serialised bitmap chunk is not aligned or has the wrong length")
            }
        }
    }
}

impl std::error::Error for BitmapError {}

impl From<BitmapError> for crate::Error {
    fn from(error: BitmapError) -> Self {
        let kind = match &error {
            BitmapError::Busy(_) => crate::ErrorKind::Busy,
            BitmapError::NotFound(_) => crate::ErrorKind::NotFound,
            BitmapError::ReadOnly(_) => crate::ErrorKind::Denied,
            _ => crate::ErrorKind::Invalid,
        };
        let converted = Self::new(kind, error.to_string()).errno(error.errno());
        match error.hint() {
            Some(hint) => converted.with_hint(hint),
            None => converted,
        }
    }
}
