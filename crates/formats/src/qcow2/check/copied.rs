//! Which entries of the active tables claim wrongly that their cluster's refcount is, or is not, exactly one.

use std::collections::HashSet;

use futures_util::stream::StreamExt as _;
use oxblk_core::Result;

use super::{Checker, words};
use crate::qcow2::layout::{L1Entry, L2Entry};

impl Checker<'_> {
    /// Tells them, L1 entry by L1 entry.
    pub(super) async fn check_copied(&mut self) -> Result<()> {
        if self.header.l1_offset >= self.file.size() {
            return Ok(());
        }
        let l1 = self.read_table(self.header.l1_offset, u64::from(self.header.l1_entries)).await?;
        let mut seen = HashSet::new();
        let places: Vec<((u64, L1Entry, bool), u64)> = (0_u64..)
            .zip(l1.into_iter().map(L1Entry))
            .filter(|(_, entry)| entry.raw_offset() != 0)
            .map(|(index, entry)| {
                let first = seen.insert(entry.raw_offset());
                ((index, entry, first), entry.raw_offset())
            })
            .collect();
        let mut block = None;
        let mut tables = self.read_clusters(places);
        while let Some(((index, entry, first), table)) = tables.next().await {
            let cluster = self.geometry.cluster_index(entry.raw_offset());
            if let Some(refcount) = self.refcount_of(cluster, &mut block).await
                && (refcount == 1) != entry.copied()
            {
                self.corrupt(&format!(
                    "ERROR OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={:x} refcount={refcount}",
                    entry.0
                ));
            }
            let (true, Ok(table)) = (first && entry.raw_offset() < self.file.size(), table) else {
                continue;
            };
            for entry in words(&table).into_iter().map(L2Entry) {
                self.check_data_copied(entry, &mut block).await;
            }
        }
        Ok(())
    }

    async fn check_data_copied(
        &mut self,
        entry: L2Entry,
        block: &mut Option<(u64, oxblk_ring::IoBufMut)>,
    ) {
        if entry.is_compressed() || entry.raw_offset() == 0 {
            return;
        }
        let cluster = self.geometry.cluster_index(entry.raw_offset());
        if let Some(refcount) = self.refcount_of(cluster, block).await
            && (refcount == 1) != entry.copied()
        {
            self.corrupt(&format!(
                "ERROR OFLAG_COPIED data cluster: l2_entry={:x} refcount={refcount}",
                entry.0
            ));
        }
    }
}
