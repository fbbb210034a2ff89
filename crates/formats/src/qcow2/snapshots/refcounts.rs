//! Changing the refcounts of many clusters at once. The node is drained. Complete refcount blocks are read and written
//! without the cache. Worker threads change the refcounts in the blocks.
//!
//! After a torn write, a block contains a mix of old and new refcounts. A mix is safe, because the old and the new
//! refcounts are correct or too high: refcounts are raised before the new references exist, and lowered after the old
//! references are gone.

use std::sync::Arc;

use futures_util::stream::StreamExt as _;
use oxblk_core::{Errno, Error, ErrorKind, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};
use roaring::RoaringTreemap;

use super::super::clusters::ReleaseReason;
use super::super::layout::{Geometry, refcount_get, refcount_max, refcount_set};
use super::super::refscan::{References, read_tables};
use super::ImageSnapshots;
use super::references::Reachable;

/// The direction in which refcounts change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Raise,
    Lower,
}

/// Contiguous host clusters: the index of the first one, and their number.
type Run = (u64, u64);

/// A refcount block after the change.
struct Changed {
    block: IoBuf,
    /// Clusters whose refcount has become 0.
    freed: Vec<Run>,
    /// Clusters whose refcount has become 1.
    unshared: Vec<Run>,
}

fn push(runs: &mut Vec<Run>, cluster: u64) {
    match runs.last_mut() {
        Some((start, count)) if start.saturating_add(*count) == cluster => {
            *count = count.saturating_add(1);
        }
        _ => runs.push((cluster, 1)),
    }
}

/// Changes the refcounts in a block.
///
/// # Errors
/// The index of the first cluster whose refcount would be less than 0 or greater than its maximum.
fn change_block(
    counted: &References,
    index: u64,
    mut block: IoBufMut,
    geometry: Geometry,
    change: Change,
) -> Result<Changed, u64> {
    let (per_block, order) = (geometry.refcounts_per_block(), geometry.refcount_order);
    let start = index.saturating_mul(per_block);
    let (mut freed, mut unshared) = (Vec::new(), Vec::new());
    for (cluster, referred) in counted.in_range(start..start.saturating_add(per_block)) {
        let at = cluster.saturating_sub(start);
        let before = refcount_get(&block, at, order).ok_or(cluster)?;
        let after = match change {
            Change::Raise => before.checked_add(referred.count()),
            Change::Lower => before.checked_sub(referred.count()),
        };
        let after = after.filter(|count| *count <= refcount_max(order)).ok_or(cluster)?;
        refcount_set(&mut block, at, order, after).map_err(|_| cluster)?;
        match after {
            0 => push(&mut freed, cluster),
            1 => push(&mut unshared, cluster),
            _ => {}
        }
    }
    Ok(Changed { block: block.freeze(), freed, unshared })
}

impl ImageSnapshots {
    /// Raises the refcounts of all clusters of `reachable`. If a block cannot be changed, tries to lower the raised refcounts
    /// again.
    ///
    /// # Errors
    /// `EINVAL` if a refcount would exceed its maximum, `EBUSY` if a slice of refcounts is in use, and the errors of
    /// requests to the image file.
    pub(super) async fn raise_reachable(&self, reachable: &Reachable) -> Result<()> {
        let blocks = reachable.counted.blocks(self.geometry.refcounts_per_block());
        let mut done = Vec::new();
        let raised = self.change_blocks(reachable, blocks, Change::Raise, &mut done).await;
        if raised.is_err() {
            // If lowering fails too, clusters are leaked.
            let _ = self.change_blocks(reachable, done, Change::Lower, &mut Vec::new()).await;
        }
        raised.map(drop)
    }

    /// Lowers the refcounts of all clusters of `reachable`. The caller ensures that the disk no longer contains the references.
    /// Returns the clusters whose refcount has become one.
    ///
    /// # Errors
    /// The errors of requests to the image file, `Corrupt` if a refcount is too low or a freed cluster contains metadata, and
    /// `EBUSY` if a slice of refcounts is in use. If only some refcount blocks cannot be changed, the refcounts in the other
    /// blocks are still lowered.
    pub(super) async fn lower_reachable(&self, reachable: &Reachable) -> Result<RoaringTreemap> {
        let blocks = reachable.counted.blocks(self.geometry.refcounts_per_block());
        self.change_blocks(reachable, blocks, Change::Lower, &mut Vec::new()).await
    }

