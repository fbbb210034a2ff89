//! Reading the bitmap directory, the bitmap tables and the bitmap data.
//!
//! An untrusted image cannot make this module use unbounded memory. A table must lie within the file, the number of table
//! entries must match the disk size, and two bitmaps must not share a cluster. An "all ones" entry needs no data in the file,
//! so a fixed budget limits the bytes of such entries.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _};
use oxblk_core::bitmap::{DirtyBitmap, MAX_GRANULARITY, MAX_NAME, MIN_GRANULARITY, RangeMap};
use oxblk_core::{Edge, Error, Result};
use oxblk_ring::IoBufMut;
use roaring::RoaringTreemap;

use super::super::layout::{
    BitmapData, BitmapEntry, BitmapFlags, BitmapTableEntry, BitmapsExtension, bitmap_bytes,
    parse_bitmap_directory,
};
use super::Bitmaps;
use super::{State, Stored};

/// Maximum number of bytes of bitmap data that all "all ones" entries of an image may represent together.
pub(super) const MAX_ONES_BYTES: u64 = 256 << 20;
/// Bytes of bitmap data that are read concurrently. At least 2 and at most 64 clusters are read concurrently.
const READ_AHEAD: u64 = 4 << 20;

/// Reads the bitmap directory.
///
/// # Errors
/// When the directory does not lie within the file or cannot be parsed, and the errors of requests to the image file.
pub(in super::super) async fn read_directory(
    file: &Edge,
    directory: &BitmapsExtension,
) -> Result<Vec<BitmapEntry>> {
    let end = directory.directory_offset.checked_add(directory.directory_size);
    if end.is_none_or(|end| end > file.size()) {
        return Err(Error::invalid("Broken bitmap directory"));
    }
    let len = usize::try_from(directory.directory_size).unwrap_or(usize::MAX);
    let bytes = file.read(directory.directory_offset, IoBufMut::new(len)).await?;
    parse_bitmap_directory(&bytes, directory.count)
}

impl Bitmaps {
    /// Reads the bitmaps of the image, and returns them. If the image is writable, bitmaps are marked as in use on disk.
    pub(in crate::qcow2) async fn load_bitmaps(&self) -> Result<Vec<Arc<DirtyBitmap>>> {
        let place = self.state().directory.place;
        let Some(place) = place else { return Ok(Vec::new()) };
        let file = self.image_state.file()?;
        let entries = read_directory(&file, &place).await?;
        let mut state = State::default();
        state.directory.place = Some(place);
        let first = self.geometry.cluster_index(place.directory_offset);
        let count = self.geometry.clusters_for(place.directory_size);
        let mut clusters = RoaringTreemap::new();
        clusters.insert_range(first..first.saturating_add(count));
        if self.note_metadata_clusters(&clusters) {
            state.directory.clusters = clusters;
        }
        let mut ones = MAX_ONES_BYTES;
        let mut all = Vec::new();
        let twice = duplicate_names(&entries);
        let mut seen = HashSet::new();
        for entry in entries {
            let name = entry.name().into_owned();
            let (mut stored, map) = self.load_bitmap(&file, entry, &mut ones).await;
            if twice.contains(&name) {
                stored.fault.get_or_insert_with(|| format!("Bitmap already exists: {name}"));
            }
            if let Some(fault) = &stored.fault {
                tracing::warn!("qcow2: bitmap '{name}' cannot be used: {fault}");
            }
            if seen.insert(name)
                && let Some(bitmap) = self.make_bitmap(&stored, map)?
            {
                if !bitmap.is_inconsistent() {
                    state.live.push(Arc::clone(&bitmap));
                }
                all.push(bitmap);
            }
            state.directory.stored.push(stored);
        }
        *self.state() = state;
        if !self.image_state.is_read_only() {
            self.mark_bitmaps_in_use().await?;
        }
        Ok(all)
    }

