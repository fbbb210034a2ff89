//! Check and repair of an image. Each entry for an allocated cluster or table must refer to a place inside the file. No two
//! entries may refer to the same cluster or table. Faults are counted as in `qemu-img check`.
//!
//! A repair loses no readable data. An invalid entry is set to 0. If an L2 entry refers to the cluster of an earlier L2
//! entry or to a cluster of a table, the entry gets its own copy of the cluster. Tables that overlap are not repaired,
//! because it is not known which part of the disk they map. To remove unused clusters, the last clusters of the file are
//! moved into them. The clusters are moved only if the image has no other fault or all other faults have been repaired.

use oxblk_core::check::{self, CheckReport, FindingKind, Fix};
use oxblk_core::{Errno, Error, Result};

use super::Qed;
use super::lookup::set;
use super::survey::{Fault, Survey};

/// If there are more faults than the file has clusters, plus this number, no fault is repaired.
const SPARE_FAULTS: u64 = 64;

/// The faults of an image, for the repair.
#[derive(Default)]
struct Faults {
    list: Vec<Fault>,
    /// Number of faults that can be repaired: invalid L1 entries, and faulty L2 entries.
    count: u64,
    /// Number of clusters in which tables overlap other structures.
    shared: u64,
}

/// Consecutive invalid L2 entries that are reported together.
#[derive(Default)]
struct BadRun {
    first: Option<(u64, u64)>,
    count: u64,
    end: u64,
}

fn corruption(text: String) -> check::Finding {
    check::Finding::new(FindingKind::Corruption, text)
}

impl BadRun {
    fn add(
        &mut self,
        guest: u64,
        entry: u64,
        cluster: u64,
        report_finding: &dyn Fn(check::Finding),
    ) {
        if self.first.is_none() || self.end != guest {
            self.report(report_finding);
            *self = Self { first: Some((guest, entry)), count: 0, end: guest };
        }
        self.count = self.count.saturating_add(1);
        self.end = guest.saturating_add(cluster);
    }

    fn report(&mut self, report_finding: &dyn Fn(check::Finding)) {
        let Some((guest, entry)) = self.first.take() else { return };
        let more = match self.count {
            1 => String::new(),
            count => format!(", and {} more entries behind it", count.saturating_sub(1)),
        };
        report_finding(corruption(format!(
            "ERROR: L2 entry {entry:#x} of offset {guest:#x} is invalid{more}"
        )));
    }
}

impl Qed {
    /// Checks the image and repairs the faults that `fix` allows. No request is in flight.
    ///
    /// # Errors
    /// `EROFS` if a read-only image is to be repaired, and the errors of requests to the image file and of filling gaps.
    pub(super) async fn check_image(
        &self,
        fix: Fix,
        report_finding: &dyn Fn(check::Finding),
    ) -> Result<CheckReport> {
        if !self.is_read_only() {
            self.check_running()?;
            self.write_back(true).await?;
        } else if fix != Fix::Nothing {
            return Err(Error::from_errno(Errno::ROFS).prefix("Cannot repair the image"));
        }
        let clusters = self.geometry.index(self.file()?.size());
        let (survey, faults) =
            self.find_faults(clusters.saturating_add(SPARE_FAULTS), report_finding).await?;
        let clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
        let used = survey.used.range_cardinality(0..clusters);
        let mut report = CheckReport {
            total_clusters: self.size().div_ceil(self.geometry.cluster()),
            allocated_clusters: survey.allocated,
            fragmented_clusters: survey.fragmented,
            corruptions: faults.count.saturating_add(faults.shared),
            leaks: u64::from(clusters).saturating_sub(used),
            ..CheckReport::default()
        };
        let is_listed = u64::try_from(faults.list.len()).is_ok_and(|len| len == faults.count);
        let repairs = fix == Fix::All && is_listed && faults.count > 0;
        let all_repaired = faults.shared == 0 && (faults.count == 0 || repairs);
        let closes_gaps = fix != Fix::Nothing && all_repaired && report.leaks > 0;
        if !repairs && !closes_gaps {
            return Ok(report);
        }
        let repair = self.allocator.begin_repair(&survey.used, 0);
        if repairs {
            for fault in &faults.list {
                self.repair_fault(*fault).await?;
            }
            self.write_back(true).await?;
            report.corruptions = faults.shared;
            report.corruptions_fixed = faults.count;
        }
        if all_repaired && fix != Fix::Nothing {
            self.close_gaps(u64::MAX).await?;
            report.leaks_fixed = std::mem::take(&mut report.leaks);
        }
        repair.done();
        Ok(report)
    }

    /// Surveys the image, reports its faults, and returns the first `max_repairs` faults that can be repaired.
    async fn find_faults(
        &self,
        max_repairs: u64,
        report_finding: &dyn Fn(check::Finding),
    ) -> Result<(Survey, Faults)> {
        let mut faults = Faults::default();
        let mut bad = BadRun::default();
        let cluster = self.geometry.cluster();
        let survey = self.survey(|fault| {
            if let Fault::BadData { guest, entry } = fault {
                bad.add(guest, entry, cluster, report_finding);
            } else {
                bad.report(report_finding);
            }
            match fault {
                Fault::BadTable { index, entry } => {
                    report_finding(corruption(format!(
                        "ERROR: L1 entry {entry:#x} at {index} is invalid"
                    )));
                }
                Fault::SharedTable { index, entry, clusters } => {
                    report_finding(corruption(format!(
                        "ERROR: L2 table {entry:#x} of L1 entry {index} shares {clusters} clusters"
                    )));
                    faults.shared = faults.shared.saturating_add(clusters);
                    return;
                }
                Fault::SharedData { guest, entry } => report_finding(corruption(format!(
                    "ERROR: cluster {entry:#x} of offset {guest:#x} is used more than once"
                ))),
                Fault::BadData { .. } => {}
            }
            faults.count = faults.count.saturating_add(1);
            if faults.count <= max_repairs {
                faults.list.push(fault);
            }
        });
        let survey = survey.await?;
        bad.report(report_finding);
        Ok((survey, faults))
    }

    async fn repair_fault(&self, fault: Fault) -> Result<()> {
        match fault {
            Fault::BadTable { index, .. } => self.set_l1_entry(index, 0),
            Fault::BadData { guest, .. } => self.set_data_entry(guest, 0).await?,
            Fault::SharedData { guest, entry } => {
                let run = self.reserve(1).await?;
                self.lengthen(run.end()).await?;
                let to = self.offset_of(run.start);
                self.copy_in_file(entry, to, self.geometry.cluster()).await?;
                self.set_data_entry(guest, to).await?;
                run.keep();
            }
            Fault::SharedTable { .. } => {}
        }
        Ok(())
    }

    /// Changes the L2 entry of the cluster at the disk offset `guest`. The L2 table must exist.
    pub(super) async fn set_data_entry(&self, guest: u64, entry: u64) -> Result<()> {
        let (_, index) = self.slice_of(guest);
        let slice = self.pin_slice(guest).await?;
        let slice = slice.ok_or_else(|| Error::corrupt("an L2 table no longer exists"))?;
        set(&mut slice.begin_change(), index, entry);
        Ok(())
    }
}
