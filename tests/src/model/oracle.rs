//! The disk as it ought to be: an array of bytes.
//!
//! A discarded byte may stay or become zero; it is *doubtful* until it is read or written, and what
//! the first read says then holds.

use super::ops::{Op, content};

/// What the disk must contain.
#[derive(Clone, Debug)]
pub struct Oracle {
    bytes: Vec<u8>,
    /// One bit per byte: discarded, and not read or written since.
    doubtful: Vec<u64>,
}

/// One extent of a block status reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes.
    pub len: u64,
    /// Reads as zeroes.
    pub zero: bool,
}

fn index(position: u64) -> usize {
    usize::try_from(position).expect("a disk that fits in memory")
}

impl Oracle {
    /// A disk with this content.
    pub fn new(bytes: Vec<u8>) -> Self {
        let doubtful = vec![0; bytes.len().div_ceil(64)];
        Self { bytes, doubtful }
    }

    /// A disk of zeroes.
    pub fn zeroed(size: u64) -> Self {
        Self::new(vec![0; index(size)])
    }

    /// The content, doubtful bytes as they were before they were discarded.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The content at `offset` is this, whatever it was.
    pub fn set(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        self.bytes[index(offset)..index(end)].copy_from_slice(bytes);
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether the disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Changes the size; what is added is zero.
    pub fn resize(&mut self, size: u64) {
        self.settle(size.min(self.len())..self.len());
        self.bytes.resize(index(size), 0);
        self.doubtful.resize(self.bytes.len().div_ceil(64), 0);
    }

    /// Does to the model what the operation does to the disk.
    pub fn apply(&mut self, op: &Op) {
        let range = op.range();
        let slots = index(range.start)..index(range.end);
        match *op {
            Op::Read { .. } | Op::Status { .. } | Op::Flush => {}
            Op::Write { offset, len, seed, .. } | Op::WriteCompressed { offset, len, seed } => {
                self.bytes[slots].copy_from_slice(&content(seed, offset, len));
                self.settle(range);
            }
            Op::WriteZeroes { .. } => {
                self.bytes[slots].fill(0);
                self.settle(range);
            }
            Op::Discard { .. } => self.doubt(range),
        }
    }

    fn doubt(&mut self, range: std::ops::Range<u64>) {
        for position in range {
            self.doubtful[index(position / 64)] |= 1 << (position % 64);
        }
    }

    fn settle(&mut self, range: std::ops::Range<u64>) {
        let mut position = range.start;
        while position < range.end {
            if position.is_multiple_of(64) && range.end - position >= 64 {
                self.doubtful[index(position / 64)] = 0;
                position += 64;
            } else {
                self.doubtful[index(position / 64)] &= !(1 << (position % 64));
                position += 1;
            }
        }
    }

    fn is_doubtful(&self, position: u64) -> bool {
        self.doubtful[index(position / 64)] >> (position % 64) & 1 == 1
    }

    /// Checks what the disk returned at `offset`, and learns what became of discarded bytes.
    ///
    /// # Errors
    /// Tells the first wrong byte.
    pub fn check_read(&mut self, offset: u64, got: &[u8]) -> Result<(), String> {
        let end = offset + got.len() as u64;
        let slots = index(offset)..index(end);
        if self.bytes[slots.clone()] != *got {
            for (position, &byte) in (offset..).zip(got) {
                let expected = self.bytes[index(position)];
                if byte != expected && !(byte == 0 && self.is_doubtful(position)) {
                    return Err(self.describe(position, expected, byte, offset, got));
                }
            }
            self.bytes[slots].copy_from_slice(got);
        }
        self.settle(offset..end);
        Ok(())
    }

    fn describe(&self, position: u64, expected: u8, byte: u8, offset: u64, got: &[u8]) -> String {
        let from = index(position - offset);
        let wrong = self.bytes[index(position)..]
            .iter()
            .zip(&got[from..])
            .take_while(|(expected, got)| expected != got)
            .count();
        let zeroes = got[from..].iter().take_while(|byte| **byte == 0).count();
        format!(
            "read of {} bytes at {offset}: byte {position} ({position:#x}) is {byte:#04x}, expected \
             {expected:#04x}; {wrong} wrong bytes in a row, {zeroes} of them and what follows zero",
            got.len()
        )
    }

    /// Checks a block status reply for `offset`: what is said to be zero must be, or may have become so.
    ///
    /// # Errors
    /// Tells the first byte that is not zero though it was said to be.
    pub fn check_status(&self, offset: u64, extents: &[StatusExtent]) -> Result<(), String> {
        let mut position = offset;
        for extent in extents {
            let end = (position + extent.len).min(self.len());
            if extent.zero {
                let slots = &self.bytes[index(position)..index(end)];
                let wrong = (position..)
                    .zip(slots)
                    .find(|(position, byte)| **byte != 0 && !self.is_doubtful(*position));
                if let Some((wrong, byte)) = wrong {
                    return Err(format!(
                        "status says that {} bytes at {position} are zero, but byte {wrong} is {byte:#04x}",
                        extent.len
                    ));
                }
            }
            position = end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_of_what_was_written_is_right_and_of_anything_else_wrong() {
        let mut oracle = Oracle::zeroed(4096);
        oracle.apply(&Op::Write { offset: 100, len: 50, seed: 3, fua: false });
        let mut bytes = content(3, 100, 50);
        assert_eq!(oracle.check_read(100, &bytes), Ok(()));
        bytes[10] ^= 1;
        let error = oracle.check_read(100, &bytes).expect_err("a wrong byte");
        assert!(error.contains("byte 110 "), "{error}");
    }

    #[test]
    fn a_discarded_byte_is_either_value_until_it_is_read() {
        let mut oracle = Oracle::new(vec![7; 256]);
        oracle.apply(&Op::Discard { offset: 0, len: 256 });
        let mut half = vec![7; 256];
        half[128..].fill(0);
        assert_eq!(oracle.check_read(0, &half), Ok(()));
        assert!(oracle.check_read(0, &[0; 256]).is_err(), "what a read said holds");
        assert_eq!(oracle.check_read(0, &half), Ok(()));
    }

    #[test]
    fn a_discarded_byte_is_never_a_third_value() {
        let mut oracle = Oracle::new(vec![7; 256]);
        oracle.apply(&Op::Discard { offset: 0, len: 256 });
        assert!(oracle.check_read(0, &[9; 256]).is_err());
    }

    #[test]
    fn writing_settles_what_discard_left_open() {
        let mut oracle = Oracle::new(vec![7; 256]);
        oracle.apply(&Op::Discard { offset: 0, len: 256 });
        oracle.apply(&Op::Write { offset: 0, len: 200, seed: 5, fua: false });
        assert!(oracle.check_read(0, &[0; 200]).is_err());
    }

    #[test]
    fn a_status_that_calls_data_zero_is_wrong() {
        let mut oracle = Oracle::zeroed(1024);
        oracle.apply(&Op::Write { offset: 512, len: 512, seed: 3, fua: false });
        let extent = |len, zero| StatusExtent { len, zero };
        assert_eq!(oracle.check_status(0, &[extent(512, true), extent(512, false)]), Ok(()));
        assert!(oracle.check_status(0, &[extent(1024, true)]).is_err());
    }
}
