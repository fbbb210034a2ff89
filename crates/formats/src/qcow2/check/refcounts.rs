//! Comparing the refcounts on disk with the counted references.

use std::collections::HashSet;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;

use futures_util::stream::StreamExt as _;
use oxblk_core::check::{Finding, FindingKind};
use oxblk_core::{Error, Result};
use oxblk_ring::IoBufMut;

use super::Checker;
use crate::qcow2::layout::{RefcountTableEntry, refcount_get};
use crate::qcow2::refscan::{ClusterReferences, MatchingBlock, References, read_tables};

/// Result of a worker thread for one refcount block: the agreement with the counted references, or the block itself if a
/// refcount differs.
type Compared = Result<MatchingBlock, IoBufMut>;

impl Checker<'_> {
    /// Compares the refcounts of all clusters of the file with the counted references.
    pub(super) async fn compare_refcounts(&mut self) -> Result<()> {
        let (per_block, order) =
            (self.geometry.refcounts_per_block(), self.geometry.refcount_order);
        let end = self.clusters_counted();
        // The worker threads share the counts. This thread needs the counts for blocks that differ and for clusters without
        // a block.
        let references = Arc::new(std::mem::take(&mut self.references));
        let counted = Arc::clone(&references);
        let compare = move |index: &u64, block: IoBufMut| -> Compared {
            let start = index.saturating_mul(per_block);
            let range = start..start.saturating_add(per_block).min(end);
            counted.compare_block(range, &block, order).ok_or(block)
        };
        let mut next = 0;
        {
            let places = self.blocks_to_read(end);
            let size = self.geometry.cluster_size();
            let mut blocks = pin!(read_tables(self.file, size, places, compare));
            while let Some((index, seen)) = blocks.next().await {
                let start = index.saturating_mul(per_block);
                self.compare_without_block(&references, next..start.min(end));
                next = start.saturating_add(per_block).min(end);
                match seen {
                    Ok(Ok(matching)) => self.note_matching_block(matching),
                    Ok(Err(block)) => self.compare_block(&references, start..next, &block),
                    Err(error) => self.report_unreadable_block(index, start..next, &error),
                }
            }
        }
        self.compare_without_block(&references, next..end);
        self.references = Arc::unwrap_or_clone(references);
        Ok(())
    }

    fn note_matching_block(&mut self, matching: MatchingBlock) {
        if let Some(last) = matching.last {
            self.note_in_use(last);
        }
        self.copied_suspect |= matching.contradicted;
    }

    /// Notes that a cluster is in use, so that the end offset of the image is at least the end of this cluster.
    fn note_in_use(&mut self, cluster: u64) {
        let end = cluster.saturating_add(1) << self.geometry.cluster_bits;
        self.report.image_end_offset = self.report.image_end_offset.max(end);
    }

    fn report_unreadable_block(&mut self, index: u64, clusters: Range<u64>, error: &Error) {
        self.unreadable_blocks.insert(index);
        for cluster in clusters {
            self.report_unknown_refcount(&format!(
                "Can't get refcount for cluster {cluster}: {error}"
            ));
        }
    }

    /// Number of clusters to compare: the clusters of the file, and the cluster behind the end of the file if this cluster has
    /// a reference. As in QEMU, a reference may exceed the end of the file by less than a cluster.
    pub(super) fn clusters_counted(&self) -> u64 {
        let past_end = self.references.get(self.clusters).count() > 0;
        self.clusters.saturating_add(u64::from(past_end))
    }

    /// The refcount blocks that contain refcounts of clusters before `end`, each once, as index and offset. Blocks with an
    /// unaligned offset are left out.
    pub(super) fn blocks_to_read(&self, end: u64) -> Vec<(u64, u64)> {
        let mut seen = HashSet::new();
        let in_use = end.div_ceil(self.geometry.refcounts_per_block());
        let mut blocks = Vec::new();
        for (index, entry) in (0..in_use).zip(&self.refcount_table) {
            let offset = RefcountTableEntry(*entry).raw_offset();
            // A block that two entries share is already reported, and is compared only once.
            if offset != 0 && !self.broken_blocks.contains(&index) && seen.insert(offset) {
                blocks.push((index, offset));
            }
        }
        blocks
    }

    /// Compares clusters that have no refcount block of their own, and reports clusters whose block has an unaligned offset.
    fn compare_without_block(&mut self, references: &References, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let per_block = self.geometry.refcounts_per_block();
        let mut broken: Vec<u64> = self.broken_blocks.iter().copied().collect();
        broken.sort_unstable();
        for index in broken {
            let first = index.saturating_mul(per_block);
            if first < range.end && range.start < first.saturating_add(per_block) {
                self.report_broken_block(index);
            }
            for cluster in first.max(range.start)..first.saturating_add(per_block).min(range.end) {
                self.report_unknown_refcount(&format!(
                    "Can't get refcount for cluster {cluster}: Input/output error"
                ));
            }
        }
        for (cluster, referred) in references.in_range(range) {
            if self.broken_blocks.contains(&(cluster / per_block)) {
                continue;
            }
            // No block can store the refcount of this cluster.
            self.rebuild |= referred.count() > 0;
            self.compare_cluster(cluster, 0, referred);
        }
    }

    /// Reports that the offset of a refcount block is not aligned, with the message of QEMU. Only the first call reports this.
    fn report_broken_block(&mut self, index: u64) {
        if std::mem::replace(&mut self.broken_block_reported, true) {
            return;
        }
        let entry = usize::try_from(index).ok().and_then(|at| self.refcount_table.get(at)).copied();
        let offset = RefcountTableEntry(entry.unwrap_or(0)).raw_offset();
        // C's `%#x` prints zero without a prefix.
        let index = if index == 0 { "0".to_owned() } else { format!("{index:#x}") };
        let text = format!(
            "qcow2: Image is corrupt: Refblock offset {offset:#x} unaligned (reftable index: {index}); \
             further non-fatal corruption events will be suppressed"
        );
        self.report_uncounted(FindingKind::Note, text);
    }

    fn compare_block(&mut self, references: &References, range: Range<u64>, block: &[u8]) {
        let order = self.geometry.refcount_order;
        for (index, cluster) in (0_u64..).zip(range) {
            let refcount = refcount_get(block, index, order).unwrap_or(0);
            let referred = references.get(cluster);
            self.compare_cluster(cluster, refcount, referred);
        }
    }

    fn compare_cluster(&mut self, cluster: u64, refcount: u64, referred: ClusterReferences) {
        let count = referred.count();
        if refcount > 0 || count > 0 {
            self.note_in_use(cluster);
        }
        self.copied_suspect |= referred.is_contradicted_by(refcount);
        let offset = cluster.saturating_mul(self.geometry.cluster_size());
        if refcount < count {
            let text = format!("ERROR cluster {cluster} refcount={refcount} reference={count}");
            self.report_corrupt(Finding::new(FindingKind::Corruption, text).at(offset));
            self.too_low = self.too_low.saturating_add(1);
        } else if refcount > count {
            let text = format!("Leaked cluster {cluster} refcount={refcount} reference={count}");
            self.report_finding(Finding::new(FindingKind::Leak, text).at(offset));
            self.report.leaks = self.report.leaks.saturating_add(1);
        }
    }

    /// The refcount of one cluster on disk. `None` if the refcount is unknown. `last` caches the block that was read last.
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