    /// Loads one bitmap: its clusters in the image, and its contents if the bitmap is usable.
    async fn load_bitmap(
        &self,
        file: &Edge,
        entry: BitmapEntry,
        ones: &mut u64,
    ) -> (Stored, Option<RangeMap>) {
        let mut stored = Stored { entry, clusters: RoaringTreemap::new(), fault: None };
        let outcome = async {
            let entry = &stored.entry;
            if let Some(fault) = entry.fault(self.geometry) {
                return Err(fault);
            }
            let could_not = |error: Error| {
                format!("Could not read bitmap '{}' from image: {error}", entry.name())
            };
            let table = self.read_bitmap_table(file, entry).await.map_err(could_not)?;
            let clusters = self.bitmap_clusters(file, entry, &table)?;
            if !self.note_metadata_clusters(&clusters) {
                return Err("other metadata or data also uses its clusters".to_owned());
            }
            let map = match entry.flags.contains(BitmapFlags::IN_USE) {
                true => Ok(None),
                false => self.read_bitmap(file, entry, &table, ones).await.map(Some),
            };
            Ok((clusters, map.map_err(could_not)))
        };
        let (clusters, map) = match outcome.await {
            Ok((clusters, map)) => (clusters, map),
            Err(fault) => (RoaringTreemap::new(), Err(fault)),
        };
        stored.clusters = clusters;
        match map {
            Ok(map) => (stored, map),
            Err(fault) => {
                stored.fault = Some(fault);
                (stored, None)
            }
        }
    }

    /// Notes clusters as metadata. Returns whether none of them was metadata before.
    fn note_metadata_clusters(&self, clusters: &RoaringTreemap) -> bool {
        let bits = self.geometry.cluster_bits;
        let size = self.geometry.cluster_size();
        let own = clusters.iter().all(|cluster| !self.clusters.is_metadata(cluster << bits, size));
        clusters.iter().for_each(|cluster| self.clusters.note_metadata(cluster << bits, size));
        own
    }

    /// Notes the clusters of all stored bitmaps as metadata.
    pub(in super::super) fn note_bitmaps(&self) {
        let directory = self.state().directory.clone();
        for stored in &directory.stored {
            self.note_metadata_clusters(&stored.clusters);
        }
        self.note_metadata_clusters(&directory.clusters);
    }

    /// The entries of a bitmap's table.
    ///
    /// # Errors
    /// When the table does not lie within the file, and the errors of requests to the image file.
    pub(super) async fn read_bitmap_table(
        &self,
        file: &Edge,
        entry: &BitmapEntry,
    ) -> Result<Vec<BitmapTableEntry>> {
        let end = entry.table_offset.checked_add(entry.table_bytes());
        if end.is_none_or(|end| end > file.size()) {
            return Err(Error::invalid("its table lies outside of the file"));
        }
        let len = usize::try_from(entry.table_bytes()).unwrap_or(usize::MAX);
        let table = file.read(entry.table_offset, IoBufMut::new(len)).await?;
        let words = table.as_chunks::<8>().0.iter();
        Ok(words.map(|word| BitmapTableEntry(u64::from_be_bytes(*word))).collect())
    }

    /// The clusters of a bitmap's table and data.
    fn bitmap_clusters(
        &self,
        file: &Edge,
        entry: &BitmapEntry,
        table: &[BitmapTableEntry],
    ) -> Result<RoaringTreemap, String> {
        let end = self.geometry.clusters_for(file.size());
        let first = self.geometry.cluster_index(entry.table_offset);
        let mut clusters = RoaringTreemap::new();
        clusters.insert_range(
            first..first.saturating_add(self.geometry.clusters_for(entry.table_bytes())),
        );
        for word in table {
            let data = word.data(self.geometry).map_err(|bad| {
                format!(
                    "Could not read bitmap_table table from image for bitmap '{}': {bad}",
                    entry.name()
                )
            })?;
            if let BitmapData::At(offset) = data {
                let cluster = self.geometry.cluster_index(offset);
                if cluster >= end {
                    return Err(format!("its data at {offset:#x} lies outside of the file"));
                }
                if !clusters.insert(cluster) {
                    return Err(format!("it refers to the cluster at {offset:#x} twice"));
                }
            }
        }
        Ok(clusters)
    }

