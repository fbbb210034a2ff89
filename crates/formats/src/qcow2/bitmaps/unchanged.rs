//! Finding bitmaps whose copy on disk equals the bitmap in memory.
//!
//! When a compacted image is closed, such bitmaps stay in place, so that the image stays compact. If all usable bitmaps stay in
//! place, only their flags in the directory change. A reopen also compares the bitmaps on disk with the bitmaps in memory.

use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _};
use oxblk_core::bitmap::{DirtyBitmap, RangeMap};
use oxblk_core::{Edge, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::super::layout::{
    BitmapData, BitmapEntry, BitmapFlags, BitmapTableEntry, Header, bitmap_bytes,
    encode_bitmap_directory,
};
use super::Bitmaps;
use super::Stored;
use super::load::{MAX_ONES_BYTES, read_directory};

/// Bytes of bitmap data that are read concurrently. At least 2 and at most 64 clusters are read concurrently.
const READ_AHEAD: u64 = 1 << 20;

/// The directory entry of a bitmap without the in-use flag. The flag "auto" is set if the bitmap records writes, and cleared
/// otherwise.
pub(super) fn entry_not_in_use(entry: &BitmapEntry, bitmap: &DirtyBitmap) -> BitmapEntry {
    let mut entry = entry.clone();
    entry.flags.remove(BitmapFlags::IN_USE);
    entry.flags.set(BitmapFlags::AUTO, bitmap.is_recording());
    entry
}

impl Bitmaps {
    /// Whether the bitmap on disk equals the bitmap in memory, apart from its flags. A bitmap with "all ones" entries on disk
    /// counts as different.
    pub(super) async fn is_as_stored(
        &self,
        stored: &Stored,
        bitmap: &Arc<DirtyBitmap>,
    ) -> Result<bool> {
        let map = bitmap.everything()?;
        let granularity = stored.entry.granularity().unwrap_or(0);
        let bytes = bitmap_bytes(map.size(), map.granularity());
        let needed = self.geometry.clusters_for(bytes).max(1);
        if stored.clusters.is_empty()
            || (map.size(), map.granularity()) != (self.image_state.size(), granularity)
            || u64::from(stored.entry.table_entries) != needed
        {
            return Ok(false);
        }
        let file = self.image_state.file()?;
        let table = self.read_bitmap_table(&file, &stored.entry).await?;
        let chunk = map.chunk_for(self.geometry.cluster_size());
        let (file, map) = (&file, &map);
        let comparisons = stream::iter((0_u64..).zip(table)).map(|(index, word)| {
            self.is_chunk_as_stored(file, map, index.saturating_mul(chunk), chunk, word)
        });
        let at_once = usize::try_from(READ_AHEAD / self.geometry.cluster_size()).unwrap_or(1);
        let mut comparisons = Box::pin(comparisons.buffered(at_once.clamp(2, 64)));
        while let Some(same) = comparisons.next().await {
            if !same? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Like [`Self::is_as_stored`], for the part of the bitmap that one table entry covers.
    async fn is_chunk_as_stored(
        &self,
        file: &Edge,
        map: &RangeMap,
        start: u64,
        chunk: u64,
        word: BitmapTableEntry,
    ) -> Result<bool> {
        let len = chunk.min(map.size().saturating_sub(start));
        match word.data(self.geometry) {
            Ok(BitmapData::Zeroes) => Ok(len == 0 || map.next_dirty(start, len).is_none()),
            Ok(BitmapData::At(offset)) if len > 0 => {
                let size = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
                let there = file.read(offset, IoBufMut::new(size)).await?;
                let bytes = usize::try_from(map.serialized_len(start, len)?).unwrap_or(usize::MAX);
                let mut here = vec![0; bytes.min(size)];
                map.serialize(start, len, &mut here)?;
                Ok(there.get(..bytes) == Some(&here[..]))
            }
            // "All ones" entries and invalid entries are not compared: the bitmap counts as different.
            _ => Ok(false),
        }
    }

    /// Writes the directory in place. `stored` differs from the directory on disk only in flags, and the flags of an entry
    /// lie within one sector. A torn write is harmless, because each bitmap is valid with and without the in-use flag.
    pub(super) async fn change_flags(&self, stored: Vec<Stored>) -> Result<()> {
        let Some(place) = self.state().directory.place else { return Ok(()) };
        let bytes = encode_bitmap_directory(stored.iter().map(|stored| &stored.entry));
        // A failed write may still have changed the disk. So the bitmaps count in memory as not in use, and the in-use flags
        // are written again before the next request.
        self.state().directory.stored = stored;
        let file = self.image_state.file()?;
        file.write(place.directory_offset, IoBuf::from(bytes), WriteFlags::empty()).await?;
        file.flush().await
    }

    /// Whether the bitmap directory in `file` equals the directory in memory, and the data of each usable bitmap in `file`
    /// equals the bitmap in memory.
    pub(in super::super) async fn has_bitmaps_on_disk(
        &self,
        file: &Edge,
        header: &Header,
    ) -> Result<bool> {
        let state = self.state().clone();
        if header.extensions.bitmaps != state.directory.place {
            return Ok(false);
        }
        let Some(place) = state.directory.place else { return Ok(true) };
        let entries: Vec<BitmapEntry> = read_directory(file, &place).await?;
        if !entries.iter().eq(state.directory.stored.iter().map(|stored| &stored.entry)) {
            return Ok(false);
        }
        let mut ones = MAX_ONES_BYTES;
        let live_by_name = state.live_by_name();
        for entry in &entries {
            let Some(live) = live_by_name.get(&*entry.name()) else { continue };
            // Equal entries do not prove equal data: another program may have changed the data.
            let table = self.read_bitmap_table(file, entry).await?;
            let there = self.read_bitmap(file, entry, &table, &mut ones).await;
            let here = live.map();
            if !there.is_ok_and(|there| there.areas().eq(here.areas())) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
