//! Mapping guest offsets to extents with the L2 tables.
//!
//! [`Mapping::lookup`] answers from the cache alone, without a lock. `metadata/slices` loads missing slices.
//!
//! An extended L2 entry has two words. A reader that combines an old word with a new one would get a wrong answer: data where
//! none was written, or the backing file instead of a compressed cluster. So writers change both words under
//! `Pinned::begin_change`. A lookup that overlaps a change has no answer and is repeated. The copies of slices for the disk
//! are made in the same way.

use std::sync::atomic::{AtomicU64, Ordering::Acquire};

use oxblk_core::{Error, Result};

use super::Mapping;
use crate::qcow2::layout::{L2Entry, L2Kind};

/// The kind of the first `len` bytes of a range of the guest disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) enum Extent {
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
    pub(in crate::qcow2) fn len(&self) -> u64 {
        match self {
            Self::Data { len, .. }
            | Self::Zero { len, .. }
            | Self::Unallocated { len, .. }
            | Self::Compressed { len, .. } => *len,
        }
    }
}

/// The zero flag in an L2 entry of one word.
const ZERO: u64 = 1;

/// A number as QEMU's tools print it in hexadecimal: zero has no prefix.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

/// Why the cache alone has no answer.
pub(in crate::qcow2) enum Miss {
    /// The slice is not cached, or is being changed.
    Absent,
    /// This entry is invalid.
    Bad(u64),
}

impl Mapping {
    /// Looks up the start of `offset..offset + len` (`len` > 0) in the cache. Takes no lock.
    pub(in crate::qcow2) fn lookup(&self, offset: u64, len: u64) -> Result<Extent, Miss> {
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

    /// The host offset of an entry if it is invalid because this offset is not aligned.
    fn unaligned_host(&self, entry: L2Entry) -> Option<u64> {
        let host = entry.raw_offset();
        (!entry.is_compressed() && !self.geometry.is_aligned(host)).then_some(host)
    }

    /// Handles an invalid entry with the text of QEMU's tools.
    pub(in crate::qcow2) async fn bad_entry(&self, offset: u64, entry: u64) -> Error {
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
        self.facts.mark_corrupt(&text, offset).await
    }

    /// As [`Self::bad_entry`], for a write to the guest offset `offset`.
    pub(in crate::qcow2) async fn bad_target(&self, offset: u64, entry: u64) -> Error {
        let entry = L2Entry(entry);
        let Some(host) = self.unaligned_host(entry).filter(|_| entry.copied()) else {
            return self.bad_entry(offset, entry.0).await;
        };
        let is_zero = !self.geometry.extended_l2 && entry.0 & ZERO != 0;
        let what = if is_zero { "Preallocated zero" } else { "Data" };
        let (host, guest) = (hex(host), hex(offset));
        let text = format!("{what} cluster offset {host} unaligned (guest offset: {guest})");
        self.facts.mark_corrupt(&text, offset).await
    }

    /// Whether the L2 entry of the guest cluster at `guest` is invalid with a data file: its host offset differs from the guest
    /// offset, or it is compressed.
    #[inline]
    pub(in crate::qcow2) fn is_misplaced(&self, guest: u64, kind: L2Kind) -> bool {
        self.geometry.data_file
            && match kind {
                L2Kind::Data { host } | L2Kind::Zero { host: Some(host) } => {
                    host != self.geometry.cluster_start(guest)
                }
                L2Kind::Compressed { .. } => true,
                L2Kind::Unallocated | L2Kind::Zero { host: None } => false,
            }
    }

    /// Whether the new entry still refers to the host cluster of the old entry.
    pub(in crate::qcow2) fn keeps_host(&self, old: L2Entry, new: L2Entry) -> bool {
        let host_of = |entry: L2Entry| match entry.kind(self.geometry, self.version) {
            Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) => Some(host),
            _ => None,
        };
        host_of(old).is_some_and(|host| host_of(new) == Some(host))
    }
}