    /// The contents of a bitmap that is not in use.
    ///
    /// # Errors
    /// When the granularity or a table entry is invalid, when the number of table entries does not match the disk size, when
    /// the "all ones" entries exceed the budget `ones`, and the errors of requests to the image file.
    pub(super) async fn read_bitmap(
        &self,
        file: &Edge,
        entry: &BitmapEntry,
        table: &[BitmapTableEntry],
        ones: &mut u64,
    ) -> Result<RangeMap> {
        let map = RangeMap::new(self.image_state.size(), entry.granularity().unwrap_or(0))?;
        let bytes = bitmap_bytes(map.size(), map.granularity());
        let needed = self.geometry.clusters_for(bytes).max(1);
        if needed != u64::from(entry.table_entries) {
            return Err(Error::invalid(format!(
                "its table has {} entries, where {needed} are needed",
                entry.table_entries
            )));
        }
        let chunk = map.chunk_for(self.geometry.cluster_size());
        let mut places = Vec::new();
        for (index, word) in (0_u64..).zip(table) {
            let start = index.saturating_mul(chunk);
            let len = chunk.min(map.size().saturating_sub(start));
            match word.data(self.geometry).map_err(|bad| Error::invalid(bad.to_string()))? {
                BitmapData::Zeroes => {}
                BitmapData::Ones => {
                    let bytes = map.serialized_len(start, len)?;
                    *ones = ones.checked_sub(bytes).ok_or_else(|| {
                        Error::invalid("its \"all ones\" table entries exceed the limit")
                    })?;
                    map.deserialize_fill(start, len, true)?;
                }
                BitmapData::At(offset) => places.push((start, len, offset)),
            }
        }
        let size = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let at_once = usize::try_from(READ_AHEAD / self.geometry.cluster_size()).unwrap_or(1);
        let reads = stream::iter(places).map(|(start, len, offset)| async move {
            (start, len, file.read(offset, IoBufMut::new(size)).await)
        });
        let mut reads = Box::pin(reads.buffered(at_once.clamp(2, 64)));
        while let Some((start, len, data)) = reads.next().await {
            let data = data?;
            let bytes = usize::try_from(map.serialized_len(start, len)?).unwrap_or(usize::MAX);
            map.deserialize(start, len, data.get(..bytes).unwrap_or_default())?;
        }
        Ok(map)
    }

    /// Makes the node's bitmap. Returns `None` if a node cannot have a bitmap with this name.
    fn make_bitmap(
        &self,
        stored: &Stored,
        map: Option<RangeMap>,
    ) -> Result<Option<Arc<DirtyBitmap>>> {
        let name = stored.entry.name();
        if !(1..=MAX_NAME).contains(&name.len()) {
            return Ok(None);
        }
        let granularity = stored.entry.granularity().unwrap_or(MAX_GRANULARITY);
        let granularity = granularity.clamp(MIN_GRANULARITY, MAX_GRANULARITY);
        let bitmap = match map {
            Some(map) if stored.is_usable() => DirtyBitmap::with_map(&name, map)?,
            _ => {
                let bitmap = DirtyBitmap::new(&name, self.image_state.size(), granularity)
                    .or_else(|_| {
                        DirtyBitmap::new(&name, self.image_state.size(), MAX_GRANULARITY)
                    })?;
                bitmap.set_inconsistent();
                bitmap
            }
        };
        if !stored.entry.flags.contains(BitmapFlags::AUTO) {
            bitmap.set_enabled(false);
        }
        bitmap.set_persistent(true);
        bitmap.set_read_only(self.image_state.is_read_only());
        Ok(Some(bitmap))
    }
}

fn duplicate_names(entries: &[BitmapEntry]) -> HashSet<String> {
    let mut times: HashMap<String, u32> = HashMap::new();
    for entry in entries {
        let count = times.entry(entry.name().into_owned()).or_default();
        *count = count.saturating_add(1);
    }
    times.into_iter().filter(|(_, times)| *times > 1).map(|(name, _)| name).collect()
}
