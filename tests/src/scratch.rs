//! Directories for the files of tests.

use std::path::Path;

use tempfile::TempDir;

/// A directory whose files are where temporary files are: mostly on a disk.
///
/// # Panics
/// When none can be made.
pub fn on_disk() -> TempDir {
    tempfile::Builder::new().prefix("oxblk-model-").tempdir().expect("a scratch directory")
}

/// A directory whose files are in memory where there is such a place, so that flushes do not wait for a
/// disk.
///
/// # Panics
/// When none can be made.
pub fn in_memory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let builder = || tempfile::Builder::new().prefix("oxblk-model-").rand_bytes(8).to_owned();
    builder().tempdir_in(memory).or_else(|_| builder().tempdir()).expect("a scratch directory")
}
