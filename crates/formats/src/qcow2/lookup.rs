//! Mapping guest offsets to extents with the L2 tables.
//!
//! [`Qcow2::lookup`] answers from the cache alone, without a lock. [`Qcow2::extent`] loads missing slices.
//!
//! An extended L2 entry has two words. A reader that combines an old word with a new one would get a wrong answer: data where
//! none was written, or the backing file instead of a compressed cluster. So writers change both words under
//! [`Pinned::begin_change`]. A lookup that overlaps a change has no answer and is repeated. The copies of slices for the disk
//! are made in the same way.

use std::sync::atomic::{AtomicU64, Ordering::Acquire};

use oxblk_core::{ChildIdx, Error, Result};
use oxblk_ring::IoBufMut;
use oxblk_ring::perturb::point;

use super::Qcow2;
use super::cache::Pinned;
use super::layout::{L1Entry, L2Entry, L2Kind};

/// The kind of the first `len` bytes of a range of the guest disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// Data at `host` in the file. `owned`: only this image's active state refers to it.
    Data { host: u64, len: u64, owned: bool },
    /// Reads as zeroes. `host`: the place in its preallocated cluster, if any. `owned`: only this image's active state refers
    /// to that cluster.
    Zero { len: u64, host: Option<u64>, owned: bool },
    /// Reads as the backing file does. `host`: the place that is preallocated for its data.
    Unallocated { len: u64, host: Option<u64> },
    /// Part of one compressed cluster, which is stored in `stored` bytes from `host` on.
    Compressed { host: u64, stored: u64, len: u64 },
}

impl Extent {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Data { len, .. }
            | Self::Zero { len, .. }
            | Self::Unallocated { len, .. }
            | Self::Compressed { len, .. } => *len,
        }
    }
}

/// After this many failed lookups the thread yields to other threads.
const PATIENCE: u32 = 64;

/// The zero flag in an L2 entry of one word.
const ZERO: u64 = 1;

/// A number as QEMU's tools print it in hexadecimal: zero has no prefix.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

/// Why the cache alone has no answer.
pub(super) enum Miss {
    /// The slice is not cached, or is being changed.
    Absent,
    /// This entry is invalid.
    Bad(u64),
}

impl Qcow2 {
    /// The number of the slice with the L2 entry of a guest offset, and the index of the entry's first word in that slice.
    pub(super) fn slice_of(&self, offset: u64) -> (u64, usize) {
        let words = self.geometry.l2_entry_words();
        let word = (offset >> self.geometry.cluster_bits).wrapping_mul(words);
        let within = word & (self.slice_words - 1);
        (word / self.slice_words, usize::try_from(within).unwrap_or(0))
    }

    /// Index of the L1 entry of a guest offset.
    pub(super) fn l1_index(&self, offset: u64) -> u64 {
        offset >> (self.geometry.cluster_bits + self.geometry.l2_bits())
    }

    pub(super) fn l1_entry(&self, index: u64) -> L1Entry {
        L1Entry(self.l1.get(index).map_or(0, |entry| entry.load(Acquire)))
    }

    /// Looks up the start of `offset..offset + len` (`len` > 0) in the cache. Takes no lock.
    pub(super) fn lookup(&self, offset: u64, len: u64) -> Result<Extent, Miss> {
        let (slice, index) = self.slice_of(offset);
        match self.l2.peek(slice, |words| self.scan(words, index, offset, len)) {
            Some(found) => found,
            None if self.l1_entry(self.l1_index(offset)).0 == 0 => {
                let reach = self.geometry.cluster_size() << self.geometry.l2_bits();
                Ok(Extent::Unallocated { len: len.min(reach - offset % reach), host: None })
            }
            None => Err(Miss::Absent),
        }
    }

    fn kind(&self, words: &[AtomicU64], index: usize) -> Option<Result<(L2Kind, bool), Miss>> {
        let entry = L2Entry(words.get(index)?.load(Acquire));
        Some(match entry.kind(self.geometry, self.version) {
            Ok(kind) => Ok((kind, entry.copied())),
            Err(_) => Err(Miss::Bad(entry.0)),
        })
    }

