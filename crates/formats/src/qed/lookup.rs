//! Mapping of disk offsets to extents with the L2 tables.
//!
//! [`Qed::lookup`] uses only the cache and takes no lock. [`Qed::extent`] loads missing slices.
//!
//! The slice cache reads words as big-endian numbers, and the tables of QED are little-endian. So the bytes of the words in
//! a slice are swapped. [`load`] and [`set`] convert the words.

use std::sync::atomic::{AtomicU64, Ordering::Acquire};

use oxblk_core::{DebugEvent, Errno, Error, Result};
use oxblk_ring::IoBufMut;
use oxblk_ring::perturb::point;

use super::Qed;
use super::header::{ENTRY_BYTES, Entry};
use crate::slice_cache::{Change, Pinned};

/// Where the first `len` bytes of a range of the disk are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// The data lies at `host` in the file.
    Data { host: u64, len: u64 },
    /// The range reads as zeroes.
    Zero { len: u64 },
    /// The range is not allocated. It is read from the backing file, or as zeroes without a backing file.
    Unallocated { len: u64 },
}

impl Extent {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Data { len, .. } | Self::Zero { len } | Self::Unallocated { len } => *len,
        }
    }
}

/// Each time that a lookup has failed this many times, the thread yields to other threads.
const TRIES_BEFORE_YIELD: u32 = 64;

/// The reason why a lookup in the cache failed.
pub(super) enum Miss {
    /// The slice is not in the cache.
    Absent,
    /// The L2 entry has this invalid value.
    Bad(u64),
}

/// The value of an entry.
pub(super) fn load(word: &AtomicU64) -> u64 {
    word.load(Acquire).swap_bytes()
}

/// Changes an entry. A thread that reads the new value also sees all writes to memory before this call.
pub(super) fn set(change: &mut Change<'_>, index: usize, entry: u64) {
    change.replace(index, entry.swap_bytes());
}

impl Qed {
    /// The number of the slice with the L2 entry of a disk offset, and the index of the entry in that slice.
    pub(super) fn slice_of(&self, offset: u64) -> (u64, usize) {
        let cluster = self.geometry.index(offset);
        let within = usize::try_from(cluster & (self.slice_words - 1)).unwrap_or(0);
        (cluster / self.slice_words, within)
    }

    /// Bytes of the disk that a slice maps.
    pub(super) fn slice_reach(&self) -> u64 {
        self.slice_words << self.geometry.cluster_bits
    }

    /// Index of the L1 entry of a disk offset.
    pub(super) fn l1_index(&self, offset: u64) -> u64 {
        offset / self.geometry.table_reach()
    }

    pub(super) fn l1_entry(&self, index: u64) -> u64 {
        self.l1.get(index).map_or(0, |entry| entry.load(Acquire))
    }

    fn data_entry(&self, entry: u64) -> Entry {
        super::header::data_entry(self.geometry, self.first_cluster, entry, self.entry_end())
    }

    /// The limit for offsets in entries. An entry that refers to this offset or a higher one is invalid, because the file
    /// ends there or because the cluster number does not fit in 32 bits.
    pub(super) fn entry_end(&self) -> u64 {
        self.file_end.load(Acquire).min(u64::from(u32::MAX) << self.geometry.cluster_bits)
    }

    /// Byte offset of an L2 table. `None` if the table does not exist.
    ///
    /// # Errors
    /// `Corrupt` if the L1 entry is invalid.
    pub(super) fn table_offset(&self, index: u64) -> Result<Option<u64>> {
        let entry = self.l1_entry(index);
        let end = self.entry_end();
        match super::header::table_entry(self.geometry, self.first_cluster, entry, end) {
            Entry::Unallocated => Ok(None),
            Entry::At(offset) => Ok(Some(offset)),
            Entry::Zero | Entry::Bad => {
                let text = format!("L2 table offset {entry:#x} is invalid (L1 index: {index})");
                Err(Error::corrupt(text).errno(Errno::INVAL))
            }
        }
    }

    /// Looks up the start of `offset..offset + len` (`len` > 0) in the cache. Takes no lock.
    pub(super) fn lookup(&self, offset: u64, len: u64) -> Result<Extent, Miss> {
        let (slice, index) = self.slice_of(offset);
        match self.l2.peek(slice, |words| self.scan(words, index, offset, len)) {
            Some(found) => found,
            None if self.l1_entry(self.l1_index(offset)) == 0 => {
                let reach = self.geometry.table_reach();
                Ok(Extent::Unallocated { len: len.min(reach - offset % reach) })
            }
            None => Err(Miss::Absent),
        }
    }

