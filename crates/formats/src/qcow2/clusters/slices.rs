//! Refcounts in cached slices of refcount blocks.

use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire};

use oxblk_core::{DebugEvent, Errno, Error, Result, WriteFlags, run_all};
use oxblk_ring::perturb::point;
use oxblk_ring::{IoBuf, IoBufMut};

use super::Clusters;
use crate::qcow2::image_state::run_options::Modes;
use crate::qcow2::layout::refcount_set;
use crate::slice_cache::{DirtyCopy, Pinned};

/// The position of a refcount: block, slice, word in the slice, shift in the word.
pub(super) struct Position {
    pub(super) block: u64,
    pub(super) slice: u64,
    word: usize,
    shift: u32,
}

impl Clusters {
    pub(super) fn position(&self, cluster: u64) -> Result<Position> {
        let bits = u64::from(self.geometry.refcount_bits());
        let per_slice = self.slice_bytes.saturating_mul(8) / bits;
        let slice = cluster / per_slice;
        if slice > u64::from(u32::MAX) {
            return Err(Error::corrupt("cluster offset out of range"));
        }
        let bit = (cluster % per_slice).saturating_mul(bits);
        let byte = bit / 8 % 8;
        let shift = if bits >= 8 { 64 - bits - byte * 8 } else { 56 - byte * 8 + bit % 8 };
        Ok(Position {
            block: cluster / self.geometry.refcounts_per_block(),
            slice,
            word: usize::try_from(bit / 64).unwrap_or(usize::MAX),
            shift: u32::try_from(shift).unwrap_or(0),
        })
    }

    /// The largest number of references that a cluster can have.
    pub(in crate::qcow2) fn max_refcount(&self) -> u64 {
        self.mask()
    }

    fn mask(&self) -> u64 {
        u64::MAX >> (64 - self.geometry.refcount_bits())
    }

