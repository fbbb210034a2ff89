//! Random operations: what they are and how they are chosen.
//!
//! Offsets and lengths are chosen for trouble: around cluster boundaries, within one hot region as
//! often as anywhere, lengths from one byte to several clusters. The content of a write is made from
//! its `seed`, so that an operation prints in a line and content tells which write it came from.

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
    /// Writes what [`content`] gives for the seed.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Makes the content.
        seed: u64,
        /// Must be durable when it completes.
        fua: bool,
    },
    /// Writes through the compressing path (whole clusters).
    WriteCompressed {
        /// First byte, the beginning of a cluster.
        offset: u64,
        /// Bytes: one cluster, or what is left of the disk.
        len: u64,
        /// Makes the content.
        seed: u64,
    },
    /// Writes zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The space may be given back.
        unmap: bool,
    },
    /// Says that the content is no longer needed: it becomes zero or stays.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Asks which parts are data and zeroes; what is said to be zero must read so.
    Status {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Makes everything that completed before durable.
    Flush,
}

impl Op {
    /// The bytes that it touches (none for a flush).
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

    /// Whether it changes the disk's content.
    pub fn changes(&self) -> bool {
        matches!(
            self,
            Op::Write { .. }
                | Op::WriteCompressed { .. }
                | Op::WriteZeroes { .. }
                | Op::Discard { .. }
        )
    }

    /// Whether the two may run at once and still have one outcome.
    pub fn commutes_with(&self, other: &Op) -> bool {
        let (a, b) = (self.range(), other.range());
        !(self.changes() || other.changes()) || a.end <= b.start || b.end <= a.start
    }
}

/// Most data requests are no longer than this, in bytes.
const SMALL_DATA: u64 = 256 << 10;

/// The disk that operations are made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Size of the disk, in bytes.
    pub size: u64,
    /// The format's unit of allocation, in bytes; offsets are chosen around its multiples.
    pub cluster: u64,
    /// Every offset and length is a multiple of this.
    pub alignment: u64,
    /// Whether the format compresses.
    pub compress: bool,
    /// The most bytes in one request.
    pub longest: u64,
}

impl Shape {
    /// A disk of this variant and size, for requests of any alignment.
    pub fn of(variant: &Variant, size: u64) -> Self {
        let longest = (variant.cluster * 6).clamp(64 << 10, 8 << 20).min(size);
        Self { size, cluster: variant.cluster, alignment: 1, compress: variant.compress, longest }
    }

    fn random_range(&self, random: &mut Random) -> Range<u64> {
        // Half of all requests go to a hot sixteenth of the disk.
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

    /// One operation.
    pub fn random_op(&self, random: &mut Random) -> Op {
        let Range { start: offset, end } = self.random_range(random);
        let len = end - offset;
        // Data costs time by the byte, so most of it comes in small pieces even where clusters are large.
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

    /// Operations that may run at once: up to `most` of them, at least one.
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

/// What a write with this seed writes at `offset`: a stamp of seed and sector in each 512 bytes, so
/// that misplaced sectors show, and so that a part of a write has the same bytes as the whole. One
/// seed in four gives content that compresses well, one in sixteen nothing but zeroes.
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
    fn operations_of_one_batch_touch_no_byte_twice_but_to_read_it() {
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
    fn a_part_of_a_write_has_the_bytes_of_the_whole() {
        for seed in [0, 4, 7] {
            let whole = content(seed, 1000, 5000);
            assert_eq!(content(seed, 1700, 300), whole[700..1000]);
        }
    }
}
