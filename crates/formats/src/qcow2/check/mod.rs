//! Checking and repairing an image. The refcount of each cluster must equal the number of references to the cluster.
//!
//! The check reads only the file and ignores the caches of an open image. The caller writes the caches back first.
//!
//! 1. [`walk`] counts the references that the tables contain, in a sparse map ([`References`]). A table with several
//!    references is read once, and each of its entries counts as that many references.
//! 2. [`refcounts`] compares the counts with the refcounts on disk. A refcount that is too low is a corruption. A refcount
//!    that is too high is a leak.
//! 3. [`copied`] reports entries with a wrong copied flag. This step reads the active tables again. So it runs only if a
//!    corruption or an entry whose flag may be wrong was found, or if a repair has changed refcounts.
//! 4. [`repair`] repairs the findings that `fix` allows. If the old refcount structures are unusable, [`rebuild`] writes
//!    new structures.
//!
//! L2 tables and refcount blocks are read concurrently and parsed by worker threads. Findings are reported and counted on one
//! thread, in the order of the tables.
//!
//! Memory is bounded. For contiguous clusters, the map needs at most about 4 bytes per referenced cluster. For scattered
//! clusters, the map needs about 256 to 1024 bytes per referenced cluster. A value in the image determines the length of a read
//! only if the limits of this value were checked. The number of planned repairs is limited, and L2 tables that overlap are read
//! only in part. References that exceed the end of the file by a cluster or more are reported, and not counted.
//!
//! A repair frees clusters only if all references are known. If a pointer in the header seems wrong, clusters that seem to be
//! leaked may belong to the metadata to which the pointer should refer ([`pointers`]). Then the repair lowers no refcount, and
//! changes no L1, L2 or snapshot table ([`planned`]). If the refcount width in the header seems wrong ([`width`]), the repair
//! changes nothing.
//!
//! Findings that `qemu-img check` also reports have the same wording and the same counts as in `qemu-img check`.

mod bitmaps;
mod copied;
mod entries;
mod lost;
mod planned;
mod pointers;
mod rebuild;
mod refcounts;
mod repair;
mod snapshot_table;
mod snapshots;
mod walk;
mod width;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};

use oxblk_core::check::{CheckReport, Finding, FindingKind, Fix};
use oxblk_core::{Edge, Result};
use oxblk_ring::IoBufMut;
use roaring::RoaringTreemap;

use super::image_state::header::read_header;
use super::layout::{Geometry, Header, refcount_max};
use super::refscan::References;
use lost::LostClusters;
use planned::{Line, Patch};
use snapshot_table::RepairedTable;

/// Checks the image in `file`, and repairs what `fix` allows. Findings are reported to `report_finding`.
///
/// # Errors
/// When an essential table is invalid or cannot be read, when `fix` does not allow a necessary rebuild of the refcounts, and
/// the errors of writes and flushes. Failures that do not end the check are counted in the report.
pub(super) async fn check(
    file: &Edge,
    header: &Header,
    fix: Fix,
    report_finding: &dyn Fn(Finding),
) -> Result<CheckReport> {
    check_with(file, header, fix, Loss::Allowed, report_finding).await
}

/// Checks the image in `file`, and repairs everything except faults whose repair removes snapshots, bitmaps, or data of a
/// snapshot: the user decides about these.
///
/// # Errors
/// Like [`check`]. Also fails if the snapshot table cannot be read; nothing has been written then.
pub(super) async fn repair_without_loss(
    file: &Edge,
    header: &Header,
    report_finding: &dyn Fn(Finding),
) -> Result<CheckReport> {
    check_with(file, header, Fix::All, Loss::Refused, report_finding).await
}

async fn check_with(
    file: &Edge,
    header: &Header,
    fix: Fix,
    loss: Loss,
    report_finding: &dyn Fn(Finding),
) -> Result<CheckReport> {
    let mut check = Checker::new(file, header, (fix, loss), report_finding);
    let outcome = check.run().await;
    // If the check has ended before its planned repairs were decided, their faults stay.
    check.refuse_planned_repairs();
    outcome?;
    let (mut report, end) = (check.report, check.geometry.clusters_for(file.size()));
    if fix == Fix::All && check.lost_clusters.has_cluster_before(end) {
        // The repair has made the file longer, so that it contains clusters that were lost. They have references, but no
        // refcounts yet. Without refcounts, a later write would use them for other data.
        let repairs = |finding: Finding| {
            if finding.kind == FindingKind::Repair {
                report_finding(finding);
            }
        };
        let header = read_header(file).await?;
        let mut again = Checker::new(file, &header, (fix, loss), &repairs);
        let outcome = again.run().await;
        again.refuse_planned_repairs();
        outcome?;
        let fixed = again.report.corruptions_fixed;
        report.corruptions_fixed = report.corruptions_fixed.saturating_add(fixed);
    }
    Ok(report)
}

