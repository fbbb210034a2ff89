//! Data and holes of the file (`SEEK_DATA`, `SEEK_HOLE`), with a cache of the extents that were found last.
//!
//! A lookup is a system call on a worker thread, and slow on some file systems. The cache avoids a lookup for each
//! cluster. Normally the cache contains one extent of data and no hole, because reporting a hole as data is harmless,
//! but reporting data as a hole is not. A lookup that finds a hole also finds the data after the hole. A discard, a
//! zero write or a truncation empties the cache. The result of a lookup that was in flight during such a change is
//! not cached (`generation`).
//!
//! If nobody may write to the file (no parent of this node writes, and the locks keep writers in other processes away),
//! the extents do not change. In this case one lookup finds several consecutive extents, and all of them are cached.

use std::sync::{Mutex, MutexGuard, PoisonError};

use oxblk_core::{Perm, Permissions, Result, Status, StatusFlags};
use oxblk_ring::{Extent, File};

/// Number of extents of data per lookup in a file to which nobody may write.
const AHEAD: usize = 32;

#[derive(Default)]
struct Known {
    generation: u64,
    /// Whether nobody may write to the file.
    constant: bool,
    /// Start of the first of `extents`, or an offset within it.
    start: u64,
    /// Consecutive extents without gaps.
    extents: Vec<Extent>,
}

/// The extents that were found last.
#[derive(Default)]
pub(super) struct ExtentCache(Mutex<Known>);

impl ExtentCache {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empties the cache, because data may have become a hole.
    pub(super) fn invalidate(&self) {
        self.lock().forget();
    }

    /// Records the new permissions on a locked file.
    pub(super) fn set_permissions(&self, permissions: Permissions) {
        let writing = Perm::WRITE | Perm::RESIZE;
        let mut known = self.lock();
        known.constant = !(permissions.taken | permissions.shared).intersects(writing);
        known.forget();
    }

    /// The cached extent at `offset`. If no cached extent contains the offset: the number of extents of data to look
    /// up, and the generation to pass to `remember`.
    fn find(&self, offset: u64) -> std::result::Result<Extent, (usize, u64)> {
        let known = self.lock();
        let at = known.extents.partition_point(|extent| extent.end <= offset);
        match known.extents.get(at) {
            Some(extent) if offset >= known.start => Ok(*extent),
            _ => Err((if known.constant { AHEAD } else { 1 }, known.generation)),
        }
    }

    /// Caches consecutive extents that a lookup at `start` has found, unless the cache was emptied during the lookup.
    /// If the file may change, only the first extent of data is cached.
    fn remember(&self, mut start: u64, mut extents: Vec<Extent>, generation: u64) {
        let mut known = self.lock();
        if known.generation != generation {
            return;
        }
        if !known.constant {
            let Some(data) = extents.iter().position(|extent| extent.is_data) else { return };
            start = extents.drain(..data).next_back().map_or(start, |hole| hole.end);
            extents.truncate(1);
        }
        (known.start, known.extents) = (start, extents);
    }
}

impl Known {
    fn forget(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.extents.clear();
    }
}

fn here(offset: u64, len: u64, is_data: bool) -> Status {
    let kind = if is_data { StatusFlags::DATA } else { StatusFlags::ZERO };
    let flags = kind | StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID;
    Status { len, flags, host: Some(offset), child: None }
}

/// Reports the range as data, without a system call.
pub(super) fn assume_data(offset: u64, len: u64) -> Status {
    here(offset, len, true)
}

/// The status of a range that begins at `offset` and has at most `len` bytes. A block of `alignment` bytes that is
/// partly data is reported as data.
pub(super) async fn status(
    file: &File,
    cache: &ExtentCache,
    offset: u64,
    len: u64,
    alignment: u64,
) -> Result<Status> {
    let extent = match cache.find(offset) {
        Ok(extent) => extent,
        Err((count, generation)) => match file.seek_extents(offset, count).await {
            Ok(extents) => {
                let first = extents.first().copied();
                cache.remember(offset, extents, generation);
                first.unwrap_or(Extent { is_data: true, end: offset.saturating_add(len) })
            }
            // The offset is past the end, because another process has truncated the file. The range is a hole.
            Err(error) if error.raw_os_error() == Some(libc_enxio()) => {
                return Ok(here(offset, len, false));
            }
            // After any other error, the range is reported as data. This is always safe.
            Err(_) => return Ok(here(offset, len, true)),
        },
    };
    let found = extent.end.saturating_sub(offset);
    if extent.is_data {
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

#[cfg(test)]
mod tests {
    use super::*;

    const HOLE_DATA_HOLE: [Extent; 3] = [
        Extent { is_data: false, end: 10 },
        Extent { is_data: true, end: 20 },
        Extent { is_data: false, end: 30 },
    ];

    #[test]
    fn only_data_of_a_file_that_may_change_is_cached() {
        let cache = ExtentCache::default();
        let Err((count, generation)) = cache.find(5) else { panic!("the cache is empty") };
        assert_eq!(count, 1);
        cache.remember(5, HOLE_DATA_HOLE.to_vec(), generation);
        assert!(cache.find(5).is_err());
        assert!(cache.find(9).is_err());
        assert_eq!(cache.find(10).unwrap(), HOLE_DATA_HOLE[1]);
        assert_eq!(cache.find(19).unwrap(), HOLE_DATA_HOLE[1]);
        assert!(cache.find(20).is_err());
    }

    #[test]
    fn all_extents_of_a_file_that_nobody_writes_to_are_cached() {
        let cache = ExtentCache::default();
        cache.set_permissions(Permissions {
            taken: Perm::CONSISTENT_READ,
            shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
        });
        let Err((count, generation)) = cache.find(5) else { panic!("the cache is empty") };
        assert_eq!(count, AHEAD);
        cache.remember(5, HOLE_DATA_HOLE.to_vec(), generation);
        assert!(cache.find(4).is_err());
        assert_eq!(cache.find(5).unwrap(), HOLE_DATA_HOLE[0]);
        assert_eq!(cache.find(29).unwrap(), HOLE_DATA_HOLE[2]);
    }

    #[test]
    fn extents_found_before_a_discard_are_not_cached() {
        let cache = ExtentCache::default();
        let Err((_, generation)) = cache.find(5) else { panic!("the cache is empty") };
        cache.invalidate();
        cache.remember(5, HOLE_DATA_HOLE.to_vec(), generation);
        assert!(cache.find(10).is_err());
    }
}
