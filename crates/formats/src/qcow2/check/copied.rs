//! Checking the copied flag. In the active L1 table and its L2 tables, an entry of an uncompressed cluster must have the flag
//! if, and only if, the refcount of the cluster is exactly one.

use std::collections::HashSet;

use futures_util::stream::StreamExt as _;
use oxblk_core::{Result, WriteFlags};
use oxblk_ring::IoBufMut;

use super::{Checker, words};
use crate::qcow2::layout::{L1Entry, L2Entry};
use crate::qcow2::refscan::read_tables;

/// The copied flag in L1 and L2 entries.
const COPIED: u64 = 1 << 63;

impl Checker<'_> {
    /// Reports entries with a wrong copied flag, in the order of the L1 table. If `repair` is set, the flags of valid entries
    /// are corrected. The caller flushes.
    pub(super) async fn check_copied(&mut self, repair: bool) -> Result<()> {
        if self.header.l1_offset >= self.file.size() {
            return Ok(());
        }
        let l1 = self.read_table(self.header.l1_offset, u64::from(self.header.l1_entries)).await?;
        let mut seen = HashSet::new();
        // Many entries may refer to one table. The table is read once, for the first of these entries.
        let mut is_first = |entry: &L1Entry| {
            let place = entry.raw_offset();
            place != 0
                && place < self.file.size()
                && !self.unread_tables.contains(&place)
                && seen.insert(place)
        };
        let entries: Vec<(u64, L1Entry, bool)> = (0_u64..)
            .zip(l1.into_iter().map(L1Entry))
            .filter(|(_, entry)| entry.raw_offset() != 0)
            .map(|(index, entry)| (index, entry, is_first(&entry)))
            .collect();
        let firsts = entries.iter().filter(|(.., first)| *first);
        let places = firsts.map(|(_, entry, _)| ((), entry.raw_offset())).collect();
        let mut block = None;
        let size = self.geometry.cluster_size();
        let tables = read_tables(self.file, size, places, |_, table| table);
        let mut tables = std::pin::pin!(tables);
        for (index, entry, first) in entries {
            let cluster = self.geometry.cluster_index(entry.raw_offset());
            if let Some(refcount) = self.refcount_of(cluster, &mut block).await
                && (refcount == 1) != entry.copied()
            {
                let finding = format!(
                    "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={:x} refcount={refcount}",
                    entry.0
                );
                // Do not change an invalid entry: the L1 table may overlap with other data.
                let repair =
                    repair && entry.reserved() == 0 && self.geometry.is_aligned(entry.raw_offset());
                self.report_copied(&finding, repair);
                if repair {
                    let at = self.header.l1_offset.saturating_add(index.saturating_mul(8));
                    self.patch(at, entry.0 ^ COPIED).await?;
                }
            }
            if first && let Some(((), Ok(table))) = tables.next().await {
                self.check_table_copied(entry.raw_offset(), &table, repair, &mut block).await?;
            }
        }
        Ok(())
    }

    async fn check_table_copied(
        &mut self,
        place: u64,
        table: &[u8],
        repair: bool,
        block: &mut Option<(u64, IoBufMut)>,
    ) -> Result<()> {
        let mut entries = words(table);
        let mut changed = false;
        let stride = usize::try_from(self.geometry.l2_entry_words()).unwrap_or(1);
        for word in entries.iter_mut().step_by(stride) {
            let entry = L2Entry(*word);
            if entry.is_compressed() || entry.raw_offset() == 0 {
                continue;
            }
            let cluster = self.geometry.cluster_index(entry.raw_offset());
            let refcount = match self.geometry.data_file {
                // In a data file, a cluster has exactly one reference.
                true => Some(1),
                false => self.refcount_of(cluster, block).await,
            };
            if let Some(refcount) = refcount
                && (refcount == 1) != entry.copied()
            {
                let finding = format!(
                    "OFLAG_COPIED data cluster: l2_entry={:x} refcount={refcount}",
                    entry.0
                );
                let repair = repair && entry.reserved() == 0;
                self.report_copied(&finding, repair);
                if repair {
                    *word ^= COPIED;
                    changed = true;
                }
            }
        }
        if changed {
            let bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_be_bytes).collect();
            self.file.write(place, bytes.into(), WriteFlags::empty()).await?;
        }
        Ok(())
    }

    fn report_copied(&mut self, finding: &str, repair: bool) {
        if repair {
            self.report_repair(finding);
        } else {
            self.report_corruption(&format!("ERROR {finding}"));
        }
    }
}