    /// The extent that starts at word `index`. The end of the slice and the end of the range limit it.
    fn scan(
        &self,
        words: &[AtomicU64],
        index: usize,
        offset: u64,
        len: u64,
    ) -> Result<Extent, Miss> {
        if self.geometry.extended_l2 {
            return self.scan_subclusters(words, index, offset, len);
        }
        let size = self.geometry.cluster_size();
        let within = self.geometry.offset_in_cluster(offset);
        let first = self.kind(words, index).unwrap_or(Err(Miss::Absent))?;
        if self.is_misplaced(offset, first.0) {
            return Err(Miss::Bad(words.get(index).map_or(0, |word| word.load(Acquire))));
        }
        let mut covered = size - within;
        let mut next = index;
        let mut host_next = match first.0 {
            L2Kind::Data { host } => host.saturating_add(size),
            _ => 0,
        };
        while covered < len {
            next = next.saturating_add(1);
            let Some(Ok((kind, copied))) = self.kind(words, next) else { break };
            let same = match (first.0, kind) {
                (L2Kind::Data { .. }, L2Kind::Data { host }) => {
                    host == host_next && copied == first.1
                }
                (L2Kind::Zero { host: None }, L2Kind::Zero { host: None })
                | (L2Kind::Unallocated, L2Kind::Unallocated) => true,
                _ => false,
            };
            if !same {
                break;
            }
            covered = covered.saturating_add(size);
            host_next = host_next.saturating_add(size);
        }
        let len = covered.min(len);
        Ok(match first.0 {
            L2Kind::Data { host } => {
                Extent::Data { host: host.saturating_add(within), len, owned: first.1 }
            }
            L2Kind::Zero { host } => {
                let host = host.map(|host| host.saturating_add(within));
                Extent::Zero { len, host, owned: first.1 }
            }
            L2Kind::Unallocated => Extent::Unallocated { len, host: None },
            L2Kind::Compressed { host, len: stored } => Extent::Compressed { host, stored, len },
        })
    }

