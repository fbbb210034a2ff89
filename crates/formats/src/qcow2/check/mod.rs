//! Checking an image: do its refcounts count what refers to each cluster?
//!
//! The check looks at the file alone, not at what an open image has cached; the caller writes that back first.
//!
//! 1. [`walk`] counts the references that the tables hold, in a sparse map ([`References`]). A table that several
//!    entries point to is read once and counted as often, so that aliased tables cost nothing.
//! 2. [`refcounts`] compares the counts with the refcounts on disk: too low is corruption, too high a leak.
//! 3. [`copied`] tells which entries claim wrongly that their cluster's refcount is (not) exactly one. It walks the
//!    active tables again, and so is done only where the first two found that there is something to tell.
//! 4. [`repair`] repairs what it may, or has [`rebuild`] write new refcounts where the old ones have no room for it.
//!
//! Tables and refcount blocks are read many at a time and looked at on all cores; what they say is told and counted on one
//! thread, in their order.
//!
//! Memory is bounded: the map takes a byte for each cluster referred to where they lie together, some hundreds where they
//! are scattered, and nothing is read at a length that the image chooses, other than the tables whose limits [`Header`] has checked. References past the end of the
//! file are told, and not counted.
//!
//! A repair frees only what it understands: where the header does not name what it should, clusters that seem to leak may
//! belong to what it should name ([`named`]). Then refcounts may be raised, and nothing else. Where refcounts do not seem to
//! have the width that the header tells ([`width`]), not even that.
//!
//! Findings are worded and counted as `qemu-img check` does.

mod bitmaps;
mod copied;
mod entries;
mod named;
mod rebuild;
mod refcounts;
mod repair;
mod snapshot_table;
mod snapshots;
mod walk;
mod width;

use std::collections::{BTreeSet, HashSet};

use oxblk_core::check::{CheckReport, Fix};
use oxblk_core::{ChildIdx, Edge, Errno, Error, Result};
use oxblk_ring::IoBufMut;

use std::sync::atomic::Ordering::Release;

use super::Qcow2;
use super::layout::{Autoclear, Geometry, Header, field_offsets, refcount_max};
use super::open::read_header;
use super::refscan::References;
use snapshot_table::RepairedTable;

/// Checks the image in `file`, and repairs what `fix` allows. Each finding is told to `say` as it comes.
///
/// # Errors
/// When a table that everything depends on cannot be read, or the file cannot be written. Other failures are
/// counted in the report.
pub(super) async fn check(
    file: &Edge,
    header: &Header,
    fix: Fix,
    say: &dyn Fn(&str),
) -> Result<CheckReport> {
    let mut check = Checker::new(file, header, fix, say);
    check.count_references().await?;
    check.complete = check.report.check_errors == 0 && !check.unseen;
    check.compare_refcounts().await?;
    check.check_named_ranges().await;
    check.doubt_broken_snapshots();
    if fix != Fix::Nothing {
        check.check_width().await;
        check.repair().await?;
    } else if check.copied_suspect {
        check.check_copied(false).await?;
    }
    Ok(check.report)
}

impl Qcow2 {
    /// Checks the file of an open image, which takes no requests meanwhile.
    pub(super) async fn check_image(&self, fix: Fix, say: &dyn Fn(&str)) -> Result<CheckReport> {
        if fix != Fix::Nothing && self.is_read_only() {
            return Err(Error::from_errno(Errno::ROFS).prefix("Cannot repair the image"));
        }
        // Brings the file up to date, and what was freed back into its refcounts.
        self.close_image().await?;
        let file = self.children.require(ChildIdx::FILE)?;
        // The tables may have moved since the image was opened.
        let header = read_header(&file).await?;
        if fix == Fix::Nothing {
            return check(&file, &header, fix, say).await;
        }
        // What is in memory tells of the image as it was: it has to be opened again.
        self.corrupt.store(true, Release);
        let report = check(&file, &header, fix, say).await?;
        self.clear_unknown_autoclear(&file).await?;
        Ok(report)
    }

    /// Features that are not known are not kept up to date by a repair: they must not be believed after it.
    async fn clear_unknown_autoclear(&self, file: &Edge) -> Result<()> {
        let header = read_header(file).await?;
        let known = header.autoclear & (Autoclear::BITMAPS | Autoclear::RAW_DATA_FILE);
        if header.version < 3 || known == header.autoclear {
            return Ok(());
        }
        self.write_header_field(field_offsets::AUTOCLEAR, &known.bits().to_be_bytes()).await
    }
}

