//! Loading slices of L2 tables into the cache, and looking up extents in them.
//!
//! A slice of a writable image is checked before it is cached, unless the image has a data file. If all slices in the cache
//! are dirty or pinned, a write-back cycle makes dirty slices clean, so that they can be replaced.

use oxblk_core::Result;
use oxblk_ring::IoBufMut;
use oxblk_ring::perturb::point;

use super::Metadata;
use crate::qcow2::layout::{L2Entry, L2Kind};
use crate::qcow2::mapping::{Extent, Miss};
use crate::slice_cache::Pinned;

/// Each time that a lookup has failed this many times, the thread yields to other threads.
const TRIES_BEFORE_YIELD: u32 = 64;

impl Metadata {
    /// Looks up the extent at the start of `offset..offset + len`. Loads the slice of the L2 table if it is not cached.
    pub(in crate::qcow2) async fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        match self.extent_or_entry(offset, len).await? {
            Ok(extent) => Ok(extent),
            Err(entry) => Err(self.mapping.report_bad_entry(offset, entry).await),
        }
    }

    /// The same as [`Self::extent`], for a write to this range.
    pub(in crate::qcow2) async fn extent_to_write(&self, offset: u64, len: u64) -> Result<Extent> {
        match self.extent_or_entry(offset, len).await? {
            Ok(extent) => Ok(extent),
            Err(entry) => Err(self.mapping.report_bad_write_target(offset, entry).await),
        }
    }

    /// The same as [`Self::extent`]. The inner error is an invalid L2 entry.
    async fn extent_or_entry(&self, offset: u64, len: u64) -> Result<Result<Extent, u64>> {
        let mut tries = 0_u32;
        loop {
            match self.mapping.lookup(offset, len) {
                Ok(extent) => return Ok(Ok(extent)),
                Err(Miss::Bad(entry)) => return Ok(Err(entry)),
                Err(Miss::Absent) => drop(self.pin_slice(offset).await?),
            }
            tries = tries.saturating_add(1);
            if tries.is_multiple_of(TRIES_BEFORE_YIELD) {
                std::thread::yield_now();
            }
        }
    }

    /// Pins the slice that maps a guest offset. Loads the slice if it is not cached. Returns `None` if its L2 table does
    /// not exist.
    pub(super) async fn pin_slice(&self, offset: u64) -> Result<Option<Pinned<'_>>> {
        let (slice, _) = self.mapping.slice_of(offset);
        loop {
            if let Some(pinned) = self.mapping.pin(slice) {
                return Ok(Some(pinned));
            }
            if self.mapping.slice_place(slice).await?.is_none() {
                return Ok(None);
            }
            point();
            match self.mapping.load(slice, || self.load_slice(slice, offset)).await? {
                Some(pinned) => return Ok(Some(pinned)),
                // Every slice is dirty or pinned. A write-back makes dirty slices clean.
                None => self.write_back(false).await?,
            }
        }
    }

    /// Reads a slice from the file, and checks the slice. The caller prevents other tasks from loading this slice
    /// concurrently.
    async fn load_slice(&self, slice: u64, offset: u64) -> Result<IoBufMut> {
        let bytes = self.mapping.read_slice(slice, offset).await?;
        self.check_slice(&bytes).await?;
        Ok(bytes)
    }

    /// Refuses a slice whose entries map guest clusters to clusters with protected metadata: a write in place would
    /// overwrite the metadata. Slices of read-only images and of images with a data file are not checked.
    async fn check_slice(&self, bytes: &[u8]) -> Result<()> {
        if self.image_state.is_read_only() || self.geometry.data_file {
            return Ok(());
        }
        let words = usize::try_from(self.geometry.l2_entry_words()).unwrap_or(1);
        for word in bytes.chunks_exact(8).step_by(words) {
            let entry = L2Entry(word.try_into().map_or(0, u64::from_be_bytes));
            if let Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) =
                entry.kind(self.geometry, self.image_state.version())
                && self.is_protected(host, self.geometry.cluster_size())
            {
                let what = self.overlapped(host, self.geometry.cluster_size());
                let text = format!("Preventing invalid write on metadata (overlaps with {what})");
                return Err(self.image_state.mark_corrupt(&text, host).await);
            }
        }
        Ok(())
    }
}
