//! What the active tables claim: that an entry's cluster has a refcount of exactly one, so that it may be written in place.

use futures_util::stream::StreamExt as _;
use oxblk_core::{ChildIdx, Edge, Result, WriteFlags};
use oxblk_ring::IoBufMut;

use super::super::Qcow2;
use super::super::layout::{Incompatible, L1Entry, L2Entry, L2Kind, field_offsets};

/// The flag in L1 and L2 entries.
const COPIED: u64 = 1 << 63;

/// What entries are made to claim.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// Nothing: no cluster is written in place.
    Nothing,
    /// What the refcounts say.
    Truth,
}

impl Qcow2 {
    /// Has all entries of the active tables claim it, on disk and in memory, durably. No slice may be dirty.
    pub(super) async fn claim(&self, claim: Claim) -> Result<()> {
        let l1 = self.active_l1();
        let file = self.children.require(ChildIdx::FILE)?;
        {
            let mut tables = Box::pin(self.l2_tables(&l1));
            while let Some(table) = tables.next().await {
                let (_, offset, entries) = table?;
                let mut claimed = Vec::with_capacity(entries.len());
                for entry in &entries {
                    claimed.push(self.claim_of(*entry, claim).await?);
                }
                if claimed != entries {
                    let bytes = self.table_with(&file, offset, &claimed).await?;
                    file.write(offset, bytes.into(), WriteFlags::empty()).await?;
                }
            }
        }
        for (index, entry) in (0_u64..).zip(&l1) {
            let Ok(Some(table)) = entry.l2_offset(self.geometry) else { continue };
            let alone = claim == Claim::Truth
                && self.refcounts.get(self.geometry.cluster_index(table)).await? == 1;
            if alone != entry.copied() {
                self.set_l1_entry(index, L1Entry(table | if alone { COPIED } else { 0 }));
            }
        }
        self.l2.clear();
        self.write_back(true).await
    }

    /// The L2 table at `offset` with other entries; what bitmaps it has stay.
    async fn table_with(&self, file: &Edge, offset: u64, entries: &[L2Entry]) -> Result<Vec<u8>> {
        let size = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let stride = usize::try_from(self.geometry.l2_entry_words()).unwrap_or(1);
        let mut bytes = match self.geometry.extended_l2 {
            true => file.read(offset, IoBufMut::new(size)).await?.to_vec(),
            false => vec![0; size],
        };
        for (word, entry) in bytes.chunks_exact_mut(8).step_by(stride).zip(entries) {
            word.copy_from_slice(&entry.0.to_be_bytes());
        }
        Ok(bytes)
    }

    async fn claim_of(&self, entry: L2Entry, claim: Claim) -> Result<L2Entry> {
        let Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) =
            entry.kind(self.geometry, self.version)
        else {
            return Ok(entry);
        };
        let alone = claim == Claim::Truth
            && self.refcounts.get(self.geometry.cluster_index(host)).await? == 1;
        Ok(entry.with_copied(alone))
    }

    /// Says in the header that the image must be repaired if nobody takes that back; version 2 has no word for it.
    pub(super) async fn set_dirty(&self, dirty: bool) -> Result<()> {
        if self.version < 3 {
            return Ok(());
        }
        let mut features = self.header.incompatible;
        features.set(Incompatible::DIRTY, dirty);
        self.write_header_field(field_offsets::INCOMPATIBLE, &features.bits().to_be_bytes()).await
    }
}