struct Checker<'a> {
    file: &'a Edge,
    header: &'a Header,
    geometry: Geometry,
    fix: Fix,
    say: &'a dyn Fn(&str),
    report: CheckReport,
    references: References,
    /// Clusters of the file, the last one perhaps in part.
    clusters: u64,
    refcount_table: Vec<u64>,
    /// Refcount table indices whose entry is broken, so that their refcounts cannot be known.
    broken_blocks: HashSet<u64>,
    /// A refcount was asked for that such a block would have.
    broken_block_told: bool,
    /// Some entry may claim the wrong thing of its cluster's refcount.
    copied_suspect: bool,
    /// All references have been seen, so that a cluster without any is free.
    complete: bool,
    /// The refcounts on disk are no place to repair them in.
    rebuild: bool,
    /// Corruptions of the refcount table and blocks themselves.
    broken_structure: u64,
    /// Clusters whose refcount is too low.
    too_low: u64,
    /// Clusters whose refcount could not be read.
    unknown: u64,
    /// Refcount table indices whose block cannot be read.
    unreadable_blocks: HashSet<u64>,
    /// Clusters of the refcount table and of its blocks, one for each reference counted.
    structure: Vec<u64>,
    /// Entries of tables to be replaced: byte offset in the file, new value.
    patches: Vec<(u64, u64)>,
    /// The bitmap directory to be written, where it must change.
    new_bitmaps: Option<bitmaps::NewDirectory>,
    /// The snapshot table that is to replace the one of the image.
    repaired_table: Option<RepairedTable>,
    /// Clusters whose refcounts are changed by the repair of something else, so that they are not told of.
    untold: BTreeSet<u64>,
    /// Clusters that leaked and are in use by what has been repaired.
    reused: BTreeSet<u64>,
    /// Refcount table indices whose block is none, or not one alone: it is not written to.
    unfit_blocks: HashSet<u64>,
    /// Something that is in use may not have been seen: nothing is freed.
    unseen: bool,
    /// The header names something else than it should: tables are left alone as well.
    misled: bool,
    /// Refcounts seem to have another width than the header says: nothing is repaired.
    wrong_width: bool,
    /// An entry of the snapshot table is none, or shares its L1 table.
    broken_snapshots: bool,
    /// Why.
    doubts: Vec<String>,
    /// Active L1 entries that refer to nothing sensible.
    l1_faults: u64,
    /// Active L1 entries have flags and refer to nothing.
    l1_flags_alone: bool,
    /// An L1 entry refers to something that is no L2 table.
    no_l2_table: bool,
    /// What the header and the snapshot table name: offset, length, and what it is.
    named: Vec<(u64, u64, &'static str)>,
}

impl<'a> Checker<'a> {
    fn new(file: &'a Edge, header: &'a Header, fix: Fix, say: &'a dyn Fn(&str)) -> Self {
        let geometry = header.geometry;
        let clusters = geometry.clusters_for(file.size());
        let report = CheckReport {
            total_clusters: geometry.clusters_for(header.size),
            // The header is there, whatever its refcount.
            image_end_offset: geometry.cluster_size(),
            ..CheckReport::default()
        };
        Self {
            file,
            header,
            geometry,
            fix,
            say,
            report,
            references: References::new(refcount_max(geometry.refcount_order)),
            clusters,
            refcount_table: Vec::new(),
            broken_blocks: HashSet::new(),
            broken_block_told: false,
            copied_suspect: false,
            complete: false,
            rebuild: false,
            broken_structure: 0,
            too_low: 0,
            unknown: 0,
            unreadable_blocks: HashSet::new(),
            structure: Vec::new(),
            patches: Vec::new(),
            new_bitmaps: None,
            repaired_table: None,
            untold: BTreeSet::new(),
            reused: BTreeSet::new(),
            unfit_blocks: HashSet::new(),
            unseen: false,
            misled: false,
            wrong_width: false,
            broken_snapshots: false,
            doubts: Vec::new(),
            l1_faults: 0,
            l1_flags_alone: false,
            no_l2_table: false,
            named: Vec::new(),
        }
    }

    /// Tells a finding that makes the image corrupt.
    fn corrupt(&mut self, finding: &str) {
        (self.say)(finding);
        self.report.corruptions = self.report.corruptions.saturating_add(1);
        self.copied_suspect = true;
    }

    /// Tells a corruption of the refcount table or its blocks.
    fn must_rebuild(&mut self, finding: &str) {
        self.corrupt(finding);
        self.broken_structure = self.broken_structure.saturating_add(1);
        self.rebuild = true;
    }

    /// Tells a corruption of the refcount block of this table index, which is not written to then.
    fn unfit_block(&mut self, index: u64, finding: &str) {
        self.must_rebuild(finding);
        self.unfit_blocks.insert(index);
    }

    /// Whether there is a block that has the refcount of a cluster, fit to be changed.
    fn has_block(&self, cluster: u64) -> bool {
        let index = cluster / self.geometry.refcounts_per_block();
        let entry = usize::try_from(index).ok().and_then(|at| self.refcount_table.get(at));
        entry.is_some_and(|entry| *entry != 0)
            && !self.unfit_blocks.contains(&index)
            && !self.unreadable_blocks.contains(&index)
    }

    /// Tells that a refcount cannot be read.
    fn refcount_unknown(&mut self, finding: &str) {
        self.failed(finding);
        self.unknown = self.unknown.saturating_add(1);
        self.rebuild = true;
    }

    /// Tells a corruption that is being repaired.
    fn say_repairing(&mut self, finding: &str) {
        (self.say)(&format!("Repairing {finding}"));
        self.report.corruptions_fixed = self.report.corruptions_fixed.saturating_add(1);
    }

    /// Notes that a range which has just been referred to belongs to the refcount structures.
    fn note_structure(&mut self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes);
        if bytes > 0 && offset < self.clusters.saturating_mul(self.geometry.cluster_size()) {
            let clusters = self.geometry.cluster_index(offset)..self.geometry.clusters_for(end);
            self.structure.extend(clusters.take_while(|cluster| *cluster <= self.clusters));
        }
    }

    /// Tells that something could not be looked at.
    fn failed(&mut self, finding: &str) {
        (self.say)(finding);
        self.report.check_errors = self.report.check_errors.saturating_add(1);
    }

    /// The words of a table of `entries` entries.
    async fn read_table(&self, offset: u64, entries: u64) -> Result<Vec<u64>> {
        let len = usize::try_from(entries.saturating_mul(8)).unwrap_or(usize::MAX);
        Ok(words(&self.file.read(offset, IoBufMut::new(len)).await?))
    }

    /// A cluster of the refcount structures.
    async fn read_block(&self, offset: u64) -> Result<IoBufMut> {
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(usize::MAX);
        self.file.read(offset, IoBufMut::new(len)).await
    }
}

/// The big-endian words in `bytes`.
fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_be_bytes)).collect()
}

#[cfg(test)]
mod repair_tests;
#[cfg(test)]
mod tests;
