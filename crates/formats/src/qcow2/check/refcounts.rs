//! Comparing the refcounts on disk with what was counted.

use std::collections::HashSet;
use std::ops::Range;

use futures_util::stream::StreamExt as _;
use oxblk_core::Result;
use oxblk_ring::{IoBufMut, is_zero};

use super::Checker;
use super::references::Referred;
use crate::qcow2::layout::{RefcountTableEntry, refcount_get};

impl Checker<'_> {
    /// Compares, cluster by cluster, over the whole file.
    pub(super) async fn compare_refcounts(&mut self) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let end = self.clusters_counted();
        let mut next = 0;
        let mut blocks = self.read_clusters(self.blocks_to_read(end));
        while let Some((index, block)) = blocks.next().await {
            let start = index.saturating_mul(per_block);
            self.compare_without_block(next..start.min(end));
            next = start.saturating_add(per_block).min(end);
            match block {
                Ok(block) => self.compare_block(start..next, &block),
                Err(error) => {
                    self.unreadable_blocks.insert(index);
                    for cluster in start..next {
                        self.refcount_unknown(&format!(
                            "Can't get refcount for cluster {cluster}: {error}"
                        ));
                    }
                }
            }
        }
        self.compare_without_block(next..end);
        Ok(())
    }

    /// How many clusters the file has; a reference may reach into one past its end, as it need not be padded.
    pub(super) fn clusters_counted(&self) -> u64 {
        let past_end = self.references.get(self.clusters).count() > 0;
        self.clusters.saturating_add(u64::from(past_end))
    }

    /// The refcount blocks that count clusters before `end`, each once.
    pub(super) fn blocks_to_read(&self, end: u64) -> Vec<(u64, u64)> {
        let mut seen = HashSet::new();
        let in_use = end.div_ceil(self.geometry.refcounts_per_block());
        let mut blocks = Vec::new();
        for (index, entry) in (0..in_use).zip(&self.refcount_table) {
            let offset = RefcountTableEntry(*entry).raw_offset();
            // A block that two entries share has been told of; it is compared once.
            if offset != 0 && !self.broken_blocks.contains(&index) && seen.insert(offset) {
                blocks.push((index, offset));
            }
        }
        blocks
    }

    /// Clusters for which there is no refcount block, or none that can be read.
    fn compare_without_block(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let per_block = self.geometry.refcounts_per_block();
        let mut broken: Vec<u64> = self.broken_blocks.iter().copied().collect();
        broken.sort_unstable();
        for index in broken {
            let first = index.saturating_mul(per_block);
            if first < range.end && range.start < first.saturating_add(per_block) {
                self.tell_broken_block(index);
            }
            for cluster in first.max(range.start)..first.saturating_add(per_block).min(range.end) {
                self.refcount_unknown(&format!(
                    "Can't get refcount for cluster {cluster}: Input/output error"
                ));
            }
        }
        let referred: Vec<(u64, Referred)> = self
            .references
            .in_range(range)
            .filter(|(cluster, _)| !self.broken_blocks.contains(&(cluster / per_block)))
            .collect();
        for (cluster, referred) in referred {
            // There is no place for its refcount.
            self.rebuild |= referred.count() > 0;
            self.compare(cluster, 0, referred);
        }
    }

    /// Tells once that a refcount block lies where none can be, as QEMU does when it meets one.
    fn tell_broken_block(&mut self, index: u64) {
        if std::mem::replace(&mut self.broken_block_told, true) {
            return;
        }
        let entry = usize::try_from(index).ok().and_then(|at| self.refcount_table.get(at)).copied();
        let offset = RefcountTableEntry(entry.unwrap_or(0)).raw_offset();
        // As C prints it: zero has no prefix.
        let index = if index == 0 { "0".to_owned() } else { format!("{index:#x}") };
        (self.say)(&format!(
            "qcow2: Image is corrupt: Refblock offset {offset:#x} unaligned (reftable index: {index}); \
             further non-fatal corruption events will be suppressed"
        ));
    }

    fn compare_block(&mut self, range: Range<u64>, block: &[u8]) {
        if is_zero(block) && self.references.is_empty_in(range.clone()) {
            return;
        }
        let order = self.geometry.refcount_order;
        for (index, cluster) in (0_u64..).zip(range) {
            let refcount = refcount_get(block, index, order).unwrap_or(0);
            let referred = self.references.get(cluster);
            self.compare(cluster, refcount, referred);
        }
    }

    fn compare(&mut self, cluster: u64, refcount: u64, referred: Referred) {
        let count = referred.count();
        if refcount > 0 || count > 0 {
            let end = cluster.saturating_add(1) << self.geometry.cluster_bits;
            self.report.image_end_offset = self.report.image_end_offset.max(end);
        }
        self.copied_suspect |= referred.is_belied_by(refcount);
        if refcount < count {
            self.corrupt(&format!("ERROR cluster {cluster} refcount={refcount} reference={count}"));
            self.too_low = self.too_low.saturating_add(1);
        } else if refcount > count {
            (self.say)(&format!("Leaked cluster {cluster} refcount={refcount} reference={count}"));
            self.report.leaks = self.report.leaks.saturating_add(1);
        }
    }

    /// The refcount of one cluster; `None` where it cannot be known.
    pub(super) async fn refcount_of(
        &self,
        cluster: u64,
        last: &mut Option<(u64, IoBufMut)>,
    ) -> Option<u64> {
        let index = cluster / self.geometry.refcounts_per_block();
        if self.broken_blocks.contains(&index) {
            return None;
        }
        let entry =
            usize::try_from(index).ok().and_then(|index| self.refcount_table.get(index)).copied();
        let offset = RefcountTableEntry(entry.unwrap_or(0)).raw_offset();
        if offset == 0 {
            return Some(0);
        }
        if last.as_ref().is_none_or(|(place, _)| *place != offset) {
            let len = usize::try_from(self.geometry.cluster_size()).ok()?;
            *last = Some((offset, self.file.read(offset, IoBufMut::new(len)).await.ok()?));
        }
        let (_, block) = last.as_ref()?;
        refcount_get(
            block,
            cluster % self.geometry.refcounts_per_block(),
            self.geometry.refcount_order,
        )
    }
}