/// Whether a repair may remove snapshots, bitmaps, or data of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Allowed,
    Refused,
}

struct Checker<'a> {
    file: &'a Edge,
    header: &'a Header,
    geometry: Geometry,
    fix: Fix,
    loss: Loss,
    report_to: &'a dyn Fn(Finding),
    report: CheckReport,
    references: References,
    /// Number of clusters in the file. The last cluster may be partial.
    clusters: u64,
    /// Clusters behind the end of the file to which metadata refers. A repair writes nothing to these clusters.
    lost_clusters: LostClusters,
    refcount_table: Vec<u64>,
    /// Refcount table indices whose entry has an unaligned offset, so that the refcounts of the block are unknown.
    broken_blocks: HashSet<u64>,
    /// Whether one of the broken blocks was already reported.
    broken_block_reported: bool,
    /// The copied flag of some entry may be wrong.
    copied_suspect: bool,
    /// All references are known, so that a cluster without references is free.
    complete: bool,
    /// The refcounts on disk cannot be repaired in place.
    rebuild: bool,
    /// The header may refer to the old or to the new refcount table or snapshot table, so nothing more is written.
    table_unknown: bool,
    /// Number of corruptions in the refcount table and the refcount blocks themselves.
    broken_structure: u64,
    /// Number of clusters whose refcount is too low.
    too_low: u64,
    /// Number of clusters whose refcount could not be read.
    unknown: u64,
    /// Refcount table indices whose block cannot be read.
    unreadable_blocks: HashSet<u64>,
    /// Clusters of the refcount table and of the refcount blocks, once for each counted reference.
    refcount_structures: Vec<u64>,
    /// Table entries that the repair replaces.
    patches: Vec<Patch>,
    /// The bitmap directory that the repair writes, if it must change.
    new_bitmaps: Option<bitmaps::NewDirectory>,
    /// The lines of the report that are held back.
    held_lines: RefCell<Vec<Line>>,
    /// The snapshot table with which the repair replaces the snapshot table of the image, if that table has faults.
    repaired_table: Option<RepairedTable>,
    /// Clusters of healthy bitmaps that the repair removes with their directory, and clusters of this directory.
    dropped_bitmaps: RoaringTreemap,
    /// Clusters of the old and the new snapshot table and of removed bitmaps whose refcount changes are not reported.
    unreported: BTreeSet<u64>,
    /// Leaked clusters that the repair has used for the new snapshot table.
    reused: BTreeSet<u64>,
    /// Refcount table indices whose entry is invalid, or whose block is shared. The repair does not write to such a block.
    unwritable_blocks: HashSet<u64>,
    /// Some references may be unknown, so nothing is freed.
    references_unknown: bool,
    /// A pointer in the header seems wrong, so no table is changed and nothing is freed.
    wrong_pointer: bool,
    /// The refcount width in the header seems wrong, so nothing is repaired.
    wrong_width: bool,
    /// The snapshot table is too long or has an invalid entry, or the L1 table of a snapshot shares clusters with another
    /// structure.
    broken_snapshots: bool,
    /// Why references may be unknown.
    doubts: Vec<String>,
    /// Number of L1 entries with an impossible offset, and of active L1 entries with reserved bits.
    l1_faults: u64,
    /// Some active L1 entries have flags but no offset.
    l1_flags_without_offset: bool,
    /// Number of bytes of unaligned L2 tables that may still be read.
    unaligned_bytes_left: u64,
    /// Offsets of the unaligned L2 tables that were not read.
    unread_tables: BTreeSet<u64>,
    /// An L1 entry refers to a cluster that does not seem to contain an L2 table.
    no_l2_table: bool,
    /// Structures to which the header and the snapshot table refer: offset, length, and kind.
    pointer_targets: Vec<(u64, u64, &'static str)>,
}

impl<'a> Checker<'a> {
    fn new(
        file: &'a Edge,
        header: &'a Header,
        (fix, loss): (Fix, Loss),
        report_finding: &'a dyn Fn(Finding),
    ) -> Self {
        let geometry = header.geometry;
        let clusters = geometry.clusters_for(file.size());
        let report = CheckReport {
            total_clusters: geometry.clusters_for(header.size),
            // The header cluster is in use, even if its refcount is 0.
            image_end_offset: geometry.cluster_size(),
            ..CheckReport::default()
        };
        Self {
            file,
            header,
            geometry,
            fix,
            loss,
            report_to: report_finding,
            report,
            references: References::new(refcount_max(geometry.refcount_order)),
            clusters,
            lost_clusters: LostClusters::default(),
            refcount_table: Vec::new(),
            broken_blocks: HashSet::new(),
            broken_block_reported: false,
            copied_suspect: false,
            complete: false,
            rebuild: false,
            table_unknown: false,
            broken_structure: 0,
            too_low: 0,
            unknown: 0,
            unreadable_blocks: HashSet::new(),
            refcount_structures: Vec::new(),
            patches: Vec::new(),
            new_bitmaps: None,
            held_lines: RefCell::default(),
            repaired_table: None,
            dropped_bitmaps: RoaringTreemap::new(),
            unreported: BTreeSet::new(),
            reused: BTreeSet::new(),
            unwritable_blocks: HashSet::new(),
            references_unknown: false,
            wrong_pointer: false,
            wrong_width: false,
            broken_snapshots: false,
            doubts: Vec::new(),
            l1_faults: 0,
            l1_flags_without_offset: false,
            unaligned_bytes_left: file.size().saturating_add(geometry.cluster_size()),
            unread_tables: BTreeSet::new(),
            no_l2_table: false,
            pointer_targets: Vec::new(),
        }
    }

