//! Check and repair of an image. The image must have been closed, and the field `data_off` must be valid. Each entry of the
//! BAT must refer to a cluster inside the file, and no two entries may refer to the same cluster. The file must end with
//! the last cluster. Faults that QEMU finds have the same messages and are counted in the same way as in `qemu-img check`.
//!
//! A repair loses no readable data. If an entry refers to the cluster of an earlier entry, to an offset that is not the
//! start of a cluster, or to an offset before the first cluster, the entry gets its own copy of the data. If the data
//! consists of zeroes, the entry is set to 0 instead. An entry that refers to an offset after the end of the file is set to
//! 0. A file that ends inside a cluster is extended. The file is truncated after its last cluster only if the image has no
//! other fault, or all other faults have been repaired.

use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::Errno;
use oxblk_core::check::{self, CheckReport, FindingKind, Fix};
use oxblk_core::{Error, Result, WriteFlags};
use oxblk_ring::IoBufMut;

use super::Parallels;
use super::survey::{Fault, Finding, Survey};
use crate::blocks::BlockImage;

/// A repair handles at most as many faulty entries as the file has clusters, plus this number.
const SPARE_COPIES: u64 = 64;

/// Faulty entries of one kind. The list contains at most as many entries as a repair can handle. `count` includes all
/// faulty entries.
#[derive(Default)]
struct Faults {
    entries: Vec<Finding>,
    count: u64,
}

impl Faults {
    fn add(&mut self, finding: Finding, max_repairs: u64) {
        self.count = self.count.saturating_add(finding.count.into());
        if self.count <= max_repairs {
            let end = finding.index.saturating_add(finding.count);
            let one = |index| Finding { index, count: 1, ..finding };
            self.entries.extend((finding.index..end).map(one));
        }
    }
}

struct Findings {
    survey: Survey,
    outside: Faults,
    duplicates: Faults,
}

impl Parallels {
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
        let max_repairs = u64::from(self.whole_clusters.load(Acquire)).saturating_add(SPARE_COPIES);
        let (mut outside, mut duplicates) = (Faults::default(), Faults::default());
        let survey = self.survey(|finding| match finding.fault {
            Fault::Outside | Fault::CutOff => outside.add(finding, max_repairs),
            Fault::Duplicate => duplicates.add(finding, max_repairs),
        });
        let survey = survey.await?;
        let findings = Findings { survey, outside, duplicates };
        let faults = findings.outside.count.saturating_add(findings.duplicates.count);
        let all = fix == Fix::All && faults <= max_repairs;
        let verb = |repairs: bool| if repairs { "Repairing" } else { "ERROR" };
        let kind = |repairs: bool, kind| if repairs { FindingKind::Repair } else { kind };
        let report_finding = |kind, text: String| report_finding(check::Finding::new(kind, text));

