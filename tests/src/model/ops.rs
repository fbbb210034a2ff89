//! Random operations, and how the harness chooses them.
//!
//! The choice favours error-prone cases: offsets near cluster boundaries, half of the operations in one hot region, lengths
//! from one byte to several clusters. The `seed` of a write determines its data, so an operation can be printed in one line,
//! and the data of a read shows which write it comes from.

use std::ops::Range;

use crate::formats::Variant;
use crate::random::Random;

/// One request to a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reads and compares.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Writes the data that [`content`] returns for the seed.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Determines the data.
        seed: u64,
        /// The data must survive a power cut after the write has completed.
        fua: bool,
    },
    /// Writes compressed data (whole clusters).
    WriteCompressed {
        /// First byte, the beginning of a cluster.
        offset: u64,
        /// Bytes: one cluster, or the remainder of the disk.
        len: u64,
        /// Determines the data.
        seed: u64,
    },
    /// Writes zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether the space may be deallocated.
        unmap: bool,
    },
    /// Discards the range: each byte becomes zero or stays the same.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Queries which parts are data and which are zeroes. A range that is reported as zero must read as zeroes.
    Status {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A flush: after its completion, the data of all operations that had completed before the flush was issued survives a
    /// power cut.
    Flush,
}

impl Op {
    /// The range of the operation (empty for a flush).
    pub fn range(&self) -> Range<u64> {
        match *self {
            Op::Read { offset, len }
            | Op::Write { offset, len, .. }
            | Op::WriteCompressed { offset, len, .. }
            | Op::WriteZeroes { offset, len, .. }
            | Op::Discard { offset, len }
            | Op::Status { offset, len } => offset..offset + len,
            Op::Flush => 0..0,
        }
    }

    /// Whether the operation changes the disk's content.
    pub fn changes(&self) -> bool {
        matches!(
            self,
            Op::Write { .. }
                | Op::WriteCompressed { .. }
                | Op::WriteZeroes { .. }
                | Op::Discard { .. }
        )
    }

    /// Whether the outcome of both operations is independent of their order.
    pub fn commutes_with(&self, other: &Op) -> bool {
        let (a, b) = (self.range(), other.range());
        !(self.changes() || other.changes()) || a.end <= b.start || b.end <= a.start
    }
}

/// The largest length of most data requests, in bytes.
const SMALL_DATA: u64 = 256 << 10;

/// Properties of the disk that limit the choice of operations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Size of the disk, in bytes.
    pub size: u64,
    /// The format's unit of allocation, in bytes. Offsets are chosen near its multiples.
    pub cluster: u64,
    /// The alignment of every offset and length.
    pub alignment: u64,
    /// Whether the format supports compression.
    pub compress: bool,
    /// The largest length of a request, in bytes.
    pub longest: u64,
}

impl Shape {
    /// The shape of a disk of this variant and size, for requests of any alignment.
    pub fn of(variant: &Variant, size: u64) -> Self {
        let longest = (variant.cluster * 6).clamp(64 << 10, 8 << 20).min(size);
        Self { size, cluster: variant.cluster, alignment: 1, compress: variant.compress, longest }
    }

    fn random_range(&self, random: &mut Random) -> Range<u64> {
        // Half of all requests access a hot sixteenth of the disk.
        let region =
            if random.one_in(2) { (self.size / 16).max(self.cluster * 4) } else { self.size };
        let region = region.min(self.size);
        let mut start = match random.below(4) {
            0 => random.below(region),
            1 => random.below(region) / self.cluster * self.cluster,
            2 => {
                let boundary = random.below(region) / self.cluster * self.cluster;
                boundary.saturating_sub(random.below(1024))
            }
            _ => random.below(region) / 512 * 512,
        };
        let len = match random.below(8) {
            0 => random.within(1, 511),
            1 => 512,
            2 | 3 => random.within(1, 16) * 512,
            4 => self.cluster,
            5 => self.cluster * random.within(1, 4),
            6 => random.within(1, self.cluster * 2),
            _ => random.within(1, self.longest),
        };
        start -= start % self.alignment;
        let end = (start + len.min(self.longest)).next_multiple_of(self.alignment).min(self.size);
        start..end
    }

