//! The sector bitmaps of blocks.
//!
//! The sector bitmap of a block says which sectors of the block were written. When this driver reads, it ignores the bits,
//! as QEMU does: a sector whose bit is 0 contains zeroes. Other programs use the bits, so the bits of written sectors must
//! be set. Another program may have left some bits at 0. So the driver sets all bits of a block before its first write to
//! the block.

use std::sync::OnceLock;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Release},
};

use oxblk_core::{Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Vpc;
use super::footer::SECTOR;

/// Number of blocks in one chunk of the set. A chunk is allocated when it is needed.
const CHUNK: u32 = 1 << 14;
const WORD_BITS: u32 = 64;
/// Maximum number of bytes of a sector bitmap in one request.
const MAX_BYTES: u64 = 64 << 10;

/// The blocks of the disk whose sector bitmaps are known to have all bits set.
#[derive(Debug)]
pub(super) struct FullBitmaps(Box<[OnceLock<Box<[AtomicU64]>>]>);

fn place(index: u32) -> (usize, usize, u64) {
    let position = |number| usize::try_from(number).unwrap_or(usize::MAX);
    let (chunk, within) = (index / CHUNK, index % CHUNK);
    (position(chunk), position(within / WORD_BITS), 1 << (within % WORD_BITS))
}

impl FullBitmaps {
    /// Creates an empty set for a disk with this number of blocks.
    pub(super) fn new(blocks: u32) -> Self {
        Self((0..blocks.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect())
    }

    /// Whether all bits in the sector bitmap of the block are known to be set. Takes no lock.
    pub(super) fn contains(&self, index: u32) -> bool {
        let (chunk, word, bit) = place(index);
        let words = self.0.get(chunk).and_then(OnceLock::get);
        words.and_then(|words| words.get(word)).is_some_and(|word| word.load(Acquire) & bit != 0)
    }

    /// Records that all bits in the sector bitmap of the block are set.
    pub(super) fn insert(&self, index: u32) {
        let (chunk, word, bit) = place(index);
        let Some(chunk) = self.0.get(chunk) else { return };
        let words =
            chunk.get_or_init(|| (0..CHUNK / WORD_BITS).map(|_| AtomicU64::new(0)).collect());
        if let Some(word) = words.get(word) {
            word.fetch_or(bit, Release);
        }
    }

    /// Removes all blocks from the set.
    pub(super) fn clear(&self) {
        for word in self.0.iter().filter_map(OnceLock::get).flatten() {
            word.store(0, Release);
        }
    }
}

impl Vpc {
    /// Sets all bits of the sector bitmap of an allocated block, unless all bits are known to be set. `start` is the byte
    /// offset of the block in the file.
    pub(super) async fn fill_bitmap(&self, index: u32, start: u64) -> Result<()> {
        if self.full.contains(index) {
            return Ok(());
        }
        let file = self.file()?;
        let bits = self.metadata.header.block() / SECTOR;
        let mut at = 0;
        while at < bits.div_ceil(8) {
            let len = MAX_BYTES.min(self.metadata.header.bitmap() - at);
            let offset = start.saturating_add(at);
            let bytes = file.read(offset, IoBufMut::new(to_usize(len))).await?;
            let used = to_usize((bits / 8).saturating_sub(at)).min(bytes.len());
            // A bitmap of less than 8 bits has no complete byte to compare, so it is always written.
            if used == 0 || bytes.iter().take(used).any(|byte| *byte != 0xff) {
                file.write(offset, ones(len), WriteFlags::empty()).await?;
            }
            at = at.saturating_add(len);
        }
        self.full.insert(index);
        Ok(())
    }

    /// Writes the sector bitmap of a new block, with all bits set.
    pub(super) async fn write_new_bitmap(&self, start: u64) -> Result<()> {
        let file = self.file()?;
        let mut at = 0;
        while at < self.metadata.header.bitmap() {
            let len = MAX_BYTES.min(self.metadata.header.bitmap() - at);
            file.write(start.saturating_add(at), ones(len), WriteFlags::empty()).await?;
            at = at.saturating_add(len);
        }
        Ok(())
    }
}

fn to_usize(len: u64) -> usize {
    usize::try_from(len).unwrap_or(0)
}

fn ones(len: u64) -> IoBuf {
    IoBuf::from(vec![0xff; to_usize(len)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_recorded_one_by_one() {
        let full = FullBitmaps::new(CHUNK + 65);
        for index in [0, 63, 64, CHUNK, CHUNK + 64] {
            assert!(!full.contains(index));
            full.insert(index);
            assert!(full.contains(index));
        }
        assert!(!full.contains(1) && !full.contains(CHUNK + 63) && !full.contains(u32::MAX));
        full.insert(u32::MAX);
        full.clear();
        assert!(!full.contains(0) && !full.contains(CHUNK));
    }
}
