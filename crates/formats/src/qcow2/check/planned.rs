//! Repairs that the check plans while it reads the tables.
//!
//! The check may find later that a pointer in the header seems wrong, so that no table may change. So a planned repair is
//! reported and counted only when it is decided: as a repair, or as a fault that stays. The lines after a planned repair
//! are held back until then, so that the order of the lines is the same as in `qemu-img check`. If more than [`MAX_HELD_LINES`]
//! lines would be held back, the other lines are reported immediately.

use std::fmt;
use std::ops::Range;

use oxblk_core::check::{Finding, FindingKind, Fix};

use super::Checker;

/// If this many lines are held back, further findings are reported immediately. Planned repairs are still held back.
const MAX_HELD_LINES: usize = 100_000;

/// Largest number of table entries that one check repairs. Further faulty entries are reported as faults that stay.
const MAX_PATCHES: usize = 500_000;

/// A line of the report that is held back.
pub(super) enum Line {
    Finding(Finding),
    /// The repairs of the table entries with these indices in `patches`.
    Patches(Range<usize>),
    Replacement(Replacement),
}

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
    FlagsWithoutOffset { index: u64, entry: u64 },
    /// An L2 entry with an unaligned host offset and without data.
    Unaligned { host: u64 },
    /// An L2 entry of a compressed cluster with a subcluster bitmap.
    StrayBitmap { index: u64, entry: u64 },
}

impl fmt::Display for EntryFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FlagsWithoutOffset { index, entry } => {
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

/// A structure that is replaced as a whole.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Structure {
    /// The snapshot table. The repairs of the table are counted when the header refers to the new table.
    SnapshotTable,
    BitmapDirectory,
}

/// A repair of a structure that is replaced as a whole.
pub(super) struct Replacement {
    pub(super) structure: Structure,
    /// The report of the repair.
    pub(super) repair: String,
    /// The report of the fault if the repair is refused.
    pub(super) fault: String,
    /// Number of faults.
    pub(super) count: u64,
}

impl Checker<'_> {
    /// Reports a line, or holds it back while a planned repair is not decided.
    pub(super) fn report_finding(&self, finding: Finding) {
        let mut held = self.held_lines.borrow_mut();
        if held.is_empty() || held.len() >= MAX_HELD_LINES {
            (self.report_to)(finding);
        } else {
            held.push(Line::Finding(finding));
        }
    }

    /// Plans the replacement of a table entry. Reports the fault instead if this check repairs no entries, or no more
    /// entries. Returns whether the replacement is planned.
    pub(super) fn plan_patch(&mut self, patch: Patch) -> bool {
        if self.fix != Fix::All || self.patches.len() >= MAX_PATCHES {
            self.report_corruption(&format!("ERROR {}", patch.fault));
            return false;
        }
        let (held, index) = (self.held_lines.get_mut(), self.patches.len());
        // Lines without another line between them become one line, so that the memory does not grow with them.
        match held.last_mut() {
            Some(Line::Patches(last)) => last.end = index.saturating_add(1),
            _ => held.push(Line::Patches(index..index.saturating_add(1))),
        }
        self.patches.push(patch);
        true
    }

    /// Plans the repair of a structure that is replaced as a whole.
    pub(super) fn plan_replacement(&mut self, replacement: Replacement) {
        self.held_lines.get_mut().push(Line::Replacement(replacement));
    }

    /// Reports the lines that were held back. The planned repairs are reported as repairs, because they are made now. Only
    /// the faults of a snapshot table that could not be read to its end stay.
    pub(super) fn accept_planned_repairs(&mut self) {
        for line in self.held_lines.take() {
            match line {
                Line::Finding(finding) => self.report_finding(finding),
                Line::Patches(range) => {
                    for index in range {
                        let fault = self.patches.get(index).map(|patch| patch.fault.to_string());
                        self.report_repair(&fault.unwrap_or_default());
                    }
                }
                Line::Replacement(Replacement {
                    structure: Structure::SnapshotTable,
                    repair,
                    fault,
                    count,
                }) => {
                    match self.repaired_table {
                        Some(_) => self.report_uncounted(FindingKind::Repair, repair),
                        // The table could not be read to its end.
                        None => self.report_remaining_faults(&fault, count),
                    }
                }
                Line::Replacement(Replacement { repair, count, .. }) => {
                    self.report_uncounted(FindingKind::Repair, repair);
                    self.report.corruptions_fixed =
                        self.report.corruptions_fixed.saturating_add(count);
                }
            }
        }
    }

    /// Drops all planned repairs. Reports the lines that were held back, and the faults of the planned repairs as faults
    /// that stay.
    pub(super) fn refuse_planned_repairs(&mut self) {
        self.repaired_table = None;
        self.new_bitmaps = None;
        let patches = std::mem::take(&mut self.patches);
        for line in self.held_lines.take() {
            match line {
                Line::Finding(finding) => self.report_finding(finding),
                Line::Patches(range) => {
                    for patch in patches.get(range).unwrap_or_default() {
                        self.report_corruption(&format!("ERROR {}", patch.fault));
                    }
                }
                Line::Replacement(Replacement { fault, count, .. }) => {
                    self.report_remaining_faults(&fault, count);
                }
            }
        }
    }

    /// Reports `count` faults in one line.
    pub(super) fn report_remaining_faults(&mut self, fault: &str, count: u64) {
        self.report_corruption(fault);
        // `report_corruption` has counted one fault.
        let more = count.saturating_sub(1);
        self.report.corruptions = self.report.corruptions.saturating_add(more);
    }
}
