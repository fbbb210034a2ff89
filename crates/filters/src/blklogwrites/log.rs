//! Appends entries to the log.
//!
//! The superblock counts only entries that are completely in the log. It is written with every flush, after a number of entries,
//! and when the node is closed.

use oxblk_core::{Edge, Errno, Error, Result, WriteFlags, ZeroFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::format::{Entry, HEADER, Superblock};

/// The data of an entry.
pub(super) enum Payload {
    None,
    Zeroes,
    Data(IoBuf),
}

/// The end of the log.
#[derive(Debug)]
pub(super) struct Log {
    sector_size: u32,
    /// The sector behind the last entry.
    next: u64,
    entries: u64,
    /// The superblock is written after this number of entries.
    interval: u64,
    /// The superblock on disk counts all entries.
    is_counted: bool,
}

impl Log {
    /// A log without entries.
    pub(super) fn new(sector_size: u32, interval: u64) -> Self {
        Self { sector_size, next: 1, entries: 0, interval, is_counted: true }
    }

    /// The end of an existing log.
    ///
    /// # Errors
    /// When the log is not valid or cannot be read.
    pub(super) async fn open(file: &Edge, interval: u64) -> Result<Self> {
        let superblock = file.read(0, IoBufMut::new(HEADER)).await?;
        let superblock = Superblock::decode(&superblock)?;
        let mut log = Self::new(superblock.sector_size, interval);
        while log.entries < superblock.entries {
            let offset = log.offset(log.next)?;
            if offset >= file.size() {
                let entry = log.entries;
                return Err(Error::corrupt(format!("The log ends before entry {entry}")));
            }
            let entry = Entry::decode(&file.read(offset, IoBufMut::new(HEADER)).await?);
            log.advance(entry)?;
        }
        Ok(log)
    }

    /// The size of a sector in bytes.
    pub(super) fn sector_size(&self) -> u32 {
        self.sector_size
    }

    /// Byte offset of a sector of the log.
    fn offset(&self, sector: u64) -> Result<u64> {
        let offset = sector.checked_mul(u64::from(self.sector_size));
        let offset = offset.filter(|offset| i64::try_from(*offset).is_ok());
        offset.ok_or_else(|| Error::from_errno(Errno::FBIG).prefix("The log is too long"))
    }

    fn advance(&mut self, entry: Entry) -> Result<()> {
        let next = self.next.checked_add(1).and_then(|at| at.checked_add(entry.data_sectors()));
        self.next = next.ok_or_else(|| Error::from_errno(Errno::FBIG))?;
        self.entries = self.entries.saturating_add(1);
        Ok(())
    }

    /// Appends the entry of a change of `offset..offset + len`. After an error, the next entry overwrites this entry.
    pub(super) async fn append(
        &mut self,
        file: &Edge,
        (offset, len): (u64, u64),
        flags: u64,
        payload: Payload,
    ) -> Result<()> {
        let size = u64::from(self.sector_size);
        let entry = Entry { sector: offset / size, sectors: len.div_ceil(size), flags };
        let header = self.offset(self.next)?;
        let data = self.offset(self.next.saturating_add(1))?;
        match payload {
            Payload::None => {}
            Payload::Zeroes => file.write_zeroes(data, len, ZeroFlags::empty()).await?,
            Payload::Data(bytes) => file.write(data, bytes, WriteFlags::empty()).await?,
        }
        file.write(header, entry.encode(self.sector_size), WriteFlags::empty()).await?;
        self.advance(entry)?;
        self.is_counted = false;
        if self.entries.is_multiple_of(self.interval) {
            self.count(file).await?;
        }
        Ok(())
    }

    /// Writes the superblock, if it does not count all entries, and flushes the log.
    pub(super) async fn count(&mut self, file: &Edge) -> Result<()> {
        if !self.is_counted {
            let superblock = Superblock { entries: self.entries, sector_size: self.sector_size };
            file.write(0, superblock.encode(), WriteFlags::empty()).await?;
            file.flush().await?;
            self.is_counted = true;
        }
        Ok(())
    }
}
