//! Reading all entries of a map, to find the blocks in use and the faulty entries.

use std::ops::{ControlFlow, Range};

use oxblk_core::Result;
use roaring::RoaringBitmap;

use super::EntryMap;

/// Loads the complete map, and calls `each` for all entries in the order of the disk. The arguments of a call are the
/// indices of adjacent entries and their common value. In a chunk of equal entries, the first entry has its own call, and
/// all others have one call together: if several entries have the same value, only the first may be correct. In all other
/// chunks, each entry has its own call. If `each` returns `Break`, the function ends.
///
/// # Errors
/// The errors of `load`. `load` loads the chunk of an entry.
pub(crate) async fn each_entry(
    map: &EntryMap,
    load: impl AsyncFn(u32) -> Result<()>,
    mut each: impl FnMut(Range<u32>, u32) -> ControlFlow<()>,
) -> Result<()> {
    let mut start = 0;
    while start < map.len() {
        load(start).await?;
        let chunk = map.chunk_of(start);
        let mut index = chunk.start;
        while index < chunk.end {
            let alike = match map.uniform(index) {
                Some((_, count)) if index > chunk.start => count.max(1),
                _ => 1,
            };
            let end = index.saturating_add(alike);
            let number = map.get(index).unwrap_or_default();
            if each(index..end, number).is_break() {
                return Ok(());
            }
            index = end;
        }
        start = chunk.end;
    }
    Ok(())
}

/// The number of the highest of these blocks, plus 1. 0 if there are no blocks.
pub(crate) fn end_of(blocks: &RoaringBitmap) -> u32 {
    blocks.max().map_or(0, |last| last.saturating_add(1))
}