    /// The extent that starts at word `index`. The extent does not extend past the end of the slice or of the range.
    fn scan(
        &self,
        words: &[AtomicU64],
        index: usize,
        offset: u64,
        len: u64,
    ) -> Result<Extent, Miss> {
        let mut entries = words.iter().skip(index).map(load);
        let entry = entries.next().ok_or(Miss::Absent)?;
        let first = self.data_entry(entry);
        let size = self.geometry.cluster();
        let within = self.geometry.within(offset);
        let mut covered = size - within;
        let mut next_host = match first {
            Entry::At(host) => host.saturating_add(size),
            Entry::Bad => return Err(Miss::Bad(entry)),
            Entry::Zero | Entry::Unallocated => 0,
        };
        while covered < len {
            let Some(next) = entries.next().map(|entry| self.data_entry(entry)) else { break };
            let continues = match (first, next) {
                (Entry::At(_), Entry::At(host)) => host == next_host,
                (first, next) => first == next,
            };
            if !continues {
                break;
            }
            covered = covered.saturating_add(size);
            next_host = next_host.saturating_add(size);
        }
        let len = covered.min(len);
        Ok(match first {
            Entry::At(host) => Extent::Data { host: host.saturating_add(within), len },
            Entry::Zero => Extent::Zero { len },
            Entry::Unallocated | Entry::Bad => Extent::Unallocated { len },
        })
    }

    /// The extent at the start of `offset..offset + len`. Loads the slice if it is not cached.
    ///
    /// # Errors
    /// `Corrupt` if an L1 or L2 entry is invalid, and the errors of requests to the image file.
    pub(super) async fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        let mut tries = 0_u32;
        loop {
            match self.lookup(offset, len) {
                Ok(extent) => return Ok(extent),
                Err(Miss::Bad(entry)) => {
                    let text = format!("L2 entry {entry:#x} of offset {offset:#x} is invalid");
                    return Err(Error::corrupt(text).errno(Errno::INVAL));
                }
                Err(Miss::Absent) => drop(self.pin_slice(offset).await?),
            }
            tries = tries.saturating_add(1);
            if tries.is_multiple_of(TRIES_BEFORE_YIELD) {
                std::thread::yield_now();
            }
        }
    }

    /// Pins the slice that maps a disk offset. Loads the slice if it is not cached. Returns `None` if its L2 table does not
    /// exist.
    pub(super) async fn pin_slice(&self, offset: u64) -> Result<Option<Pinned<'_>>> {
        let (slice, _) = self.slice_of(offset);
        loop {
            if let Some(pinned) = self.l2.pin(slice) {
                return Ok(Some(pinned));
            }
            if self.slice_place(slice)?.is_none() {
                return Ok(None);
            }
            point();
            match self.l2.get(slice, || self.load_slice(slice)).await? {
                Some(pinned) => return Ok(Some(pinned)),
                // Every slice in the cache is dirty or pinned. A write-back makes dirty slices clean.
                None => self.write_back(false).await?,
            }
        }
    }

    async fn load_slice(&self, slice: u64) -> Result<IoBufMut> {
        let place = self
            .slice_place(slice)?
            .ok_or_else(|| Error::corrupt("an L2 table no longer exists"))?;
        let bytes = self.slice_words.saturating_mul(ENTRY_BYTES);
        let buf = IoBufMut::new(usize::try_from(bytes).unwrap_or(0));
        let file = self.file()?;
        file.debug_event(DebugEvent::L2Load).await;
        let read = file.read(place, buf).await;
        read.map_err(|error| error.prefix("Could not read an L2 table"))
    }

    /// Byte offset of a slice. `None` if its L2 table does not exist.
    pub(super) fn slice_place(&self, slice: u64) -> Result<Option<u64>> {
        let per_table = self.geometry.table_entries() / self.slice_words;
        let table = self.table_offset(slice / per_table)?;
        let within = (slice % per_table).saturating_mul(self.slice_words);
        let within = within.saturating_mul(ENTRY_BYTES);
        Ok(table.map(|table| table.saturating_add(within)))
    }
}
