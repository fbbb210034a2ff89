//! The serialised form of bitmaps: granule `n` is bit `n % 8` of byte `n / 8`. This form equals a sequence of 64-bit
//! little-endian words. The section "Bitmap data" of the qcow2 specification specifies this form, and migration streams
//! use it too.
//!
//! A chunk starts at a multiple of [`RangeMap::chunk_alignment`], and ends at such a multiple or at the end of the
//! disk. Load chunks only into a map that no other code uses yet. Bits past the end of the disk are ignored.

use super::{BitmapError, RangeMap};

impl RangeMap {
    /// Bytes of disk that one 64-bit word of serialised bitmap covers.
    pub fn chunk_alignment(&self) -> u64 {
        64 << self.shift()
    }

    /// Bytes of disk that `serialized` bytes of bitmap cover (for example a qcow2 cluster of bitmap data), rounded down
    /// to the chunk alignment.
    pub fn chunk_for(&self, serialized: u64) -> u64 {
        (serialized / 8).saturating_mul(self.chunk_alignment())
    }

    /// Length of the serialised chunk in bytes, a multiple of 8. The chunk covers `len` bytes of disk from `offset` on.
    ///
    /// # Errors
    /// When the range is not a chunk.
    pub fn serialized_len(&self, offset: u64, len: u64) -> Result<u64, BitmapError> {
        let (first, past) = self.words(offset, len)?;
        Ok((past - first) * 8)
    }

    /// Writes the chunk's bits to `out`. `out` must have the serialised length of the chunk.
    ///
    /// # Errors
    /// When the range is not a chunk, or `out` has another length.
    pub fn serialize(&self, offset: u64, len: u64, out: &mut [u8]) -> Result<(), BitmapError> {
        let (first, past) = self.checked_words(offset, len, out.len())?;
        for (word, bytes) in (first..past).zip(out.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&self.tree().word(word).to_le_bytes());
        }
        Ok(())
    }

    /// Replaces the chunk's bits by those in `data`.
    ///
    /// # Errors
    /// When the range is not a chunk, or `data` has another length.
    pub fn deserialize(&self, offset: u64, len: u64, data: &[u8]) -> Result<(), BitmapError> {
        let (first, past) = self.checked_words(offset, len, data.len())?;
        self.reset(offset, len);
        for (word, bytes) in (first..past).zip(data.as_chunks::<8>().0) {
            self.tree().set_word(word, u64::from_le_bytes(*bytes));
        }
        Ok(())
    }

    /// Sets all bits of the chunk to clean or to dirty.
    ///
    /// # Errors
    /// When the range is not a chunk.
    pub fn deserialize_fill(&self, offset: u64, len: u64, dirty: bool) -> Result<(), BitmapError> {
        self.words(offset, len)?;
        if dirty {
            self.set(offset, len);
        } else {
            self.reset(offset, len);
        }
        Ok(())
    }

    fn checked_words(
        &self,
        offset: u64,
        len: u64,
        bytes: usize,
    ) -> Result<(u64, u64), BitmapError> {
        let (first, past) = self.words(offset, len)?;
        let expected = (past - first) * 8;
        (u64::try_from(bytes) == Ok(expected)).then_some((first, past)).ok_or(BitmapError::Chunk)
    }

    fn words(&self, offset: u64, len: u64) -> Result<(u64, u64), BitmapError> {
        let end = offset.checked_add(len).ok_or(BitmapError::Chunk)?;
        let align = self.chunk_alignment();
        let whole = end.is_multiple_of(align) || end == self.size();
        if !offset.is_multiple_of(align)
            || !whole
            || end > self.size().checked_next_multiple_of(align).unwrap_or(u64::MAX)
        {
            return Err(BitmapError::Chunk);
        }
        Ok((offset / align, end.div_ceil(align)))
    }
}
