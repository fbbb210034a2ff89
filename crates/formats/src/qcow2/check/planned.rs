//! Repairs that the check plans while it reads the tables.
//!
//! The check may find later that a pointer in the header seems wrong, so that no table may change. So a planned repair is
//! reported and counted only when it is made, or as a fault when it is refused.

use std::fmt;

use oxblk_core::check::{FindingKind, Fix};

use super::Checker;

/// A faulty table entry that the repair replaces.
pub(super) struct Patch {
    /// Byte offset in the file.
    pub(super) offset: u64,
    /// The new value of the entry.
    pub(super) value: u64,
    pub(super) fault: EntryFault,
}

/// The fault of a table entry that can be repaired.
pub(super) enum EntryFault {
    /// An L1 entry with flags and without an offset.
    FlagsAlone { index: u64, entry: u64 },
    /// An L2 entry with an unaligned host offset and without data.
    Unaligned { host: u64 },
    /// An L2 entry of a compressed cluster with a subcluster bitmap.
    StrayBitmap { index: u64, entry: u64 },
}

impl fmt::Display for EntryFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FlagsAlone { index, entry } => {
                write!(f, "L1 entry {index} has flags but no offset: {entry:x}")
            }
            Self::Unaligned { host } => write!(
                f,
                "offset={host:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
            ),
            Self::StrayBitmap { index, entry } => write!(
                f,
                "compressed cluster {index} with non-zero subcluster allocation bitmap, entry={entry:#x}"
            ),
        }
    }
}

/// A repair of a structure that is replaced as a whole: the snapshot table or the bitmap directory.
pub(super) struct Replacement {
    /// The report of the repair.
    pub(super) repair: String,
    /// The report of the fault if the repair is refused.
    pub(super) fault: String,
    /// Number of faults.
    pub(super) count: u64,
}

impl Replacement {
    /// The repair of one fault, which has the same description in both reports.
    pub(super) fn one(finding: &str) -> Self {
        let (repair, fault) = (format!("Repairing {finding}"), format!("ERROR {finding}"));
        Self { repair, fault, count: 1 }
    }
}

/// Number of faults that these repairs remove.
pub(super) fn faults(repairs: &[Replacement]) -> u64 {
    repairs.iter().fold(0, |sum, repair| sum.saturating_add(repair.count))
}

impl Checker<'_> {
    /// Plans the replacement of a table entry, or reports the fault if this check repairs no entries.
    pub(super) fn plan_patch(&mut self, patch: Patch) {
        if self.fix == Fix::All {
            self.patches.push(patch);
        } else {
            self.corrupt(&format!("ERROR {}", patch.fault));
        }
    }

    /// Drops all planned repairs of tables, and reports the faults that stay.
    pub(super) fn refuse_planned(&mut self) {
        let snapshots = self.repaired_table.take().map(|table| table.repairs).unwrap_or_default();
        for repair in snapshots {
            self.refuse(&repair);
        }
        for patch in std::mem::take(&mut self.patches) {
            self.corrupt(&format!("ERROR {}", patch.fault));
        }
        self.new_bitmaps = None;
        for repair in std::mem::take(&mut self.bitmap_repairs) {
            self.refuse(&repair);
        }
    }

    fn refuse(&mut self, repair: &Replacement) {
        self.corrupt(&repair.fault);
        // `corrupt` has counted one fault.
        let more = repair.count.saturating_sub(1);
        self.report.corruptions = self.report.corruptions.saturating_add(more);
    }

    /// Reports repairs that are being made.
    pub(super) fn say_replaced(&self, repairs: &[Replacement]) {
        for repair in repairs {
            self.note(FindingKind::Repair, &*repair.repair);
        }
    }
}
