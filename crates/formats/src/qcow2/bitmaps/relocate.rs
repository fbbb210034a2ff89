//! Moving bitmaps towards the front of the file.
//!
//! Only the copies of the bitmaps on disk move. A bitmap that is marked as in use keeps the mark. First, copies of the data,
//! a new table and a new directory are written with their refcounts, and flushed. Then the header is changed to refer to the
//! new directory.

use oxblk_core::{Error, Result};
use oxblk_ring::IoBufMut;
use roaring::RoaringTreemap;

use super::super::layout::BitmapData;
use super::Bitmaps;
use super::Stored;
use super::new_clusters::NewClusters;

/// Bytes of bitmap data that are copied in one batch. A batch has at least one cluster.
const AT_ONCE: u64 = 1 << 20;

impl Bitmaps {
    /// Moves the bitmap or the directory that uses `cluster`, the last cluster in use, to lower clusters. When a bitmap moves,
    /// the directory moves too. Data clusters of the bitmap before the cluster `end` stay in place. Returns the number of
    /// clusters that moved, 0 if there is no space, and `None` if no movable bitmap or directory uses `cluster`. The caller
    /// holds the guard of [`Bitmaps::lock`](super::Bitmaps::lock).
    pub(in super::super) async fn move_bitmaps(
        &self,
        cluster: u64,
        end: u64,
    ) -> Result<Option<u64>> {
        let directory = self.state().directory.clone();
        let Some(place) = directory.place else { return Ok(None) };
        let owner = directory.stored.iter().position(|one| one.clusters.contains(cluster));
        // If other metadata uses a cluster of the directory, the old clusters of the directory cannot be freed.
        if directory.clusters.is_empty()
            || (owner.is_none() && !directory.clusters.contains(cluster))
        {
            return Ok(None);
        }
        let room = |bytes: u64| {
            self.clusters.has_run_below(self.geometry.clusters_for(bytes).max(1), cluster)
        };
        self.clusters.scan_up_to(cluster).await?;
        if !room(place.directory_size) {
            return Ok(Some(0));
        }
        let mut new_clusters = NewClusters::new(self);
        let mut stored = directory.stored.clone();
        let mut old = directory.clusters.clone();
        if let Some(bitmap) = owner.and_then(|owner| stored.get_mut(owner)) {
            let moved = self.copy_bitmap(&mut new_clusters, bitmap, end).await?;
            old |= &(&bitmap.clusters - &moved.clusters);
            *bitmap = moved;
        }
        // The copies have used free clusters. Check that there is still space for the new directory.
        self.clusters.scan_up_to(cluster).await?;
        if new_clusters.end() > cluster || !room(place.directory_size) {
            return Ok(Some(0));
        }
        let moved = old.len();
        self.replace_directory(new_clusters, stored, &old).await?;
        Ok(Some(moved))
    }

    /// Writes a new table for a bitmap, and copies the data of the bitmap that lies in clusters from `end` on.
    async fn copy_bitmap(
        &self,
        new_clusters: &mut NewClusters<'_>,
        bitmap: &Stored,
        end: u64,
    ) -> Result<Stored> {
        let file = self.image_state.file()?;
        let bits = self.geometry.cluster_bits;
        let size = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let at_once = usize::try_from(AT_ONCE >> bits).unwrap_or(1).max(1);
        let words = self.read_bitmap_table(&file, &bitmap.entry).await?;
        let mut table: Vec<u64> = words.iter().map(|word| word.0).collect();
        let mut clusters = RoaringTreemap::new();
        let mut moving = Vec::new();
        for (index, word) in words.iter().enumerate() {
            let data = word.data(self.geometry).map_err(|bad| Error::corrupt(bad.to_string()))?;
            match data {
                BitmapData::At(offset) if offset >> bits >= end => moving.push((index, offset)),
                BitmapData::At(offset) => {
                    clusters.insert(offset >> bits);
                }
                BitmapData::Zeroes | BitmapData::Ones => {}
            }
        }
        for batch in moving.chunks(at_once) {
            let mut pieces = Vec::with_capacity(batch.len());
            for (_, offset) in batch {
                pieces.push(file.read(*offset, IoBufMut::new(size)).await?);
            }
            let put = new_clusters.write(pieces).await?;
            for ((index, _), cluster) in batch.iter().zip(put) {
                if let Some(word) = table.get_mut(*index) {
                    *word = cluster << bits;
                }
                clusters.insert(cluster);
            }
        }
        let table: Vec<u8> = table.into_iter().flat_map(u64::to_be_bytes).collect();
        let count = self.geometry.clusters_for(u64::try_from(table.len()).unwrap_or(u64::MAX));
        let place = new_clusters.write_contiguous(table).await?;
        clusters.insert_range(place..place.saturating_add(count));
        let mut moved = Stored { clusters, ..bitmap.clone() };
        moved.entry.table_offset = place << bits;
        Ok(moved)
    }
}