    /// Chooses one operation.
    pub fn random_op(&self, random: &mut Random) -> Op {
        let Range { start: offset, end } = self.random_range(random);
        let len = end - offset;
        // The cost of data grows with its length, so most data requests are short even if clusters are large.
        let dear = len > SMALL_DATA && !random.one_in(8);
        let data =
            if dear { random.within(1, SMALL_DATA / self.alignment) * self.alignment } else { len };
        let compress = self.compress && (self.cluster <= SMALL_DATA || random.one_in(4));
        match random.below(100) {
            0..30 => Op::Read { offset, len: data },
            30..62 => {
                Op::Write { offset, len: data, seed: random.next_u64(), fua: random.one_in(16) }
            }
            62..76 => Op::WriteZeroes { offset, len, unmap: random.one_in(2) },
            76..86 => Op::Discard { offset, len },
            86..90 if compress => self.compressed(offset, random),
            86..94 => Op::Status { offset, len },
            94..97 => Op::Flush,
            _ => Op::Read { offset: 0, len: self.size.min(self.longest) },
        }
    }

    fn compressed(&self, offset: u64, random: &mut Random) -> Op {
        let offset = offset / self.cluster * self.cluster;
        let len = self.cluster.min(self.size - offset);
        Op::WriteCompressed { offset, len, seed: random.next_u64() }
    }

    /// Chooses operations that may run concurrently: at least one, at most `most`.
    pub fn random_batch(&self, random: &mut Random, most: u64) -> Vec<Op> {
        let wanted = random.within(1, most);
        let mut batch: Vec<Op> = Vec::new();
        for _ in 0..wanted {
            let op = self.random_op(random);
            if batch.iter().all(|other| op.commutes_with(other)) {
                batch.push(op);
            }
        }
        batch
    }
}

/// Returns the data that a write with this seed writes at `offset`. Each sector contains the seed and the sector number, so
/// that misplaced sectors are visible, and a part of a write has the same bytes as in the full write. One seed of four gives
/// data that compresses well, and one seed of sixteen gives only zeroes.
pub fn content(seed: u64, offset: u64, len: u64) -> Vec<u8> {
    let len = usize::try_from(len).expect("a request fits in memory");
    let mut bytes = vec![0; len];
    if seed.is_multiple_of(16) {
        return bytes;
    }
    let mut at = 0;
    while at < len {
        let position = offset + at as u64;
        let sector = position / 512;
        let skip = usize::try_from(position % 512).expect("below 512");
        let take = (512 - skip).min(len - at);
        let mut block = [0; 512];
        let mut random = Random::new(seed ^ sector.wrapping_mul(0x2545_f491_4f6c_dd1d));
        if seed.is_multiple_of(4) {
            random.fill(&mut block[..16]);
        } else {
            random.fill(&mut block);
        }
        bytes[at..at + take].copy_from_slice(&block[skip..skip + take]);
        at += take;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(alignment: u64) -> Shape {
        Shape { size: 1 << 20, cluster: 4096, alignment, compress: true, longest: 128 << 10 }
    }

    #[test]
    fn operations_stay_inside_the_disk_and_keep_the_alignment() {
        for alignment in [1, 512] {
            let mut random = Random::new(5);
            for _ in 0..20_000 {
                let op = shape(alignment).random_op(&mut random);
                let range = op.range();
                assert!(range.end <= 1 << 20, "{op:?}");
                assert!(op == Op::Flush || range.start < range.end, "{op:?}");
                assert_eq!(range.start % alignment, 0, "{op:?}");
                assert_eq!(range.end % alignment, 0, "{op:?}");
            }
        }
    }

    #[test]
    fn operations_of_one_batch_share_a_byte_only_if_both_read_it() {
        let mut random = Random::new(6);
        for _ in 0..500 {
            let batch = shape(1).random_batch(&mut random, 8);
            assert!(!batch.is_empty());
            for (index, op) in batch.iter().enumerate() {
                assert!(batch[..index].iter().all(|other| op.commutes_with(other)));
            }
        }
    }

    #[test]
    fn a_part_of_a_write_has_the_same_bytes_as_in_the_full_write() {
        for seed in [0, 4, 7] {
            let whole = content(seed, 1000, 5000);
            assert_eq!(content(seed, 1700, 300), whole[700..1000]);
        }
    }
}
