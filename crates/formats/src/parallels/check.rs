//! Checking an image: was it closed, does each entry of the BAT name a cluster of its own in the file, and does the file end with
//! the last one? Findings are worded and counted as `qemu-img check` does.
//!
//! A repair loses nothing that can be read: an entry that shares a cluster with another gets a copy, one that names nothing in
//! the file becomes 0, and a file that ends within a cluster is made longer. What lies behind the last cluster is cut off only where
//! nothing else is wrong, or all that is wrong has been repaired.

use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::Errno;
use oxblk_core::check::{CheckReport, Fix};
use oxblk_core::{Error, Result, WriteFlags};
use oxblk_ring::IoBufMut;

use super::Parallels;
use super::survey::{Fault, Finding, Survey};

/// Copies that a repair makes at most beside as many as the file has clusters.
const SPARE_COPIES: u64 = 64;

/// Faulty entries of one kind, as many as are repaired at most.
#[derive(Default)]
struct Faults {
    entries: Vec<Finding>,
    count: u64,
}

impl Faults {
    fn add(&mut self, finding: Finding, most: u64) {
        self.count = self.count.saturating_add(finding.count.into());
        if self.count <= most {
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
    /// Checks the image, which takes no requests meanwhile, and repairs what `fix` allows.
    pub(super) async fn check_image(&self, fix: Fix, say: &dyn Fn(&str)) -> Result<CheckReport> {
        if !self.is_read_only() {
            self.write_back().await?;
        } else if fix != Fix::Nothing {
            return Err(Error::from_errno(Errno::ROFS).prefix("Cannot repair the image"));
        }
        let most = u64::from(self.whole_clusters.load(Acquire)).saturating_add(SPARE_COPIES);
        let (mut outside, mut duplicates) = (Faults::default(), Faults::default());
        let survey = self.survey(|finding| match finding.fault {
            Fault::Outside | Fault::CutOff => outside.add(finding, most),
            Fault::Duplicate => duplicates.add(finding, most),
        });
        let survey = survey.await?;
        let findings = Findings { survey, outside, duplicates };
        let faults = findings.outside.count.saturating_add(findings.duplicates.count);
        let all = fix == Fix::All && faults <= most;
        let verb = |repairs: bool| if repairs { "Repairing" } else { "ERROR" };

        let mut report = CheckReport {
            total_clusters: self.map.len().into(),
            allocated_clusters: findings.survey.allocated,
            fragmented_clusters: findings.survey.fragmented,
            ..CheckReport::default()
        };
        if self.unclean.load(Acquire) {
            say(&format!("{} image was not closed correctly", verb(all)));
            report.corruptions = report.corruptions.saturating_add(1);
        }
        if !self.data_offset_is_told.load(Acquire) {
            say(&format!("{} data_off field has incorrect value", verb(all)));
            report.corruptions = report.corruptions.saturating_add(1);
        }
        for finding in &findings.outside.entries {
            say(&format!("{} cluster {} is outside image", verb(all), finding.index));
        }
        report.corruptions = report.corruptions.saturating_add(faults);
        let end = self.header.cluster_offset(findings.survey.end());
        report.image_end_offset = end;
        let behind = self.file()?.size().saturating_sub(end);
        let sound = report.corruptions == 0;
        if behind > 0 && !self.header.has_extension {
            let repairs = all || fix == Fix::Leaks && sound;
            say(&format!("{} space leaked at the end of the image {behind}", verb(repairs)));
            report.leaks = behind.div_ceil(self.header.cluster);
        }
        for finding in &findings.duplicates.entries {
            say(&format!("{} duplicate offset in BAT entry {}", verb(all), finding.index));
        }
        if faults > most {
            say(&format!("ERROR {faults} BAT entries are wrong, more than the file has clusters"));
        }
        if all && !(sound && report.leaks == 0) || fix == Fix::Leaks && sound && report.leaks > 0 {
            self.repair(&findings).await?;
            report.corruptions_fixed = std::mem::take(&mut report.corruptions);
            report.leaks_fixed = std::mem::take(&mut report.leaks);
        }
        Ok(report)
    }

    /// Repairs everything that was found.
    async fn repair(&self, findings: &Findings) -> Result<()> {
        // Until all is done, it is not known which clusters are in use.
        self.surveyed.store(false, Release);
        self.allocator.set_used(&findings.survey.used, None, 0);
        if !self.data_offset_is_told.load(Acquire) {
            self.tell_data_offset().await?;
        }
        let size = self.file()?.size();
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
        // The copies are durable before the entries that name them are written.
        self.write_back().await?;
        self.surveyed.store(true, Release);
        self.trim().await?;
        // The header is told so when the image is closed.
        if self.unclean.swap(false, Release) {
            self.in_use.store(true, Release);
        }
        Ok(())
    }

    /// Copies what an entry names to a cluster of its own, if it is not zeroes.
    async fn give_copy(&self, finding: &Finding) -> Result<()> {
        let file = self.file()?;
        let buf = IoBufMut::new(usize::try_from(self.header.cluster).unwrap_or(0));
        let data = file.read(finding.host, buf).await?.freeze();
        if oxblk_ring::is_zero(&data) {
            self.set_entry(finding.index, 0);
            return Ok(());
        }
        let run = self.allocator.reserve(1)?;
        self.lengthen(run.end()).await?;
        let at = self.header.cluster_offset(run.start);
        file.write(at, data, WriteFlags::empty()).await?;
        self.set_entry(finding.index, self.header.entry(run.start).unwrap_or_default());
        // The map names the cluster from here on, whatever fails later.
        run.keep();
        Ok(())
    }
}
