//! Creating L2 tables, changing L1 entries, and extending the file.
//!
//! A new table is filled with zeroes in the file before the L1 entry in memory refers to it. So the slices of the table can
//! be loaded from the file, as with every other table. The next write-back writes the L1 entry, after the contents of the
//! table.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Release};

use oxblk_core::{Errno, Error, Result, ZeroFlags};
use oxblk_ring::perturb::point;

use super::{Qed, lock};
use crate::blocks::Run;
use crate::file_len;

impl Qed {
    /// Creates the L2 table of the L1 entry `index` if it does not exist.
    ///
    /// # Errors
    /// `EFBIG` if the L1 table has no such entry, `Corrupt` if the entry is invalid, and the errors of requests to the image
    /// file.
    pub(super) async fn ensure_table(&self, index: u64) -> Result<()> {
        if self.table_offset(index)?.is_some() {
            return Ok(());
        }
        let _guard = self.tables.lock().await;
        if self.table_offset(index)?.is_some() {
            return Ok(());
        }
        if index >= self.geometry.l1_entries() {
            return Err(Error::from_errno(Errno::FBIG));
        }
        let run = self.reserve_table().await?;
        if !run.fresh {
            let (start, bytes) = (self.offset_of(run.start), self.geometry.table_bytes());
            self.file()?.write_zeroes(start, bytes, ZeroFlags::MAY_UNMAP).await?;
        }
        point();
        self.set_l1_entry(index, self.offset_of(run.start));
        run.keep();
        Ok(())
    }

    /// Reserves the clusters of a table, and extends the file so that it contains them.
    pub(super) async fn reserve_table(&self) -> Result<Run> {
        self.set_need_check().await?;
        let run = self.allocator.reserve_contiguous(self.geometry.table_clusters).await?;
        self.lengthen(run.end()).await?;
        Ok(run)
    }

    /// Sets an L1 entry and marks it dirty, both under one lock. So if a thread sees the new entry and then flushes, this
    /// flush writes the entry.
    pub(super) fn set_l1_entry(&self, index: u64, entry: u64) {
        let mut dirty = lock(&self.l1_dirty);
        self.l1.get_or_make(index).store(entry, Release);
        point();
        dirty.insert(index);
    }

    /// Empties the list of dirty L1 entries, and returns their indices and values.
    pub(super) fn take_l1_dirty(&self) -> BTreeMap<u64, u64> {
        let mut dirty = lock(&self.l1_dirty);
        std::mem::take(&mut *dirty).into_iter().map(|index| (index, self.l1_entry(index))).collect()
    }

    /// Stores an L1 entry that was read from the file.
    pub(super) fn note_l1_entry(&self, index: u64, entry: u64) {
        let place: &AtomicU64 = self.l1.get_or_make(index);
        place.store(entry, Release);
    }

    /// Extends the file so that it contains all clusters before `end`. The `growing` lock serialises extensions. Without
    /// this lock, an extension with a smaller `end` could truncate the file.
    ///
    /// # Errors
    /// `ENOSPC` if the file cannot grow and is too short, and the errors of requests to the image file.
    pub(super) async fn lengthen(&self, end: u32) -> Result<()> {
        use std::sync::atomic::Ordering::{AcqRel, Acquire};
        let needed = self.offset_of(end);
        if self.file_end.load(Acquire) >= needed {
            return Ok(());
        }
        let _guard = self.growing.lock().await;
        if self.file_end.load(Acquire) >= needed {
            return Ok(());
        }
        let file = self.file()?;
        file_len::extend(&file, needed).await?;
        self.file_end.fetch_max(needed, AcqRel);
        Ok(())
    }
}
