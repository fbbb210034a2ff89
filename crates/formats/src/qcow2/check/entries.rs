//! What L2 entries say that they must not: places where no cluster can be, bitmaps that contradict them.

use oxblk_core::check::Fix;

use super::Checker;
use crate::qcow2::layout::{ExtendedEntry, L2Entry, Subclusters};

impl Checker<'_> {
    /// Tells that a cluster is not where one can be. Tells whether that is being repaired: of one that holds no data only
    /// the place is lost.
    pub(super) fn unaligned_cluster(&mut self, at: u64, both: ExtendedEntry) -> bool {
        let extended = self.geometry.extended_l2;
        let has_data = match extended {
            true => both.bitmap.allocated() != 0,
            false => !both.entry.has_zero_flag(),
        };
        let what = if has_data { "Data" } else { "Preallocated" };
        let offset = both.entry.raw_offset();
        let finding = format!(
            "offset={offset:x}: {what} cluster is not properly aligned; L2 entry corrupted."
        );
        if has_data || self.header.version < 3 || self.fix != Fix::All {
            self.corrupt(&format!("ERROR {finding}"));
            return false;
        }
        self.say_repairing(&finding);
        // The subclusters, or the flag, go on telling what it reads as.
        self.patches.push((at, if extended { 0 } else { L2Entry::zero_plain().0 }));
        true
    }

    /// Tells of a bitmap that contradicts itself or its entry.
    pub(super) fn check_bitmap(&mut self, both: ExtendedEntry) {
        let offset = both.entry.raw_offset();
        if offset == 0 && both.bitmap.allocated() != 0 {
            self.corrupt("ERROR: Unallocated cluster has non-zero subcluster allocation map");
        } else if both.bitmap.is_contradictory() {
            self.corrupt(&format!(
                "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ));
        }
    }

    /// Whether a compressed cluster has a bitmap and so does not count. That is told; a repair has it count all the same,
    /// lest the data be given up: everybody reads it.
    pub(super) fn has_stray_bitmap(&mut self, index: u64, at: u64, both: ExtendedEntry) -> bool {
        if both.bitmap == Subclusters::NONE {
            return false;
        }
        let finding = format!(
            "compressed cluster {index} with non-zero subcluster allocation bitmap, entry={:#x}",
            both.entry.0
        );
        if self.fix == Fix::All {
            self.say_repairing(&finding);
            self.patches.push((at.saturating_add(8), 0));
        } else {
            self.corrupt(&format!("ERROR {finding}"));
        }
        self.fix == Fix::Nothing
    }
}
