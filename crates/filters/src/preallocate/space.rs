//! The length of the file, and the part of it that is preallocated.
//!
//! Parents see the file up to `visible`. The file itself may reach up to `end`. From `zero` on, the file reads as zeroes. The
//! numbers are atomics, so that requests inside the file take no lock. Changes of the file's own length are made one at a time.
//!
//! The numbers are valid only while parents of the node may write or the file has preallocated space: then nobody else changes
//! the length of the file.

use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{AcqRel, Acquire, Release},
};

use oxblk_core::{Edge, Preallocation, Result};
use oxblk_ring::Mutex as AsyncMutex;

use super::options::{SECTOR, Settings};

/// The lengths in bytes.
pub(super) struct Space {
    visible: AtomicU64,
    end: AtomicU64,
    zero: AtomicU64,
    /// Parents may write.
    is_written_to: AtomicBool,
    /// No parent may write any more, and the preallocated space is not cut off yet.
    is_truncate_due: AtomicBool,
    /// Held while the length of the file changes.
    changing: AsyncMutex<()>,
}

impl Space {
    /// The file of a node to which no parent may write.
    pub(super) fn new() -> Self {
        Self {
            visible: AtomicU64::new(0),
            end: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            is_written_to: AtomicBool::new(false),
            is_truncate_due: AtomicBool::new(false),
            changing: AsyncMutex::new(()),
        }
    }

    /// Whether other users of the file may change its length, so that the numbers are not valid.
    pub(super) fn is_unused(&self) -> bool {
        !self.is_written_to.load(Acquire) && !self.is_preallocated()
    }

    /// Records that parents may write from now on. `len` returns the length of the file: others may have changed
    /// it before. `len` is called after the check, because another task may remove the preallocated space at the same time.
    pub(super) fn begin_writing(&self, len: impl Fn() -> u64) {
        if self.is_unused() {
            self.set(len());
        }
        self.is_written_to.store(true, Release);
    }

    /// Records that no parent may write any more, and that preallocated space must be cut off before the next write. Returns
    /// whether there is such space.
    pub(super) fn end_writing(&self) -> bool {
        self.is_written_to.store(false, Release);
        let is_due = self.is_preallocated();
        if is_due {
            self.is_truncate_due.store(true, Release);
        }
        is_due
    }

    /// The file, or a node below it, was replaced or reopened. `len` is the length of the file now. If it is the old length, the
    /// file may have preallocated space as before, but which part of it is zero is not known.
    pub(super) fn file_changed(&self, len: u64) {
        let end = self.end.load(Acquire);
        // The sizes of most nodes are whole sectors.
        if len.div_ceil(SECTOR) == end.div_ceil(SECTOR) {
            self.zero.store(end, Release);
        } else {
            self.set(len);
            self.is_truncate_due.store(false, Release);
        }
    }

    /// The length that parents see.
    pub(super) fn len(&self) -> u64 {
        self.visible.load(Acquire)
    }

    /// Whether the file is longer than parents see.
    pub(super) fn is_preallocated(&self) -> bool {
        self.end.load(Acquire) > self.len()
    }

    /// Whether a write up to `end` changes neither the visible length nor the part that reads as zeroes.
    pub(super) fn is_written(&self, end: u64) -> bool {
        end <= self.len() && end <= self.zero.load(Acquire)
    }

    /// Whether the file contains this range, and no data was written to it.
    pub(super) fn is_zero(&self, start: u64, end: u64) -> bool {
        start >= self.zero.load(Acquire) && end <= self.end.load(Acquire)
    }

    /// Records that data up to `end` will be written.
    pub(super) fn begin_data(&self, end: u64) {
        self.zero.fetch_max(end, AcqRel);
    }

    /// Records that the file is visible up to `end`.
    pub(super) fn reach(&self, end: u64) {
        self.end.fetch_max(end, AcqRel);
        self.visible.fetch_max(end, AcqRel);
    }

    /// Cuts the preallocated space off if this is due. A write calls this before it changes the length: otherwise the cut could
    /// remove the data of the write.
    ///
    /// # Errors
    /// The errors of the file.
    pub(super) async fn truncate_if_due(&self, file: &Edge) -> Result<()> {
        if self.is_truncate_due.load(Acquire) {
            let _turn = self.changing.lock().await;
            if self.is_truncate_due.load(Acquire) {
                self.cut_off(file).await?;
            }
        }
        Ok(())
    }

    /// Makes the file longer if a write up to `end` would make it longer. Without success, only the write itself makes the file
    /// longer.
    pub(super) async fn make_room(&self, file: &Edge, end: u64, settings: Settings) {
        if end <= self.end.load(Acquire) {
            return;
        }
        let _turn = self.changing.lock().await;
        if end <= self.end.load(Acquire) || !file.node().limits().grows {
            return;
        }
        let Some(length) = settings.length(end).filter(|length| *length > file.size()) else {
            return;
        };
        match file.resize(length, Preallocation::Falloc).await {
            Ok(()) => drop(self.end.fetch_max(length, AcqRel)),
            Err(error) => tracing::debug!(%error, "cannot preallocate space"),
        }
    }

    /// Cuts the preallocated space off.
    ///
    /// # Errors
    /// The errors of the file.
    pub(super) async fn cut(&self, file: &Edge) -> Result<()> {
        let _turn = self.changing.lock().await;
        self.cut_off(file).await
    }

    /// The caller holds the lock.
    async fn cut_off(&self, file: &Edge) -> Result<()> {
        let visible = self.len();
        if self.end.load(Acquire) > visible {
            file.resize(visible, Preallocation::Off).await?;
            self.set(visible);
        }
        self.is_truncate_due.store(false, Release);
        Ok(())
    }

    /// Sets the visible length, without preallocated space.
    ///
    /// # Errors
    /// The errors of the file.
    pub(super) async fn resize(
        &self,
        file: &Edge,
        size: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        let _turn = self.changing.lock().await;
        if size > self.len() {
            self.cut_off(file).await?;
        }
        file.resize(size, preallocation).await?;
        self.set(size);
        Ok(())
    }

    fn set(&self, len: u64) {
        self.visible.store(len, Release);
        self.end.store(len, Release);
        self.zero.store(len, Release);
    }
}
