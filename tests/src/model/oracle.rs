//! The expected contents of the disk: an array of bytes.
//!
//! A discarded byte may keep its value or become zero. Such a byte is *doubtful* until it is read or written. The first read
//! determines its value.

use super::ops::{Op, content};

/// The expected contents of a disk.
#[derive(Clone, Debug)]
pub struct Oracle {
    bytes: Vec<u8>,
    /// One bit per byte: the byte was discarded, and was not read or written after the discard.
    doubtful: Vec<u64>,
}

/// One extent of a block status reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length in bytes.
    pub len: u64,
    /// The extent reads as zeroes.
    pub zero: bool,
}

fn index(position: u64) -> usize {
    usize::try_from(position).expect("a disk that fits in memory")
}

impl Oracle {
    /// Makes the model of a disk with this content.
    pub fn new(bytes: Vec<u8>) -> Self {
        let doubtful = vec![0; bytes.len().div_ceil(64)];
        Self { bytes, doubtful }
    }

    /// Makes the model of a disk of zeroes.
    pub fn zeroed(size: u64) -> Self {
        Self::new(vec![0; index(size)])
    }

    /// Returns the content. A doubtful byte has its value from before the discard.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Sets the content at `offset`.
    pub fn set(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        self.bytes[index(offset)..index(end)].copy_from_slice(bytes);
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether the size is zero.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Changes the size. Added bytes are zero.
    pub fn resize(&mut self, size: u64) {
        self.settle(size.min(self.len())..self.len());
        self.bytes.resize(index(size), 0);
        self.doubtful.resize(self.bytes.len().div_ceil(64), 0);
    }

    /// Applies the operation to the model.
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

    /// Whether the byte was discarded, and was not read or written after the discard. Such a byte may be zero.
    pub(super) fn is_doubtful(&self, position: u64) -> bool {
        self.doubtful[index(position / 64)] >> (position % 64) & 1 == 1
    }

    /// Checks the data that a read at `offset` returned. The values of doubtful bytes are taken from this data.
    ///
    /// # Errors
    /// A text with the position of the first wrong byte.
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

    /// Checks a block status reply for `offset`. Bytes that are reported as zero must be zero or doubtful.
    ///
    /// # Errors
    /// A text with the position of the first byte that is reported as zero and is not zero.
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
                        "status reports {} bytes at {position} as zero, but byte {wrong} is {byte:#04x}",
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
    fn a_read_must_return_the_written_data() {
        let mut oracle = Oracle::zeroed(4096);
        oracle.apply(&Op::Write { offset: 100, len: 50, seed: 3, fua: false });
        let mut bytes = content(3, 100, 50);
        assert_eq!(oracle.check_read(100, &bytes), Ok(()));
        bytes[10] ^= 1;
        let error = oracle.check_read(100, &bytes).expect_err("a wrong byte");
        assert!(error.contains("byte 110 "), "{error}");
    }

    #[test]
    fn a_discarded_byte_is_zero_or_unchanged_until_it_is_read() {
        let mut oracle = Oracle::new(vec![7; 256]);
        oracle.apply(&Op::Discard { offset: 0, len: 256 });
        let mut half = vec![7; 256];
        half[128..].fill(0);
        assert_eq!(oracle.check_read(0, &half), Ok(()));
        assert!(oracle.check_read(0, &[0; 256]).is_err(), "the first read has settled the byte");
        assert_eq!(oracle.check_read(0, &half), Ok(()));
    }

    #[test]
    fn a_discarded_byte_is_zero_or_has_its_old_value() {
        let mut oracle = Oracle::new(vec![7; 256]);
        oracle.apply(&Op::Discard { offset: 0, len: 256 });
        assert!(oracle.check_read(0, &[9; 256]).is_err());
    }

    #[test]
    fn a_write_settles_a_discarded_byte() {
        let mut oracle = Oracle::new(vec![7; 256]);
        oracle.apply(&Op::Discard { offset: 0, len: 256 });
        oracle.apply(&Op::Write { offset: 0, len: 200, seed: 5, fua: false });
        assert!(oracle.check_read(0, &[0; 200]).is_err());
    }

    #[test]
    fn a_status_that_reports_data_as_zero_is_an_error() {
        let mut oracle = Oracle::zeroed(1024);
        oracle.apply(&Op::Write { offset: 512, len: 512, seed: 3, fua: false });
        let extent = |len, zero| StatusExtent { len, zero };
        assert_eq!(oracle.check_status(0, &[extent(512, true), extent(512, false)]), Ok(()));
        assert!(oracle.check_status(0, &[extent(1024, true)]).is_err());
    }
}
