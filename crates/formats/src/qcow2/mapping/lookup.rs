//! Mapping guest offsets to extents with the L2 tables.
//!
//! [`Mapping::lookup`] uses only the cache and takes no lock. `metadata/slices` loads missing slices.
//!
//! An extended L2 entry has two words. A lookup that combines an old word with a new word would have a wrong result: data where
//! no data was written, or the backing file instead of a compressed cluster. So writers change both words under
//! `Pinned::begin_change`. A lookup that runs during a change has no result and is repeated. A write-back cycle also repeats
//! the copy of a slice that changes during the copy.

use std::sync::atomic::{AtomicU64, Ordering::Acquire};

use oxblk_core::Result;

use super::Mapping;
use super::extent::{Extent, Miss};
use crate::qcow2::layout::{L2Entry, L2Kind};

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

    /// The extent that starts at `offset`. The L2 entry of `offset` is the word `index` of the slice. The extent does not
    /// extend past the end of the slice or of the range.
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
}
