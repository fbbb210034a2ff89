//! Checking L2 entries: entries of images with a data file, host offsets that are not aligned to a cluster, and subcluster
//! bitmaps that are invalid.

use oxblk_core::check::Fix;

use super::Checker;
use super::planned::{EntryFault, Patch};
use super::walk::Usage;
use crate::qcow2::layout::{ExtendedEntry, L2Entry, Subclusters};

impl Checker<'_> {
    /// Checks an L2 entry of an image with a data file. Clusters of the data file have no refcounts, but the entry must
    /// be valid.
    pub(super) fn count_data_file_entry(
        &mut self,
        index: u64,
        at: u64,
        l2_entry: ExtendedEntry,
        usage: Option<&mut Usage>,
    ) {
        let entry = l2_entry.entry;
        if entry.is_compressed() {
            let raw = entry.0;
            self.report_corruption(&format!(
                "ERROR compressed cluster {index} with data file, entry={raw:#x}"
            ));
            return;
        }
        if entry.reserved() != 0 {
            self.report_corruption(&format!(
                "ERROR found l2 entry with reserved bits set: {:x}",
                entry.0
            ));
        }
        let offset = entry.raw_offset();
        let is_at_zero = entry.copied() && (self.geometry.extended_l2 || !entry.has_zero_flag());
        self.check_bitmap(l2_entry);
        if offset == 0 && !is_at_zero {
            return;
        }
        if !self.geometry.is_aligned(offset) && self.unaligned_cluster(at, l2_entry) {
            return;
        }
        self.copied_suspect |= !entry.copied();
        if let Some(usage) = usage {
            usage.count(offset, 1, self.geometry.cluster_size());
        }
    }

    /// Reports a cluster whose host offset is not aligned. Returns whether the entry is being repaired. The repair removes the
    /// host offset from the entry. This repair is possible only in version 3, and only if the cluster contains no data.
    pub(super) fn unaligned_cluster(&mut self, at: u64, l2_entry: ExtendedEntry) -> bool {
        let extended = self.geometry.extended_l2;
        let has_data = match extended {
            true => l2_entry.bitmap.allocated() != 0,
            false => !l2_entry.entry.has_zero_flag(),
        };
        let host = l2_entry.entry.raw_offset();
        let fault = EntryFault::Unaligned { host };
        if has_data {
            self.report_corruption(&format!(
                "ERROR offset={host:x}: Data cluster is not properly aligned; L2 entry corrupted."
            ));
            return false;
        }
        if self.header.version < 3 {
            self.report_corruption(&format!("ERROR {fault}"));
            return false;
        }
        // The subcluster bitmap or the zero flag still defines the contents of the guest cluster.
        let value = if extended { 0 } else { L2Entry::zero_plain().0 };
        self.plan_patch(Patch { offset: at, value, fault })
    }

    /// Reports a subcluster bitmap that contradicts itself or its L2 entry.
    pub(super) fn check_bitmap(&mut self, l2_entry: ExtendedEntry) {
        let offset = l2_entry.entry.raw_offset();
        let is_nowhere = offset == 0 && !(self.geometry.data_file && l2_entry.entry.copied());
        if is_nowhere && l2_entry.bitmap.allocated() != 0 {
            self.report_corruption(
                "ERROR: Unallocated cluster has non-zero subcluster allocation map",
            );
        } else if l2_entry.bitmap.is_contradictory() {
            self.report_corruption(&format!(
                "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ));
        }
    }

    /// Reports a compressed cluster whose subcluster bitmap is not 0. Returns whether to skip the count of the references of
    /// this cluster. A check without repair skips the count. A repair counts the references, so that the data is not freed:
    /// reads of a compressed cluster ignore the bitmap.
    pub(super) fn has_stray_bitmap(
        &mut self,
        index: u64,
        at: u64,
        l2_entry: ExtendedEntry,
    ) -> bool {
        if l2_entry.bitmap == Subclusters::NONE {
            return false;
        }
        let fault = EntryFault::StrayBitmap { index, entry: l2_entry.entry.0 };
        self.plan_patch(Patch { offset: at.saturating_add(8), value: 0, fault });
        self.fix == Fix::Nothing
    }
}
