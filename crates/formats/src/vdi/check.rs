//! Check and repair of an image. No two entries of the block map may refer to the same block, and the number of allocated
//! blocks in the header must be right.
//!
//! Faults that QEMU finds have the same messages and are counted in the same way as in `qemu-img check`. In addition, an
//! entry is an error if its block lies after the end of the file, or if the number of allocated blocks in the header does
//! not include its block. In an image without such errors, a block that this number includes is a leak if no entry refers
//! to it.
//!
//! A repair loses no readable data:
//!
//! - If several entries refer to the same block, each entry after the first gets its own copy of the block. An entry whose
//!   block number is too large also gets a copy. If the block contains only zeroes, the entry is set to unallocated instead.
//! - A file that is too short is extended. The missing part reads as zeroes, as before.
//! - The last blocks are moved into the gaps, and the number of blocks in use is written to the header.
//!
//! Leaks are freed only if the image has no other fault, or all other faults have been repaired.

use std::sync::atomic::Ordering::Acquire;

use oxblk_core::check::{self, CheckReport, FindingKind, Fix};
use oxblk_core::{Errno, Error, Result};

use super::Vdi;
use super::entry::Entry;
use super::survey::{Fault, Finding, Survey};
use crate::blocks::BlockImage;

/// A repair makes at most as many copies as the file has blocks, plus this number.
const SPARE_COPIES: u64 = 64;
/// Approximate number of faulty entries that are reported individually. Further faulty entries are only counted.
const MAX_REPORTED: u64 = 100_000;

/// The result of a check.
struct Findings {
    survey: Survey,
    report: CheckReport,
    /// Entries that need a block of their own. The list is not complete if there are more than `max_copies`.
    misplaced: Vec<Finding>,
    /// Number of entries that need a block of their own.
    misplaced_count: u64,
    cut_off: bool,
}

impl Findings {
    fn take(
        &mut self,
        finding: Finding,
        max_repairs: u64,
        report_finding: &dyn Fn(check::Finding),
    ) {
        let (reported, count) = (self.report.corruptions, u64::from(finding.count));
        self.report.corruptions = reported.saturating_add(count);
        if reported < MAX_REPORTED {
            report_finding(check::Finding::new(FindingKind::Corruption, describe(finding)));
        }
        if reported <= MAX_REPORTED && self.report.corruptions > MAX_REPORTED {
            report_finding(check::Finding::new(
                FindingKind::Corruption,
                "ERROR: more entries of the block map are faulty",
            ));
        }
        if finding.fault == Fault::CutOff {
            self.cut_off = true;
            return;
        }
        self.misplaced_count = self.misplaced_count.saturating_add(count);
        if self.misplaced_count <= max_repairs {
            let end = finding.index.saturating_add(finding.count);
            let one = |index| Finding { index, count: 1, ..finding };
            self.misplaced.extend((finding.index..end).map(one));
        }
    }
}

fn describe(finding: Finding) -> String {
    let Finding { fault, index, block, .. } = finding;
    match fault {
        // QEMU also prints the number of the block twice.
        Fault::Shared => format!("ERROR: block index {block} also used by {block}"),
        Fault::TooLarge => format!("ERROR: block index {index} too large, is {block}"),
        Fault::CutOff => {
            format!("ERROR: block index {index} behind the end of the file, is {block}")
        }
    }
}

impl Vdi {
    /// Checks the image and repairs the faults that `fix` allows. No request is in flight.
    ///
    /// # Errors
    /// `EROFS` if a read-only image is to be repaired, and the errors of requests to the image file.
    pub(super) async fn check_image(
        &self,
        fix: Fix,
        report_finding: &dyn Fn(check::Finding),
    ) -> Result<CheckReport> {
        if !self.access.is_read_only() {
            self.write_back().await?;
        } else if fix != Fix::Nothing {
            return Err(Error::from_errno(Errno::ROFS).prefix("Cannot repair the image"));
        }
        let mut findings = self.find(report_finding).await?;
        let report = &mut findings.report;
        let sound = (report.corruptions, report.check_errors) == (0, 0);
        let repaired = match fix {
            Fix::Nothing => false,
            Fix::Leaks => sound && report.leaks > 0,
            Fix::All => !sound || report.leaks > 0,
        };
        if repaired && self.repair(&findings, report_finding).await? {
            let report = &mut findings.report;
            report.corruptions_fixed = std::mem::take(&mut report.corruptions);
            report.leaks_fixed = std::mem::take(&mut report.leaks);
        }
        Ok(findings.report)
    }

