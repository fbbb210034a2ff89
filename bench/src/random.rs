//! The source of offsets and data of all contenders.

/// Xorshift. All contenders in this program use this cheap source of offsets.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// The offset of one of the blocks of a file of `size` bytes.
    pub(crate) fn offset(&mut self, size: u64, block: usize) -> u64 {
        self.next() % (size / block as u64) * block as u64
    }

    /// Fills memory with random bytes. The length must be a multiple of eight bytes.
    pub(crate) fn fill(&mut self, block: &mut [u8]) {
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}
