//! Changes the size of a file, with or without preallocation.
//!
//! The host extends files with zeroes. If a preallocation fails, the old size is restored if possible. The size of a
//! device is fixed. A resize without preallocation to this size or a smaller size succeeds without effect, so that formats
//! can be created on devices.

use std::sync::atomic::Ordering;

use oxblk_core::driver::Resize;
use oxblk_core::{BoxFuture, Error, Preallocation, Result};
use oxblk_ring::{Falloc, File, IoBuf};
use rustix::io::Errno;

use super::FileDriver;
use super::handle::Kind;

const ZERO_STEP: u64 = 1 << 20;
/// Bytes that one call allocates. A creation can be stopped between two calls.
const RESERVE_STEP: u64 = 1 << 30;
/// Bytes of zeroes that are written before a flush. A stop waits for the flush that is in flight, which would take minutes for the
/// data of a large file.
const SYNC_STEP: u64 = 256 << 20;
const FIRST_BLOCK: u64 = 4096;

impl Resize for FileDriver {
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let file = self.current();
            self.extents.invalidate();
            if matches!(self.kind, Kind::Block | Kind::Character) {
                return check_device(file.len().await?, size, preallocation);
            }
            let sync = async || self.sync_host(false).await;
            let outcome = set_size(&file, size, preallocation, sync).await;
            self.extents.invalidate();
            let now = file.len().await;
            let now = now.map_err(|e| Error::from(e).prefix("Could not get file size"));
            if let Ok(now) = now {
                self.size.store(now, Ordering::Release);
            }
            outcome.and(now.map(drop))
        })
    }
}

fn check_device(current: u64, size: u64, preallocation: Preallocation) -> Result<()> {
    if preallocation != Preallocation::Off {
        return Err(Error::unsupported(format!(
            "Preallocation mode '{}' unsupported for this non-regular file",
            preallocation.name()
        )));
    }
    if size > current {
        return Err(Error::invalid("Cannot grow device files"));
    }
    Ok(())
}

/// Sets the size of a regular file. With [`Preallocation::Full`], the file is flushed with `sync`.
pub(super) async fn set_size(
    file: &File,
    size: u64,
    preallocation: Preallocation,
    sync: impl AsyncFn() -> Result<()>,
) -> Result<()> {
    let current = file.len().await.map_err(|e| Error::from(e).prefix("Could not get file size"))?;
    if size < current && preallocation != Preallocation::Off {
        return Err(Error::unsupported("Cannot use preallocation for shrinking files"));
    }
    let outcome = match preallocation {
        Preallocation::Off => return truncate(file, current, size).await,
        Preallocation::Falloc => reserve(file, current, size).await,
        Preallocation::Full => fill(file, current, size, sync).await,
        Preallocation::Metadata => {
            return Err(Error::unsupported("Unsupported preallocation mode: metadata"));
        }
    };
    if outcome.is_err() {
        // The caller gets the error of the preallocation; an error of this call is only logged.
        if let Err(error) = file.set_len(current).await {
            tracing::warn!(%error, "cannot restore the size of a file");
        }
    }
    outcome
}

async fn truncate(file: &File, current: u64, size: u64) -> Result<()> {
    let failed = |error| Error::from(error).prefix("Could not resize file");
    file.set_len(size).await.map_err(failed)?;
    if current == 0 && size > 0 {
        // One block is allocated, so that a read of it can detect the alignment of direct I/O.
        let len = usize::try_from(size.min(FIRST_BLOCK)).unwrap_or(1);
        let _ = file.write_all_at(IoBuf::zeroes(len), 0, false).await;
    }
    Ok(())
}

async fn reserve(file: &File, current: u64, size: u64) -> Result<()> {
    let failed = |error| Error::from(error).prefix("Could not preallocate new data");
    let mut at = current;
    while at < size {
        let step = (size - at).min(RESERVE_STEP);
        match file.fallocate(Falloc::Allocate, at, step).await {
            Ok(()) => at = at.saturating_add(step),
            // If the file system does not support `fallocate`, write zeroes.
            Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {
                return write_zeroes(file, at, size).await.map_err(failed);
            }
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}

async fn fill(
    file: &File,
    current: u64,
    size: u64,
    sync: impl AsyncFn() -> Result<()>,
) -> Result<()> {
    let failed = |error| Error::from(error).prefix("Could not write zeros for preallocation");
    file.set_len(size).await.map_err(|e| Error::from(e).prefix("Could not resize file"))?;
    let mut at = current;
    loop {
        let end = at.saturating_add(SYNC_STEP).min(size);
        write_zeroes(file, at, end).await.map_err(failed)?;
        sync().await.map_err(|error| error.prefix("Could not flush file to disk"))?;
        if end == size {
            return Ok(());
        }
        at = end;
    }
}

async fn write_zeroes(file: &File, mut at: u64, end: u64) -> std::io::Result<()> {
    let zeroes = IoBuf::zeroes(usize::try_from(ZERO_STEP).unwrap_or(4096));
    while at < end {
        // Each step except the last ends at a multiple of `ZERO_STEP`, so that direct I/O gets whole blocks if the old and the
        // new size are aligned.
        let step = (ZERO_STEP - at % ZERO_STEP).min(end - at);
        let piece = zeroes.slice(..usize::try_from(step).unwrap_or(zeroes.len()));
        file.write_all_at(piece, at, false).await?;
        at = at.saturating_add(step);
    }
    Ok(())
}