    /// If more entries than this need a block of their own, the image is not repaired. Without this limit, a map with many
    /// faulty entries could make the file very large.
    fn max_copies(&self) -> u64 {
        u64::from(self.whole_blocks.load(Acquire)).saturating_add(SPARE_COPIES)
    }

    async fn find(&self, report_finding: &dyn Fn(check::Finding)) -> Result<Findings> {
        let mut findings = Findings {
            survey: Survey::default(),
            report: CheckReport::default(),
            misplaced: Vec::new(),
            misplaced_count: 0,
            cut_off: false,
        };
        let max_repairs = self.max_copies();
        let survey = self.survey(|finding| {
            findings.take(finding, max_repairs, report_finding);
            true
        });
        findings.survey = survey.await?;
        let (survey, report) = (&findings.survey, &mut findings.report);
        let (mapped, end) = (survey.mapped, survey.end());
        let count = self.count_on_disk().unwrap_or(self.header.allocated);
        let leaks = count
            .checked_sub(mapped)
            .filter(|_| report.corruptions == 0 && end <= count && count <= self.map.len());
        match leaks {
            Some(0) => {}
            Some(leaks) => {
                report_finding(check::Finding::new(
                    FindingKind::Leak,
                    format!("Leaked blocks: {leaks} of the {count} allocated blocks are unused"),
                ));
                report.leaks = leaks.into();
            }
            None if mapped != count => {
                report_finding(check::Finding::new(
                    FindingKind::Corruption,
                    format!("ERROR: allocated blocks mismatch, is {mapped}, should be {count}"),
                ));
                report.corruptions = report.corruptions.saturating_add(1);
            }
            None if end > count => {
                report_finding(check::Finding::new(
                    FindingKind::Corruption,
                    format!("ERROR: blocks up to {end} in use, but {count} are allocated"),
                ));
                report.corruptions = report.corruptions.saturating_add(1);
            }
            None => {}
        }
        Ok(findings)
    }

    /// Repairs all faults. Returns false and repairs nothing if too many entries need a block of their own.
    async fn repair(
        &self,
        findings: &Findings,
        report_finding: &dyn Fn(check::Finding),
    ) -> Result<bool> {
        let Findings { survey, misplaced, misplaced_count, cut_off, .. } = findings;
        if *misplaced_count > self.max_copies() {
            report_finding(check::Finding::new(
                FindingKind::Failure,
                format!(
                    "Not repaired: {misplaced_count} entries need blocks of their own, which are more than the file has"
                ),
            ));
            return Ok(false);
        }
        let limit = self.map.len();
        let count = self.count_on_disk().unwrap_or(self.header.allocated);
        let max_repairs = if count <= limit { count } else { 0 };
        let behind = max_repairs.max(self.whole_blocks.load(Acquire)).max(survey.end());
        let spare = u64::from(limit.saturating_sub(behind));
        let mut used = survey.used.clone();
        if !misplaced.is_empty() && spare >= *misplaced_count {
            used.insert_range(0..behind);
        }
        let repair = self.allocator.begin_repair(&used, max_repairs);
        for finding in misplaced {
            report_finding(check::Finding::new(
                FindingKind::Repair,
                format!("Repairing block index {}", finding.index),
            ));
        }
        self.copy_misplaced(misplaced).await?;
        if *cut_off {
            self.lengthen(self.allocator.end()).await?;
        }
        self.fill_gaps(u64::MAX).await?;
        self.write_block_count().await?;
        self.trim().await?;
        repair.done();
        Ok(true)
    }

    async fn copy_misplaced(&self, misplaced: &[Finding]) -> Result<()> {
        let mut copies = Vec::new();
        for finding in misplaced {
            let data = self.read_block(self.header.block_offset(finding.block)).await?;
            if oxblk_ring::is_zero(&data) {
                self.set_entry(finding.index, Entry::Zero);
                continue;
            }
            let run = self.allocator.reserve(1).await?;
            self.write_block(run.start, data).await?;
            copies.push((finding.index, run));
        }
        self.link_copies(copies, Vec::new()).await
    }
}
