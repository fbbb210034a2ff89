//! Check of an image. QEMU has no check of this format.
//!
//! - Each entry of the BAT must refer to a block inside the file that does not overlap the metadata or another block.
//! - The footer at the end and its copy at the beginning must be valid and equal, and the checksum of the header must be
//!   correct.
//! - If the image has no other fault, the space of each block to which no entry refers is a leak.
//!
//! The module `repair` repairs the faults.

use oxblk_core::check::{self, CheckReport, FindingKind, Fix};
use oxblk_core::{Errno, Error, Result};

use super::Vpc;
use super::footer::FOOTER_BYTES;
use super::metadata::{Copy, Found, Metadata, last_sector, read_footer, read_metadata};
use super::slots::Row;
use super::survey::{Fault, Finding, Survey};

/// A repair copies at most as many blocks as the file has, plus this number.
const SPARE_COPIES: u64 = 64;
/// Approximate number of faulty entries that are reported individually. Further faulty entries are only counted.
const MAX_REPORTED: u64 = 100_000;

/// The result of a check.
pub(super) struct Findings {
    pub(super) survey: Survey,
    pub(super) report: CheckReport,
    /// Entries whose block must be copied or removed. The list is not complete if there are more than `max_copies`.
    pub(super) misplaced: Vec<Finding>,
    /// Number of entries whose block must be copied or removed.
    pub(super) misplaced_count: u64,
    /// The metadata that the check has read from the file.
    pub(super) metadata: Metadata,
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
            report_finding(check::Finding::new(
                FindingKind::Corruption,
                format!("ERROR: {finding}"),
            ));
        }
        if reported <= MAX_REPORTED && self.report.corruptions > MAX_REPORTED {
            let text = "ERROR: more entries of the BAT are faulty";
            report_finding(check::Finding::new(FindingKind::Corruption, text));
        }
        if finding.fault == Fault::CutOff {
            // The repair extends the file, and does not change the entry.
            return;
        }
        self.misplaced_count = self.misplaced_count.saturating_add(count);
        if self.misplaced_count <= max_repairs {
            let end = finding.index.saturating_add(finding.count);
            let one = |index| Finding { index, count: 1, ..finding };
            self.misplaced.extend((finding.index..end).map(one));
        }
    }

    fn corruption(&mut self, text: &'static str, report_finding: &dyn Fn(check::Finding)) {
        self.report.corruptions = self.report.corruptions.saturating_add(1);
        report_finding(check::Finding::new(FindingKind::Corruption, text));
    }

    fn take_metadata(&mut self, report_finding: &dyn Fn(check::Finding)) {
        match self.metadata.at_start {
            Copy::Good => {}
            Copy::Damaged => {
                self.corruption(
                    "ERROR: the copy of the footer at the beginning is damaged",
                    report_finding,
                );
            }
            Copy::Different => {
                let text = "ERROR: the copy of the footer at the beginning differs from the footer";
                self.corruption(text, report_finding);
            }
        }
        match self.metadata.at_end {
            Copy::Good => {}
            Copy::Damaged => {
                self.corruption("ERROR: the file does not end with a footer", report_finding);
            }
            Copy::Different => {
                self.corruption(
                    "ERROR: the footer differs from its copy at the beginning",
                    report_finding,
                );
            }
        }
        if !self.metadata.header.has_correct_checksum() {
            self.corruption("ERROR: the checksum of the header is wrong", report_finding);
        }
    }
}

impl Vpc {
    /// Checks the image and repairs the faults that `fix` allows. No request is in flight.
    ///
    /// # Errors
    /// `EROFS` if a read-only image is to be repaired, `Corrupt` if the file no longer contains a dynamic image, and the
    /// errors of requests to the image file.
    pub(super) async fn check_image(
        &self,
        fix: Fix,
        report_finding: &dyn Fn(check::Finding),
    ) -> Result<CheckReport> {
        if !self.access.is_read_only() {
            self.complete_image().await?;
        } else if fix != Fix::Nothing {
            return Err(Error::from_errno(Errno::ROFS).prefix("Cannot repair the image"));
        }
        let mut findings = self.find(report_finding).await?;
        let report = &findings.report;
        let is_sound = (report.corruptions, report.check_errors) == (0, 0);
        let repairs = match fix {
            Fix::Nothing => false,
            Fix::Leaks => is_sound && report.leaks > 0,
            Fix::All => !is_sound || report.leaks > 0,
        };
        if repairs && self.repair(&findings, report_finding).await? {
            let report = &mut findings.report;
            report.corruptions_fixed = std::mem::take(&mut report.corruptions);
            report.leaks_fixed = std::mem::take(&mut report.leaks);
        }
        Ok(findings.report)
    }

    /// If the blocks of more entries than this must be copied or removed, the image is not repaired. Without this limit, a
    /// BAT with many faulty entries could make the file very large.
    pub(super) fn max_copies(&self, file_size: u64) -> u64 {
        (file_size / self.metadata.header.stride()).saturating_add(SPARE_COPIES)
    }

    async fn find(&self, report_finding: &dyn Fn(check::Finding)) -> Result<Findings> {
        let file = self.file()?;
        let Found::Dynamic { metadata, .. } = read_metadata(&file, self.rule).await? else {
            return Err(Error::corrupt("The footer was changed while the image was open"));
        };
        let mut metadata = *metadata;
        let max_repairs = self.max_copies(file.size());
        let mut findings = Findings {
            survey: Survey::default(),
            report: CheckReport::default(),
            misplaced: Vec::new(),
            misplaced_count: 0,
            metadata,
        };
        let survey = self.survey(|finding| {
            findings.take(finding, max_repairs, report_finding);
            true
        });
        let survey = survey.await?;
        let row = self.row(&survey, file.size());
        let end = self.row_end(&row);
        let mut file_end = file.size();
        if metadata.at_end == Copy::Good {
            file_end = last_sector(file_end);
        } else if !file.node().limits().grows
            && read_footer(&file, end).await? == Ok(metadata.footer)
        {
            // A device has a fixed length. So the footer may lie directly after the last block, and not in the last sector.
            metadata.at_end = Copy::Good;
            file_end = end;
        }
        findings.metadata = metadata;
        findings.survey = survey;
        findings.take_metadata(report_finding);
        if findings.report.corruptions == 0 && row.is_complete {
            findings.report.leaks = self.leaks(&row, end, file_end);
        }
        if findings.report.leaks > 0 {
            let text =
                format!("Leaked blocks: {} blocks of the file are unused", findings.report.leaks);
            report_finding(check::Finding::new(FindingKind::Leak, text));
        }
        findings.report.image_end_offset = end.saturating_add(FOOTER_BYTES);
        Ok(findings)
    }

    fn row_end(&self, row: &Row) -> u64 {
        let slots = row.used.max().map_or(0, |last| u64::from(last) + 1);
        row.first.saturating_add(slots.saturating_mul(self.metadata.header.stride()))
    }

    fn leaks(&self, row: &Row, end: u64, file_end: u64) -> u64 {
        let slots = row.used.max().map_or(0, |last| u64::from(last) + 1);
        let gaps = slots.saturating_sub(row.used.len());
        gaps.saturating_add(file_end.saturating_sub(end) / self.metadata.header.stride())
    }
}