    async fn run(&mut self) -> Result<()> {
        self.count_references().await?;
        self.complete = self.report.check_errors == 0 && !self.references_unknown;
        self.compare_refcounts().await?;
        self.check_pointer_targets().await;
        self.note_broken_snapshots();
        if self.fix != Fix::Nothing {
            self.check_width().await;
            self.repair().await
        } else if self.copied_suspect {
            self.check_copied(false).await
        } else {
            Ok(())
        }
    }

    /// Whether this check repairs all faults, even if a repair removes snapshots, bitmaps, or data of a snapshot.
    fn may_lose_data(&self) -> bool {
        self.fix == Fix::All && self.loss == Loss::Allowed
    }

    /// Reports a finding without counting it.
    fn report_uncounted(&self, kind: FindingKind, text: impl Into<String>) {
        self.report_finding(Finding::new(kind, text));
    }

    /// Reports a corruption.
    fn report_corruption(&mut self, text: &str) {
        self.report_corrupt(Finding::new(FindingKind::Corruption, text));
    }

    fn report_corrupt(&mut self, finding: Finding) {
        self.report_finding(finding);
        self.report.corruptions = self.report.corruptions.saturating_add(1);
        self.copied_suspect = true;
    }

    /// Reports a corruption of the refcount table or of a refcount block that only a rebuild can repair.
    fn report_rebuild_needed(&mut self, finding: &str) {
        self.report_corruption(finding);
        self.broken_structure = self.broken_structure.saturating_add(1);
        self.rebuild = true;
    }

    /// Reports a corruption of the refcount block with this table index. The repair does not write to this block.
    fn report_unwritable_block(&mut self, index: u64, finding: &str) {
        self.report_rebuild_needed(finding);
        self.unwritable_blocks.insert(index);
    }

    /// Whether a cluster has a refcount block to which the repair can write.
    fn has_block(&self, cluster: u64) -> bool {
        let index = cluster / self.geometry.refcounts_per_block();
        let entry = usize::try_from(index).ok().and_then(|at| self.refcount_table.get(at));
        entry.is_some_and(|entry| *entry != 0)
            && !self.unwritable_blocks.contains(&index)
            && !self.unreadable_blocks.contains(&index)
    }

    /// Reports that a refcount cannot be read.
    fn report_unknown_refcount(&mut self, finding: &str) {
        self.report_failure(finding);
        self.unknown = self.unknown.saturating_add(1);
        self.rebuild = true;
    }

    /// Reports a corruption that is repaired.
    fn report_repair(&mut self, finding: &str) {
        self.report_uncounted(FindingKind::Repair, format!("Repairing {finding}"));
        self.report.corruptions_fixed = self.report.corruptions_fixed.saturating_add(1);
    }

    /// Notes that a range belongs to the refcount structures. The caller has counted the reference to this range.
    fn note_structure(&mut self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes);
        if bytes > 0 && offset < self.clusters.saturating_mul(self.geometry.cluster_size()) {
            let clusters = self.geometry.cluster_index(offset)..self.geometry.clusters_for(end);
            self.refcount_structures
                .extend(clusters.take_while(|cluster| *cluster <= self.clusters));
        }
    }

    /// Reports that something could not be checked.
    fn report_failure(&mut self, finding: &str) {
        self.report_uncounted(FindingKind::Failure, finding);
        self.report.check_errors = self.report.check_errors.saturating_add(1);
    }

    /// Reads a table of `entries` 64-bit entries.
    async fn read_table(&self, offset: u64, entries: u64) -> Result<Vec<u64>> {
        let len = usize::try_from(entries.saturating_mul(8)).unwrap_or(usize::MAX);
        Ok(words(&self.file.read(offset, IoBufMut::new(len)).await?))
    }

    /// Reads one cluster of the refcount structures.
    async fn read_block(&self, offset: u64) -> Result<IoBufMut> {
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(usize::MAX);
        self.file.read(offset, IoBufMut::new(len)).await
    }
}

/// The big-endian 64-bit words in `bytes`.
fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_be_bytes)).collect()
}

#[cfg(test)]
mod repair_tests;
#[cfg(test)]
mod tests;