    /// Changes the refcounts in the blocks with these indices. The indices of the changed blocks are added to `done`.
    async fn change_blocks(
        &self,
        reachable: &Reachable,
        blocks: Vec<u64>,
        change: Change,
        done: &mut Vec<u64>,
    ) -> Result<RoaringTreemap> {
        // The cache must be clean before the change and empty during it, because the change bypasses the cache.
        self.clusters.write_back_refcounts().await?;
        if !self.clusters.cache().clear() {
            return Err(Error::new(ErrorKind::Busy, "refcounts are in use").errno(Errno::BUSY));
        }
        // A scan must not find a cluster with refcount 0 before the cluster is quarantined.
        let _guard = self.clusters.lock_scanning().await;
        let file = self.image_state.file()?;
        let (geometry, counted) = (self.geometry, Arc::clone(&reachable.counted));
        let places = self.clusters.places_of(blocks)?;
        let change_one = move |(index, _): &(u64, u64), block: IoBufMut| {
            change_block(&counted, *index, block, geometry, change)
        };
        let places = places.into_iter().map(|place| (place, place.1)).collect();
        let blocks = read_tables(&file, geometry.cluster_size(), places, change_one);
        let mut blocks = std::pin::pin!(blocks);
        let (mut unshared, mut outcome) = (RoaringTreemap::new(), Ok(()));
        while let Some(((index, offset), changed)) = blocks.next().await {
            let written = match changed {
                Ok(Ok(changed)) => {
                    self.write_changed(reachable, offset, changed, &mut unshared).await
                }
                Ok(Err(cluster)) => Err(out_of_bounds(cluster, change)),
                Err(unread) => Err(unread),
            };
            match written {
                Ok(()) => done.push(index),
                Err(error) if change == Change::Raise => return Err(error),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome.map(|()| unshared)
    }

    /// Writes a changed block, and quarantines the clusters whose refcount has become 0.
    async fn write_changed(
        &self,
        reachable: &Reachable,
        offset: u64,
        changed: Changed,
        unshared: &mut RoaringTreemap,
    ) -> Result<()> {
        let (bits, size) = (self.geometry.cluster_bits, self.geometry.cluster_size());
        // The freed L2 tables of `reachable`. They no longer count as metadata.
        let mut tables = Vec::new();
        for (cluster, count) in &changed.freed {
            let end = cluster.saturating_add(*count);
            let mut at = *cluster;
            let from = reachable.tables.partition_point(|table| table < cluster);
            for table in reachable.tables.iter().skip(from).take_while(|table| **table < end) {
                self.check_freed(at, *table).await?;
                tables.push(*table);
                at = table.saturating_add(1);
            }
            self.check_freed(at, end).await?;
        }
        let file = self.image_state.file()?;
        let writing = self.metadata.barrier().pass().await;
        let written = file.write(offset, changed.block, WriteFlags::empty()).await;
        writing.done();
        written?;
        tables.iter().for_each(|table| self.clusters.forget_metadata(table << bits, size));
        for (cluster, count) in changed.freed {
            self.clusters.quarantine(cluster, count, ReleaseReason::Snapshot);
        }
        for (cluster, count) in changed.unshared {
            unshared.insert_range(cluster..cluster.saturating_add(count));
        }
        Ok(())
    }

    /// Refuses to free a range of clusters that contains metadata.
    async fn check_freed(&self, start: u64, end: u64) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let (at, bytes) = (start << bits, end.saturating_sub(start) << bits);
        if bytes == 0 || !self.clusters.is_metadata(at, bytes) {
            return Ok(());
        }
        let text = format!("Preventing invalid freeing of metadata near offset {at:#x}");
        Err(self.image_state.mark_corrupt(&text, at).await)
    }
}

fn out_of_bounds(cluster: u64, change: Change) -> Error {
    match change {
        Change::Raise => Error::from_errno(Errno::INVAL),
        Change::Lower => Error::corrupt(format!("the refcount of cluster {cluster} is too low")),
    }
}
