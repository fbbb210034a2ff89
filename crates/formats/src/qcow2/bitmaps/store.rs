//! Storing the bitmaps when the image is closed or becomes read-only, and removing a bitmap.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use oxblk_core::bitmap::{Checks, DirtyBitmap, RangeMap};
use oxblk_core::{Errno, Error, ErrorKind, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};
use roaring::RoaringTreemap;

use super::super::layout::{BitmapEntry, BitmapsExtension, bitmap_bytes, encode_bitmap_directory};
use super::Bitmaps;
use super::new_clusters::NewClusters;
use super::unchanged::entry_not_in_use;
use super::{
    Directory, Stored, check_fits, clear_bitmaps_autoclear, plan_extension, write_planned,
};

/// Bytes of bitmap data that are written in one batch. A batch has at least one cluster.
const AT_ONCE: u64 = 1 << 20;

impl Bitmaps {
    /// Stores the usable bitmaps of a writable image on disk, and clears their in-use flags. The caller ensures that no
    /// request changes a bitmap during the call. After the call, no request may change a bitmap before the bitmaps are marked
    /// as in use again.
    ///
    /// # Errors
    /// When clusters cannot be allocated, and the errors of requests to the image file. After an error, the in-use flags on
    /// disk may be set or cleared.
    pub(in super::super) async fn store_bitmaps(&self) -> Result<()> {
        let _guard = self.changing.lock().await;
        if self.image_state.is_read_only() || !self.image_state.is_usable() {
            return Ok(());
        }
        let state = self.state().clone();
        let mut live: HashMap<&str, &Arc<DirtyBitmap>> =
            state.live.iter().map(|bitmap| (bitmap.name(), bitmap)).collect();
        live.retain(|_, bitmap| bitmap.check(Checks::INCONSISTENT).is_ok());
        if live.is_empty() {
            return Ok(());
        }
        let mut new_clusters = NewClusters::new(self);
        let mut new = Vec::new();
        let mut old = state.directory.clusters.clone();
        let stays = self.unchanged_stay.load(Relaxed);
        let mut all_unchanged = stays;
        for stored in &state.directory.stored {
            let Some(bitmap) = live.remove(stored.entry.name().as_ref()) else {
                new.push(stored.clone());
                continue;
            };
            // If the copy on disk cannot be read, the bitmap is written to new clusters.
            if stays && self.is_as_stored(stored, bitmap).await.unwrap_or(false) {
                new.push(Stored {
                    entry: entry_not_in_use(&stored.entry, bitmap),
                    ..stored.clone()
                });
                continue;
            }
            all_unchanged = false;
            match self.store_bitmap(&mut new_clusters, &stored.entry, bitmap).await? {
                Some(written) => {
                    old |= &stored.clusters;
                    new.push(written);
                }
                None => new.push(stored.clone()),
            }
        }
        if all_unchanged && live.is_empty() && !state.directory.clusters.is_empty() {
            return self.change_flags(new).await;
        }
        // As in QEMU, the bitmap that was added last comes first among the bitmaps that are not on disk yet.
        for bitmap in state.live.iter().rev().filter(|bitmap| live.contains_key(bitmap.name())) {
            let entry = BitmapEntry::new(bitmap.name(), bitmap.map().granularity());
            new.extend(self.store_bitmap(&mut new_clusters, &entry, bitmap).await?);
        }
        self.replace_directory(new_clusters, new, &old).await
    }

    /// Writes one bitmap to new clusters. Returns `None` if the bitmap does not fit the disk. The old copy of the bitmap on
    /// disk then stays marked as in use.
    async fn store_bitmap(
        &self,
        new_clusters: &mut NewClusters<'_>,
        entry: &BitmapEntry,
        bitmap: &Arc<DirtyBitmap>,
    ) -> Result<Option<Stored>> {
        let map = bitmap.everything()?;
        // QEMU refuses an image with a bitmap of an empty disk.
        let fits = map.size() == self.image_state.size()
            && map.size() > 0
            && check_fits(map.size(), map.granularity()).is_ok();
        if !fits {
            tracing::error!("qcow2: bitmap '{}' does not fit the disk and is lost", bitmap.name());
            return Ok(None);
        }
        let (table, mut clusters) = self.write_bitmap_data(new_clusters, &map).await?;
        let entries = u32::try_from(table.len()).map_err(|_| Error::from_errno(Errno::FBIG))?;
        let table: Vec<u8> = table.into_iter().flat_map(u64::to_be_bytes).collect();
        let count = self.geometry.clusters_for(u64::from(entries).saturating_mul(8));
        let place = new_clusters.write_contiguous(table).await?;
        clusters.insert_range(place..place.saturating_add(count));
        let mut entry = entry_not_in_use(entry, bitmap);
        entry.table_offset = place << self.geometry.cluster_bits;
        entry.table_entries = entries;
        Ok(Some(Stored { entry, clusters, fault: None }))
    }

