//! The errors of a reopen that would make an image writable. Several formats report them with the same texts.

use oxblk_core::{Errno, Error, ErrorKind};

/// The metadata on disk differs from the metadata in memory. Without file locks, another program may have written the image.
pub(crate) fn changed_meanwhile() -> Error {
    Error::new(ErrorKind::Busy, "Image was changed while it was open read-only").errno(Errno::BUSY)
}

/// The image needs a repair. The file below is still read-only, so the reopen cannot repair the image.
pub(crate) fn not_closed() -> Error {
    Error::new(ErrorKind::ReadOnly, "Image was not closed correctly")
        .with_hint("It is repaired when it is closed and opened for writing.")
}
