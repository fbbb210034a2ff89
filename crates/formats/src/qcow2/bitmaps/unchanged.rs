//! Bitmaps that are in the image as they are in memory: when it is closed only the mark that they are in use is taken back,
//! and the file stays as it is.

use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _};
use oxblk_core::bitmap::{DirtyBitmap, RangeMap};
use oxblk_core::{ChildIdx, Edge, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::super::Qcow2;
use super::super::layout::{
    BitmapData, BitmapEntry, BitmapFlags, BitmapTableEntry, bitmap_bytes, encode_bitmap_directory,
};
use super::Stored;

/// Bytes of bitmap data that are read ahead.
const READ_AHEAD: u64 = 1 << 20;

/// The entry of a bitmap that is no longer in use.
pub(super) fn finished(entry: &BitmapEntry, bitmap: &DirtyBitmap) -> BitmapEntry {
    let mut entry = entry.clone();
    entry.flags.remove(BitmapFlags::IN_USE);
    entry.flags.set(BitmapFlags::AUTO, bitmap.is_recording());
    entry
}

impl Qcow2 {
    /// Whether the image has the bitmap as it is in memory, but for the flags.
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
            || (map.size(), map.granularity()) != (self.size(), granularity)
            || u64::from(stored.entry.table_entries) != needed
        {
            return Ok(false);
        }
        let file = self.children.require(ChildIdx::FILE)?;
        let table = self.read_bitmap_table(&file, &stored.entry).await?;
        let chunk = map.chunk_for(self.geometry.cluster_size());
        let (file, map) = (&file, &map);
        let looks = stream::iter((0_u64..).zip(table)).map(|(index, word)| {
            self.is_chunk_as_stored(file, map, index.saturating_mul(chunk), chunk, word)
        });
        let at_once = usize::try_from(READ_AHEAD / self.geometry.cluster_size()).unwrap_or(1);
        let mut looks = Box::pin(looks.buffered(at_once.clamp(2, 64)));
        while let Some(same) = looks.next().await {
            if !same? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The same for the part of it that an entry of its table is for.
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
            // What is said to be ones is not looked at: it is written anew.
            _ => Ok(false),
        }
    }

    /// Writes the directory over what it is now, from which `stored` differs in flags alone: those of an entry lie within
    /// a sector, and with or without the mark each bitmap is what it is said to be.
    pub(super) async fn change_flags(&self, stored: Vec<Stored>) -> Result<()> {
        let Some(place) = self.bitmaps.state().directory.place else { return Ok(()) };
        let bytes = encode_bitmap_directory(stored.iter().map(|stored| &stored.entry));
        // Even if it fails it may be so on disk: before the next request they are marked again.
        self.bitmaps.state().directory.stored = stored;
        let file = self.children.require(ChildIdx::FILE)?;
        file.write(place.directory_offset, IoBuf::from(bytes), WriteFlags::empty()).await?;
        file.flush().await
    }
}
