//! Changes of the length of an image's file. Some nodes grow only by writes, and cannot be truncated: for example quorum.

use oxblk_core::{Edge, Errno, Error, ErrorKind, Preallocation, Result, ZeroFlags};

/// Extends the file to `end` bytes if it is shorter. The caller makes sure that no other task changes the length at the same time.
///
/// # Errors
/// `ENOSPC` if the file cannot grow, and the errors of the file.
pub(crate) async fn extend(file: &Edge, end: u64) -> Result<()> {
    let size = file.size();
    if size >= end {
        return Ok(());
    }
    if !file.node().limits().grows {
        return Err(Error::from_errno(Errno::NOSPC));
    }
    match file.resize(end, Preallocation::Off).await {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            file.write_zeroes(size, end.saturating_sub(size), ZeroFlags::empty()).await
        }
        outcome => outcome,
    }
}

/// Truncates the file to `end` bytes. Returns whether the file was truncated: some files cannot be.
///
/// # Errors
/// The errors of the file.
pub(crate) async fn truncate(file: &Edge, end: u64) -> Result<bool> {
    match file.resize(end, Preallocation::Off).await {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(false),
        Err(error) => Err(error),
    }
}
