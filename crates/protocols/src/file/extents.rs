//! Data and holes: `SEEK_DATA`/`SEEK_HOLE`, with the last extent of data remembered.
//!
//! Asking again for every cluster of a big file costs a system call each, on some file systems a slow one. Only data
//! is remembered, and only until something is discarded, zeroed or cut off: calling a hole data is harmless, calling
//! data a hole is not. An answer that was on its way while that happened is not kept (`generation`).

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use oxblk_core::{Result, Status, StatusFlags};
use oxblk_ring::File;

#[derive(Default)]
struct Known {
    generation: u64,
    data: Range<u64>,
}

/// The last extent of data seen.
#[derive(Default)]
pub(super) struct ExtentCache(Mutex<Known>);

impl ExtentCache {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets: something that was data may be none any more.
    pub(super) fn invalidate(&self) {
        let mut known = self.lock();
        known.generation = known.generation.wrapping_add(1);
        known.data = 0..0;
    }

    fn find(&self, offset: u64) -> (Option<u64>, u64) {
        let known = self.lock();
        (known.data.contains(&offset).then_some(known.data.end), known.generation)
    }

    fn remember(&self, data: Range<u64>, generation: u64) {
        let mut known = self.lock();
        if known.generation == generation {
            known.data = data;
        }
    }
}

fn here(offset: u64, len: u64, is_data: bool) -> Status {
    let kind = if is_data { StatusFlags::DATA } else { StatusFlags::ZERO };
    let flags = kind | StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID;
    Status { len, flags, host: Some(offset), child: None }
}

/// Data as far as anybody cares: no question asked of the host.
pub(super) fn assume_data(offset: u64, len: u64) -> Status {
    here(offset, len, true)
}

/// The status of the start of `offset..offset + len`; extents end at multiples of `alignment`, in doubt as data.
pub(super) async fn status(
    file: &File,
    cache: &ExtentCache,
    offset: u64,
    len: u64,
    alignment: u64,
) -> Result<Status> {
    let (known, generation) = cache.find(offset);
    if let Some(end) = known {
        return Ok(here(offset, aligned_up(end, alignment).saturating_sub(offset).min(len), true));
    }
    let extent = match file.seek_extent(offset).await {
        Ok(extent) => extent,
        // Past the end of a file that was cut off under us: nothing there.
        Err(error) if error.raw_os_error() == Some(libc_enxio()) => {
            return Ok(here(offset, len, false));
        }
        // Where holes cannot be told, all is data.
        Err(_) => return Ok(here(offset, len, true)),
    };
    let found = extent.end.saturating_sub(offset);
    if extent.is_data {
        cache.remember(offset..extent.end, generation);
        let end = aligned_up(extent.end, alignment);
        return Ok(here(offset, end.saturating_sub(offset).min(len), true));
    }
    let whole = found - found % alignment.max(1);
    if whole == 0 && found < len {
        // The hole ends inside a block.
        return Ok(here(offset, alignment.min(len), true));
    }
    Ok(here(offset, if found >= len { len } else { whole }, false))
}

fn aligned_up(end: u64, alignment: u64) -> u64 {
    end.checked_next_multiple_of(alignment.max(1)).unwrap_or(end)
}

fn libc_enxio() -> i32 {
    rustix::io::Errno::NXIO.raw_os_error()
}
