//! The copied flags of the active tables. A set flag says that the refcount of the cluster is exactly one, so that the
//! cluster may be written in place.
//!
//! Before a change, the flags that will become wrong are cleared (see `references`). After the change, flags are set again:
//! after a success for the clusters whose refcount has become one, and after a failure for all clusters whose refcount is
//! one.

use std::sync::Arc;

use futures_util::stream::StreamExt as _;
use oxblk_core::{Edge, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};
use roaring::RoaringTreemap;

use super::super::layout::Geometry;
use super::super::layout::{L1Entry, L2Entry, L2Kind};
use super::super::refscan::{EntryGroup, group_entries, read_tables};
use super::ImageSnapshots;

/// The copied flag in L1 and L2 entries.
const COPIED: u64 = 1 << 63;

/// Clusters whose refcount has become exactly one.
#[derive(Debug, Default)]
pub(super) struct Unshared(Arc<RoaringTreemap>);

impl Unshared {
    pub(super) fn new(clusters: RoaringTreemap) -> Self {
        Self(Arc::new(clusters))
    }

    fn has(&self, cluster: u64) -> bool {
        self.0.contains(cluster)
    }
}

/// Sets the copied flag in the entries that refer to clusters of `unshared`. Returns the new table, or `None` if no flag
/// changes.
fn with_copied_flags(
    table: IoBufMut,
    unshared: &RoaringTreemap,
    geometry: Geometry,
    version: u32,
) -> Option<IoBuf> {
    let changes = |group: &EntryGroup| match *group {
        EntryGroup::Run { cluster, count, copied } => {
            !copied && unshared.range_cardinality(cluster..cluster.saturating_add(count.into())) > 0
        }
        EntryGroup::Unusual { .. } => false,
    };
    if !group_entries(&table, geometry, version, u64::MAX).iter().any(changes) {
        return None;
    }
    let mut table = table;
    let stride = usize::try_from(geometry.l2_entry_words()).unwrap_or(1);
    for word in table.chunks_exact_mut(8).step_by(stride) {
        let entry = L2Entry((&*word).try_into().map_or(0, u64::from_be_bytes));
        let kind = entry.kind(geometry, version);
        if let Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) = kind
            && unshared.contains(geometry.cluster_index(host))
        {
            word.copy_from_slice(&entry.with_copied(true).0.to_be_bytes());
        }
    }
    Some(table.freeze())
}

impl ImageSnapshots {
    /// Sets the copied flag in the active L1 and L2 entries that refer to clusters of `unshared`, on disk and in memory, and
    /// flushes. Does nothing if `unshared` is empty. The caller ensures that no slice is dirty.
    pub(super) async fn set_copied_flags(&self, unshared: Unshared) -> Result<()> {
        if unshared.0.is_empty() {
            return Ok(());
        }
        let l1 = self.mapping.active_l1();
        let file = self.image_state.file()?;
        let (geometry, version) = (self.geometry, self.image_state.version());
        let clusters = Arc::clone(&unshared.0);
        let places = self.mapping.table_places(&l1)?;
        let tables = self.distinct_tables(&l1)?;
        let tagged = tables.into_iter().map(|(offset, _)| (offset, offset)).collect();
        let changed = read_tables(&file, geometry.cluster_size(), tagged, move |_, table| {
            with_copied_flags(table, &clusters, geometry, version)
        });
        {
            let mut changed = std::pin::pin!(changed);
            while let Some((offset, table)) = changed.next().await {
                if let Some(table) = table? {
                    file.write(offset, table, WriteFlags::empty()).await?;
                }
            }
        }
        for (index, offset) in places {
            if unshared.has(geometry.cluster_index(offset)) {
                self.mapping.set_l1_entry(index, L1Entry(offset | COPIED));
            }
        }
        self.mapping.clear();
        self.metadata.write_back(true).await
    }

    /// Clears the copied flag of all active L1 entries, writes the changed entries and flushes.
    pub(super) async fn clear_l1_copied_flags(&self) -> Result<()> {
        for (index, offset) in self.mapping.table_places(&self.mapping.active_l1())? {
            if self.mapping.l1_entry(index).copied() {
                self.mapping.set_l1_entry(index, L1Entry(offset));
            }
        }
        self.mapping.clear();
        self.metadata.write_back(true).await
    }

    /// Sets or clears the copied flag of all active L1 and L2 entries according to the refcounts, on disk and in memory,
    /// and flushes. Invalid and compressed entries stay unchanged. The caller ensures that no slice is dirty.
    pub(super) async fn correct_copied_flags(&self) -> Result<()> {
        let l1 = self.mapping.active_l1();
        let file = self.image_state.file()?;
        {
            let offsets =
                self.distinct_tables(&l1)?.into_iter().map(|(offset, _)| offset).collect();
            let mut tables = Box::pin(self.l2_tables(offsets));
            while let Some(table) = tables.next().await {
                let (offset, entries) = table?;
                let mut corrected = Vec::with_capacity(entries.len());
                for entry in &entries {
                    corrected.push(self.with_correct_copied(*entry).await?);
                }
                if corrected != entries {
                    let bytes = self.table_with(&file, offset, &corrected).await?;
                    file.write(offset, bytes.into(), WriteFlags::empty()).await?;
                }
            }
        }
        for (index, entry) in (0_u64..).zip(&l1) {
            let Ok(Some(table)) = entry.l2_offset(self.geometry) else { continue };
            let unshared = self.clusters.get(self.geometry.cluster_index(table)).await? == 1;
            if unshared != entry.copied() {
                self.mapping
                    .set_l1_entry(index, L1Entry(table | if unshared { COPIED } else { 0 }));
            }
        }
        self.mapping.clear();
        self.metadata.write_back(true).await
    }

    /// The bytes of the L2 table at `offset` with these entries. The subcluster bitmaps do not change.
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

    async fn with_correct_copied(&self, entry: L2Entry) -> Result<L2Entry> {
        let Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) =
            entry.kind(self.geometry, self.image_state.version())
        else {
            return Ok(entry);
        };
        let unshared = self.clusters.get(self.geometry.cluster_index(host)).await? == 1;
        Ok(entry.with_copied(unshared))
    }
}
