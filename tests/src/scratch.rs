//! Directories for the files of tests.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tempfile::TempDir;

/// Creates a directory among the temporary files of the system. This directory is usually on a disk.
///
/// # Panics
/// When no directory can be created.
pub fn on_disk() -> TempDir {
    tempfile::Builder::new().prefix("oxblk-model-").tempdir().expect("a scratch directory")
}

/// Creates a directory on tmpfs if the system has a tmpfs for programs, so that flushes do not wait for a disk.
///
/// # Panics
/// When no directory can be created.
pub fn in_memory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let builder = || tempfile::Builder::new().prefix("oxblk-model-").rand_bytes(8).to_owned();
    builder().tempdir_in(memory).or_else(|_| builder().tempdir()).expect("a scratch directory")
}

/// Writes a file with holes for ranges of zeroes.
///
/// # Errors
/// The errors of the host.
pub fn write_sparse(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    const PIECE: usize = 4096;
    let file = File::create(path)?;
    for (piece, index) in bytes.chunks(PIECE).zip(0_u64..) {
        if !oxblk_ring::is_zero(piece) {
            file.write_all_at(piece, index * PIECE as u64)?;
        }
    }
    file.set_len(bytes.len() as u64)
}