        let mut report = CheckReport {
            total_clusters: self.map.len().into(),
            allocated_clusters: findings.survey.allocated,
            fragmented_clusters: findings.survey.fragmented,
            ..CheckReport::default()
        };
        if self.unclean.load(Acquire) {
            report_finding(
                kind(all, FindingKind::Corruption),
                format!("{} image was not closed correctly", verb(all)),
            );
            report.corruptions = report.corruptions.saturating_add(1);
        }
        if !self.data_offset_is_valid.load(Acquire) {
            report_finding(
                kind(all, FindingKind::Corruption),
                format!("{} data_off field has incorrect value", verb(all)),
            );
            report.corruptions = report.corruptions.saturating_add(1);
        }
        for finding in &findings.outside.entries {
            report_finding(
                kind(all, FindingKind::Corruption),
                format!("{} cluster {} is outside image", verb(all), finding.index),
            );
        }
        report.corruptions = report.corruptions.saturating_add(faults);
        let end = self.header.cluster_offset(findings.survey.end());
        report.image_end_offset = end;
        let behind = self.file()?.size().saturating_sub(end);
        let sound = report.corruptions == 0;
        if behind > 0 && !self.header.has_extension {
            let repairs = all || fix == Fix::Leaks && sound;
            report_finding(
                kind(repairs, FindingKind::Leak),
                format!("{} space leaked at the end of the image {behind}", verb(repairs)),
            );
            report.leaks = behind.div_ceil(self.header.cluster);
        }
        for finding in &findings.duplicates.entries {
            report_finding(
                kind(all, FindingKind::Corruption),
                format!("{} duplicate offset in BAT entry {}", verb(all), finding.index),
            );
        }
        if faults > max_repairs {
            report_finding(
                FindingKind::Corruption,
                format!("ERROR {faults} BAT entries are wrong, more than the file has clusters"),
            );
        }
        if all && !(sound && report.leaks == 0) || fix == Fix::Leaks && sound && report.leaks > 0 {
            self.repair(&findings).await?;
            report.corruptions_fixed = std::mem::take(&mut report.corruptions);
            report.leaks_fixed = std::mem::take(&mut report.leaks);
        }
        Ok(report)
    }

    /// Repairs all faults in `findings`.
    async fn repair(&self, findings: &Findings) -> Result<()> {
        let size = self.file()?.size();
        // Clusters whose data must be copied stay in use until the BAT on disk refers to the copies.
        let mut used = findings.survey.used.clone();
        for finding in findings.outside.entries.iter().chain(&findings.duplicates.entries) {
            used.insert_range(self.touched(finding.host, size));
        }
        let repair = self.allocator.begin_repair(&used, 0);
        if !self.data_offset_is_valid.load(Acquire) {
            self.write_data_offset().await?;
        }
        for finding in &findings.outside.entries {
            match finding.fault {
                Fault::CutOff => {}
                _ if finding.host >= size => self.set_entry(finding.index, 0),
                _ => self.give_copy(finding).await?,
            }
        }
        for finding in &findings.duplicates.entries {
            self.give_copy(finding).await?;
        }
        self.lengthen(self.allocator.end()).await?;
        // A write-back flushes the copies before it writes the entries that refer to them.
        self.write_back().await?;
        self.allocator.set_used(&self.survey_sound().await?.used, None, 0);
        self.trim().await?;
        repair.done();
        // `complete_image` clears the field `in_use` of the header on disk when the image is closed.
        self.unclean.store(false, Release);
        Ok(())
    }

    /// The clusters of a file of `size` bytes that overlap the range of one cluster length at offset `host`.
    fn touched(&self, host: u64, size: u64) -> Range<u32> {
        let end = host.saturating_add(self.header.cluster).min(size);
        let index = |at: u64| at.saturating_sub(self.header.data_offset);
        let number = |cluster: u64| u32::try_from(cluster).unwrap_or(u32::MAX);
        let first = index(host) / self.header.cluster;
        number(first)..number(index(end).div_ceil(self.header.cluster))
    }

    /// Copies the data to which an entry refers to a new cluster, and changes the entry. If the data consists of zeroes,
    /// sets the entry to 0 instead.
    async fn give_copy(&self, finding: &Finding) -> Result<()> {
        let file = self.file()?;
        let buf = IoBufMut::new(usize::try_from(self.header.cluster).unwrap_or(0));
        let data = file.read(finding.host, buf).await?.freeze();
        if oxblk_ring::is_zero(&data) {
            self.set_entry(finding.index, 0);
            return Ok(());
        }
        let run = self.allocator.reserve(1).await?;
        self.lengthen(run.end()).await?;
        let at = self.header.cluster_offset(run.start);
        file.write(at, data, WriteFlags::empty()).await?;
        self.set_entry(finding.index, self.header.entry(run.start).unwrap_or_default());
        // The entry in memory refers to the cluster now, even if a later step fails.
        run.keep();
        Ok(())
    }
}