    /// The extent at the start of `offset..offset + len`. Loads the slice if it is not cached.
    pub(super) async fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        match self.extent_or_entry(offset, len).await? {
            Ok(extent) => Ok(extent),
            Err(entry) => Err(self.bad_entry(offset, entry).await),
        }
    }

    /// As [`Self::extent`], for a write to this range.
    pub(super) async fn extent_to_write(&self, offset: u64, len: u64) -> Result<Extent> {
        match self.extent_or_entry(offset, len).await? {
            Ok(extent) => Ok(extent),
            Err(entry) => Err(self.bad_target(offset, entry).await),
        }
    }

    /// As [`Self::extent`]. The inner error is an entry that is invalid.
    async fn extent_or_entry(&self, offset: u64, len: u64) -> Result<Result<Extent, u64>> {
        let mut tries = 0_u32;
        loop {
            match self.lookup(offset, len) {
                Ok(extent) => return Ok(Ok(extent)),
                Err(Miss::Bad(entry)) => return Ok(Err(entry)),
                Err(Miss::Absent) => drop(self.pin_slice(offset).await?),
            }
            tries = tries.saturating_add(1);
            if tries.is_multiple_of(PATIENCE) {
                std::thread::yield_now();
            }
        }
    }

    /// The host offset of an entry if it is invalid because this offset is not aligned.
    fn unaligned_host(&self, entry: L2Entry) -> Option<u64> {
        let host = entry.raw_offset();
        (!entry.is_compressed() && !self.geometry.is_aligned(host)).then_some(host)
    }

    /// Handles an invalid entry with the text of QEMU's tools.
    pub(super) async fn bad_entry(&self, offset: u64, entry: u64) -> Error {
        let text = if let Some(host) = self.unaligned_host(L2Entry(entry)) {
            let table = self.l1_entry(self.l1_index(offset)).raw_offset();
            let index = self.geometry.cluster_index(offset) & (self.geometry.l2_entries() - 1);
            format!(
                "Cluster allocation offset {} unaligned (L2 offset: {}, L2 index: {})",
                hex(host),
                hex(table),
                hex(index)
            )
        } else {
            format!("L2 entry {entry:#x} of guest offset {offset:#x} is invalid")
        };
        self.mark_corrupt(&text, offset).await
    }

    /// As [`Self::bad_entry`], for a write to the guest offset `offset`.
    async fn bad_target(&self, offset: u64, entry: u64) -> Error {
        let entry = L2Entry(entry);
        let Some(host) = self.unaligned_host(entry).filter(|_| entry.copied()) else {
            return self.bad_entry(offset, entry.0).await;
        };
        let is_zero = !self.geometry.extended_l2 && entry.0 & ZERO != 0;
        let what = if is_zero { "Preallocated zero" } else { "Data" };
        let (host, guest) = (hex(host), hex(offset));
        let text = format!("{what} cluster offset {host} unaligned (guest offset: {guest})");
        self.mark_corrupt(&text, offset).await
    }

    /// Pins the slice of a guest offset; `None` if its L2 table does not exist.
    pub(super) async fn pin_slice(&self, offset: u64) -> Result<Option<Pinned<'_>>> {
        let (slice, _) = self.slice_of(offset);
        loop {
            if let Some(pinned) = self.l2.pin(slice) {
                return Ok(Some(pinned));
            }
            if self.slice_place(slice).await?.is_none() {
                return Ok(None);
            }
            point();
            match self.l2.get(slice, || self.load_slice(slice, offset)).await? {
                Some(pinned) => return Ok(Some(pinned)),
                // Every slice is dirty or pinned. A write-back makes slices clean.
                None => self.write_back(false).await?,
            }
        }
    }

    /// Reads a slice from the file. The caller prevents other tasks from loading it concurrently.
    ///
    /// The table's offset is looked up only here, because no task can change the entries of a slice while it is being loaded.
    /// An offset from an earlier lookup may be stale: it may belong to a table that is shared with a snapshot. Meanwhile the
    /// image may have copied that table, changed the copy and dropped it from the cache.
    async fn load_slice(&self, slice: u64, offset: u64) -> Result<IoBufMut> {
        let place = self.slice_place(slice).await?;
        let place = place.ok_or_else(|| Error::corrupt("the L2 table is gone").at(offset))?;
        point();
        let len = usize::try_from(self.slice_words.saturating_mul(8)).unwrap_or(0);
        let bytes = self.children.require(ChildIdx::FILE)?.read(place, IoBufMut::new(len)).await?;
        self.check_slice(&bytes).await?;
        Ok(bytes)
    }

    /// Host offset of a slice; `None` if its L2 table does not exist.
    pub(super) async fn slice_place(&self, slice: u64) -> Result<Option<u64>> {
        let per_table = self.geometry.cluster_size() / 8 / self.slice_words;
        let index = slice / per_table;
        match self.l1_entry(index).l2_offset(self.geometry) {
            Ok(table) => Ok(table.map(|table| {
                let within = (slice % per_table).saturating_mul(self.slice_words).saturating_mul(8);
                table.saturating_add(within)
            })),
            Err(_) => {
                let entry = self.l1_entry(index).raw_offset();
                let text = format!("L2 table offset {entry:#x} unaligned (L1 index: {index:#x})");
                Err(self.mark_corrupt(&text, entry).await)
            }
        }
    }

    /// Refuses a slice whose entries map guest clusters to clusters that hold metadata. In a writable image, a write in place
    /// would overwrite the metadata. So such a slice is never cached.
    async fn check_slice(&self, bytes: &[u8]) -> Result<()> {
        if self.is_read_only() || self.geometry.data_file {
            return Ok(());
        }
        let words = usize::try_from(self.geometry.l2_entry_words()).unwrap_or(1);
        for word in bytes.chunks_exact(8).step_by(words) {
            let entry = L2Entry(word.try_into().map_or(0, u64::from_be_bytes));
            if let Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) =
                entry.kind(self.geometry, self.version)
                && self.is_protected(host, self.geometry.cluster_size())
            {
                let what = self.overlapped(host, self.geometry.cluster_size());
                let text = format!("Preventing invalid write on metadata (overlaps with {what})");
                return Err(self.mark_corrupt(&text, host).await);
            }
        }
        Ok(())
    }
}
