//! [`Limits`]: the limits and capabilities of a driver. [`MAX_LENGTH`]: the maximum length of a disk.

use crate::{Error, ErrorKind, Result, WriteFlags, ZeroFlags};

/// Maximum length of a disk in bytes: 2^63 - 1, rounded down to a multiple of 1 GiB, so that offsets can be rounded up
/// without overflow.
pub const MAX_LENGTH: u64 = (i64::MAX as u64) & !((1 << 30) - 1);

/// Checks that a disk may become `length` bytes long.
///
/// # Errors
/// When `length` exceeds [`MAX_LENGTH`].
pub fn check_length(length: u64) -> Result<()> {
    if i64::try_from(length).is_err() {
        return Err(Error::invalid("Image size cannot be negative"));
    }
    if length > MAX_LENGTH {
        let message = format!("offset({length}) exceeds maximum({MAX_LENGTH})");
        return Err(Error::new(ErrorKind::OutOfRange, message));
    }
    Ok(())
}

/// The requests that a driver accepts. All sizes are in bytes; 0 means "no limit" or "no preference". The request path
/// aligns and splits requests and emulates missing features, so that drivers only receive requests within these limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Alignment of offset and length of every request; a power of two, at least 1. A discard may instead end at the end
    /// of the node.
    pub request_alignment: u32,
    /// Alignment of buffers in memory that the host requires (`O_DIRECT`).
    pub mem_alignment: u32,
    /// Maximum length of a read or write.
    pub max_transfer: u64,
    /// Preferred size of a transfer.
    pub opt_transfer: u64,
    /// Maximum length of a zero write.
    pub max_write_zeroes: u64,
    /// Alignment at which zero writes are efficient.
    pub write_zeroes_alignment: u32,
    /// Maximum length of a discard.
    pub max_discard: u64,
    /// Alignment at which discards have an effect.
    pub discard_alignment: u32,
    /// [`WriteFlags::FUA`] if the driver implements it. If not, the request path flushes the node after the write. A driver
    /// that passes each write on to one child or to several children implements the flag by passing it on. The other flags
    /// need no declaration.
    pub write_flags: WriteFlags,
    /// Which of [`ZeroFlags::MAY_UNMAP`] and [`ZeroFlags::NO_FALLBACK`] the driver implements. The request path removes
    /// `MAY_UNMAP` if the driver does not implement it, and refuses a zero write with `NO_FALLBACK`. The other flags need
    /// no declaration: the request path emulates `FUA`, and [`ZeroFlags::OWN`] concerns only formats that may leave a range
    /// unallocated instead of recording zeroes. Such a format always implements `OWN`.
    pub zero_flags: ZeroFlags,
    /// A newly created image reads as zeroes in ranges that were never written.
    pub has_zero_init: bool,
    /// A write past the end of the node makes the node grow.
    pub grows: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_alignment: 1,
            mem_alignment: 1,
            max_transfer: 0,
            opt_transfer: 0,
            max_write_zeroes: 0,
            write_zeroes_alignment: 1,
            max_discard: 0,
            discard_alignment: 1,
            write_flags: WriteFlags::empty(),
            zero_flags: ZeroFlags::empty(),
            has_zero_init: false,
            grows: false,
        }
    }
}