    /// Writes the data clusters that have dirty bits. Returns the table entries and the data clusters.
    async fn write_bitmap_data(
        &self,
        new_clusters: &mut NewClusters<'_>,
        map: &RangeMap,
    ) -> Result<(Vec<u64>, RoaringTreemap)> {
        let size = self.geometry.cluster_size();
        let needed = self.geometry.clusters_for(bitmap_bytes(map.size(), map.granularity()));
        let mut table = vec![0; usize::try_from(needed).unwrap_or(0)];
        let mut clusters = RoaringTreemap::new();
        let chunk = map.chunk_for(size);
        let at_once = usize::try_from((AT_ONCE / size).max(1)).unwrap_or(1);
        let mut at = 0;
        while at < map.size() {
            let (mut places, mut pieces) = (Vec::new(), Vec::new());
            while pieces.len() < at_once
                && let Some(dirty) = map.next_dirty(at, map.size() - at)
            {
                let index = dirty / chunk;
                let start = index.saturating_mul(chunk);
                let len = chunk.min(map.size() - start);
                let mut piece = IoBufMut::zeroed(usize::try_from(size).unwrap_or(0));
                let bytes = usize::try_from(map.serialized_len(start, len)?).unwrap_or(usize::MAX);
                map.serialize(start, len, piece.get_mut(..bytes).unwrap_or_default())?;
                places.push(usize::try_from(index).unwrap_or(usize::MAX));
                pieces.push(piece);
                at = start.saturating_add(len);
            }
            if pieces.is_empty() {
                break;
            }
            let put = new_clusters.write(pieces).await?;
            for (index, cluster) in places.into_iter().zip(put) {
                if let Some(word) = table.get_mut(index) {
                    *word = cluster << self.geometry.cluster_bits;
                }
                clusters.insert(cluster);
            }
        }
        Ok((table, clusters))
    }

    /// Writes a directory with the entries `stored`, changes the header to refer to this directory, and frees the clusters
    /// `old`. All clusters that `stored` refers to are in `new_clusters`, or were in use before. Without entries, the header
    /// refers to no directory.
    pub(super) async fn replace_directory(
        &self,
        mut new_clusters: NewClusters<'_>,
        stored: Vec<Stored>,
        old: &RoaringTreemap,
    ) -> Result<()> {
        let mut new = Directory { stored, ..Directory::default() };
        if !new.stored.is_empty() {
            let bytes = encode_bitmap_directory(new.stored.iter().map(|stored| &stored.entry));
            let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            let first = new_clusters.write_contiguous(bytes).await?;
            let end = first.saturating_add(self.geometry.clusters_for(size));
            new.clusters.insert_range(first..end);
            new.place = Some(BitmapsExtension {
                count: u32::try_from(new.stored.len()).unwrap_or(u32::MAX),
                directory_size: size,
                directory_offset: first << self.geometry.cluster_bits,
            });
        }
        new_clusters.make_durable().await?;
        let file = self.image_state.file()?;
        let guard = self.image_state.lock_header().await;
        let writes = plan_extension(&file, &self.image_state.header(), new.place.as_ref()).await?;
        let written = self.image_state.stop_on_failure(write_planned(&file, writes)).await;
        drop(guard);
        // If the write failed, the header may refer to the old or to the new directory. So both stay allocated.
        new_clusters.keep();
        written?;
        self.state().directory = new;
        self.clusters.drop_table_clusters(old);
        Ok(())
    }

    /// Removes all bitmaps with this name from the image, also unusable bitmaps.
    ///
    /// # Errors
    /// When the image is not writable, when clusters cannot be allocated, and the errors of requests to the image file.
    pub(in crate::qcow2) async fn remove_bitmap(&self, name: &str) -> Result<()> {
        let _guard = self.changing.lock().await;
        self.image_state.check_writable()?;
        let directory = self.state().directory.clone();
        let all = directory.stored.iter().cloned();
        let (gone, stored): (Vec<Stored>, Vec<Stored>) =
            all.partition(|stored| stored.entry.name() == name);
        if !gone.is_empty() {
            let mut old = RoaringTreemap::new();
            gone.iter().for_each(|stored| old |= &stored.clusters);
            let with_directory = &old | &directory.clusters;
            match self
                .replace_directory(NewClusters::new(self), stored.clone(), &with_directory)
                .await
            {
                Err(error)
                    if error.kind() == ErrorKind::NoSpace && self.image_state.is_usable() =>
                {
                    self.shrink_directory(Directory { stored, ..directory }, &old).await?;
                }
                outcome => outcome?,
            }
        }
        self.state().live.retain(|bitmap| bitmap.name() != name);
        Ok(())
    }

    /// Writes a shorter directory over the old directory, for an image without free space. A power cut before the last write
    /// may lose the other bitmaps.
    async fn shrink_directory(&self, mut new: Directory, old: &RoaringTreemap) -> Result<()> {
        let Some(place) = &mut new.place else { return Ok(()) };
        let file = self.image_state.file()?;
        let guard = self.image_state.lock_header().await;
        let bytes = encode_bitmap_directory(new.stored.iter().map(|stored| &stored.entry));
        place.count = u32::try_from(new.stored.len()).unwrap_or(u32::MAX);
        place.directory_size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let outcome = async {
            clear_bitmaps_autoclear(&file).await?;
            file.write(place.directory_offset, IoBuf::from(bytes), WriteFlags::empty()).await?;
            file.flush().await?;
            // These writes also set the autoclear bit again, so that the bitmaps are consistent.
            let writes = plan_extension(&file, &self.image_state.header(), Some(place)).await?;
            write_planned(&file, writes).await
        };
        self.image_state.stop_on_failure(outcome).await?;
        drop(guard);
        let first = self.geometry.cluster_index(place.directory_offset);
        let end = first.saturating_add(self.geometry.clusters_for(place.directory_size));
        let mut kept = new.clusters.clone();
        kept.remove_range(end..);
        let unused = &new.clusters - &kept;
        new.clusters = kept;
        self.state().directory = new;
        self.clusters.drop_table_clusters(&(old | &unused));
        Ok(())
    }
}