    /// Pins the slice of a position, and reads the slice if it is not in the cache. Returns `None` if the refcount block does
    /// not exist.
    pub(super) async fn slice(&self, position: &Position) -> Result<Option<Pinned<'_>>> {
        let base = self.block_offset(position.block);
        if base == 0 {
            return Ok(None);
        }
        if !base.is_multiple_of(self.geometry.cluster_size()) {
            return Err(Error::corrupt(format!(
                "Refblock offset {base:#x} unaligned (reftable index: {:#x})",
                position.block
            )));
        }
        let slices_per_block = self.geometry.cluster_size() / self.slice_bytes;
        let offset = base
            .saturating_add((position.slice % slices_per_block).saturating_mul(self.slice_bytes));
        let len = usize::try_from(self.slice_bytes).unwrap_or(0);
        let file = self.file()?;
        loop {
            let load = || {
                let file = Arc::clone(&file);
                async move {
                    self.image_state.event(DebugEvent::RefblockLoad).await;
                    file.read(offset, IoBufMut::new(len)).await
                }
            };
            if let Some(pinned) = self.cache.get(position.slice, load).await? {
                return Ok(Some(pinned));
            }
            self.write_back().await?;
        }
    }

    /// Adds one reference to a host cluster if the cluster is in use and its refcount is below the maximum. Returns whether a
    /// reference was added.
    pub(super) async fn add_reference_if_in_use(&self, cluster: u64) -> Result<bool> {
        let position = self.position(cluster)?;
        let Some(slice) = self.slice(&position).await? else { return Ok(false) };
        let word = slice
            .words()
            .get(position.word)
            .ok_or_else(|| Error::corrupt("refcount out of range"))?;
        let mask = self.mask();
        let shared = word.fetch_update(AcqRel, Acquire, |word| {
            let count = (word >> position.shift) & mask;
            (count > 0 && count < mask).then(|| word + (1 << position.shift))
        });
        point();
        if shared.is_ok() {
            slice.mark_dirty();
        }
        Ok(shared.is_ok())
    }

    /// The refcount at a position in its pinned slice.
    pub(super) fn refcount_in(&self, slice: &Pinned<'_>, position: &Position) -> u64 {
        let word = slice.words().get(position.word).map_or(0, |word| word.load(Acquire));
        (word >> position.shift) & self.mask()
    }

    /// The refcount of a host cluster. The refcount is 0 if the refcount block does not exist.
    pub(in crate::qcow2) async fn get(&self, cluster: u64) -> Result<u64> {
        let position = self.position(cluster)?;
        let Some(slice) = self.slice(&position).await? else { return Ok(0) };
        Ok(self.refcount_in(&slice, &position))
    }

    /// Removes one reference from a host cluster and returns the new refcount.
    ///
    /// # Errors
    /// `Corrupt` if the refcount is already 0 or the refcount block does not exist, and the errors of requests to the image
    /// file.
    pub(super) async fn drop_one(&self, cluster: u64) -> Result<u64> {
        Ok(self.drop_up_to(cluster, 1).await?.saturating_sub(1))
    }

    /// Removes up to `limit` references from a host cluster. Returns the number of references before the call.
    ///
    /// # Errors
    /// `Corrupt` if the refcount is already 0 or the refcount block does not exist, and the errors of requests to the image
    /// file.
    pub(super) async fn drop_up_to(&self, cluster: u64, limit: u64) -> Result<u64> {
        let position = self.position(cluster)?;
        let Some(slice) = self.slice(&position).await? else {
            return Err(Error::corrupt(format!("cluster {cluster} has no refcount to drop")));
        };
        let before = self
            .change(&slice, &position, |count| (count > 0).then(|| count.saturating_sub(limit)))?;
        point();
        slice.mark_dirty();
        Ok(before)
    }

    /// Adds `times` references at a position in its pinned slice.
    pub(super) fn raise(&self, slice: &Pinned<'_>, position: &Position, times: u64) -> Result<()> {
        self.change(slice, position, |count| count.checked_add(times)).map(drop)
    }

    /// Changes the refcount at a position in its pinned slice, and returns the refcount before.
    fn change(
        &self,
        slice: &Pinned<'_>,
        position: &Position,
        to: impl Fn(u64) -> Option<u64>,
    ) -> Result<u64> {
        let mask = self.mask();
        let word = slice
            .words()
            .get(position.word)
            .ok_or_else(|| Error::corrupt("refcount out of range"))?;
        let mut before = 0;
        let changed = word.fetch_update(AcqRel, Acquire, |word| {
            before = (word >> position.shift) & mask;
            let now = to(before).filter(|count| *count <= mask)?;
            Some((word & !(mask << position.shift)) | (now << position.shift))
        });
        match changed {
            Ok(_) => Ok(before),
            Err(_) => Err(Error::corrupt("refcount out of bounds")),
        }
    }

    /// Writes all dirty refcounts to the file, without a flush.
    pub(in crate::qcow2) async fn write_back(&self) -> Result<()> {
        // Two writes of one slice must not be reordered.
        let _guard = self.writing.lock().await;
        let copies = self.cache.take_dirty();
        if copies.is_empty() {
            return Ok(());
        }
        if self.image_state.disabled().load(Acquire) {
            // The image accepts no further requests. The refcount table on disk may refer to other blocks than the table in
            // memory.
            return Err(Error::from_errno(Errno::IO));
        }
        let file = self.file()?;
        let slices_per_block = self.geometry.cluster_size() / self.slice_bytes;
        let base_of = |copy: &DirtyCopy<'_>| self.block_offset(copy.slice / slices_per_block);
        for copy in &copies {
            let cluster = self.geometry.cluster_index(base_of(copy));
            let clusters = cluster..cluster.saturating_add(1);
            self.overlaps.check(
                Modes::REFCOUNT_BLOCK,
                clusters,
                self.image_state.modes() & Modes::EVERYTHING,
            )?;
        }
        let writes = copies.iter().map(|copy| {
            let base = base_of(copy);
            let within = (copy.slice % slices_per_block).saturating_mul(self.slice_bytes);
            file.write(
                base.saturating_add(within),
                IoBuf::from(copy.bytes.clone()),
                WriteFlags::empty(),
            )
        });
        self.image_state.event(DebugEvent::RefblockUpdatePart).await;
        let writing = self.barrier.pass().await;
        let outcome = run_all(writes).await;
        writing.done();
        outcome?;
        copies.into_iter().for_each(DirtyCopy::written);
        Ok(())
    }

    /// Adds one reference to a cluster whose refcount block exists.
    pub(super) async fn add_one(&self, cluster: u64) -> Result<()> {
        let position = self.position(cluster)?;
        let slice = self.slice(&position).await?;
        let slice = slice.ok_or_else(|| Error::corrupt("refcount block vanished"))?;
        self.raise(&slice, &position, 1)?;
        slice.mark_dirty();
        Ok(())
    }

    pub(super) fn set_in(&self, block: &mut [u8], index: u64, value: u64) -> Result<()> {
        refcount_set(block, index, self.geometry.refcount_order, value)
            .map_err(|_| Error::corrupt("refcount out of bounds"))
    }

    /// Writes the dirty refcounts, without a flush. If an overlap is found, the image is marked corrupt.
    ///
    /// # Errors
    /// When a refcount block overlaps with protected metadata, when the image accepts no further requests, and the errors of
    /// requests to the image file.
    pub(in crate::qcow2) async fn write_back_refcounts(&self) -> Result<()> {
        self.image_state.mark_if_corrupt(self.write_back().await, 0).await
    }
}
