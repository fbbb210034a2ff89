//! [`Cursor`]: a disk as a stream of bytes, for code that uses [`std::io`].

use std::io::{self, Read, Seek, SeekFrom, Write};

use oxblk_core::Error;
use oxblk_ring::{IoBuf, IoBufMut};

use super::Disk;

/// Longest single read or write, in bytes.
const PIECE: usize = 1 << 20;

/// A disk with a position, which implements [`std::io::Read`], [`Write`] and [`Seek`]. Reads, writes and flushes block
/// the calling thread, so they fail on I/O threads.
///
/// At the end of the disk, a read returns 0 bytes, and a write writes 0 bytes, so `write_all` fails with `WriteZero`.
/// [`Write::flush`] flushes the disk.
#[derive(Debug, Clone)]
pub struct Cursor {
    disk: Disk,
    position: u64,
}

impl Cursor {
    pub(super) fn new(disk: Disk) -> Self {
        Self { disk, position: 0 }
    }

    /// The length of the next transfer: at most `wanted` bytes, not past the end of the disk, and at most [`PIECE`].
    fn room(&self, wanted: usize) -> usize {
        let left = self.disk.size().saturating_sub(self.position);
        usize::try_from(left).unwrap_or(usize::MAX).min(wanted).min(PIECE)
    }

    fn advance(&mut self, by: usize) {
        self.position = self.position.saturating_add(u64::try_from(by).unwrap_or(u64::MAX));
    }
}

fn to_io(error: Error) -> io::Error {
    io::Error::new(io::Error::from_raw_os_error(error.raw_errno()).kind(), error)
}

impl Read for Cursor {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.room(buf.len());
        if len == 0 {
            return Ok(0);
        }
        let data = self.disk.read(self.position, len).wait().map_err(to_io)?;
        if let Some(buf) = buf.get_mut(..len) {
            buf.copy_from_slice(&data);
        }
        self.advance(len);
        Ok(len)
    }
}

impl Write for Cursor {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let len = self.room(buf.len());
        let Some(data) = buf.get(..len).filter(|data| !data.is_empty()) else { return Ok(0) };
        let data = IoBuf::from(IoBufMut::copy_from(data));
        self.disk.write(self.position, data).wait().map_err(to_io)?;
        self.advance(len);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush().wait().map_err(to_io)
    }
}

impl Seek for Cursor {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(by) => self.disk.size().checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        let Some(position) = position else { return Err(io::ErrorKind::InvalidInput.into()) };
        self.position = position;
        Ok(position)
    }
}
