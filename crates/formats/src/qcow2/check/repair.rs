//! Repairing the faults that a check found.
//!
//! With this order, a crash during the repair does not damage the guest's data:
//!
//! 1. Replace faulty table entries, and the bitmap directory if it is faulty.
//! 2. Raise refcounts that are too low. Then make the header refer to the repaired snapshot table, if there is one.
//! 3. Free leaked clusters.
//! 4. Correct copied flags.
//!
//! Each step is written and flushed before the next step starts. If refcounts cannot be repaired in place,
//! [`super::rebuild`] writes new refcount structures.
//!
//! If a refcount block, the rebuilt refcounts or a new snapshot table cannot be written, the failure is reported and the other
//! repairs continue, unless it is then unknown to which refcount table or snapshot table the header refers. If some references
//! may be unknown, because something could not be read or a pointer in the header seems wrong, no refcount is lowered: at
//! worst, clusters stay leaked.

use oxblk_core::check::{FindingKind, Fix};
use oxblk_core::{Errno, Error, Result, WriteFlags};
use oxblk_ring::IoBuf;

use super::Checker;
use crate::qcow2::layout::{Incompatible, field_offsets, refcount_get, refcount_set};

/// The direction in which refcounts change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Refcounts that are too low are set to the counted references.
    Raise,
    /// Refcounts that are too high are set to the counted references.
    Lower,
}

impl Checker<'_> {
    /// Repairs what `fix` allows, after the check is complete.
    pub(super) async fn repair(&mut self) -> Result<()> {
        let is_refused = self.report_doubts();
        if self.wrong_width || self.wrong_pointer {
            self.refuse_planned_repairs();
        }
        if !self.wrong_width {
            self.make_repairs().await?;
        }
        if is_refused {
            self.report_next_step();
        }
        Ok(())
    }

    async fn make_repairs(&mut self) -> Result<()> {
        self.plan_to_drop_shared_directory().await;
        self.accept_planned_repairs();
        self.write_patches().await?;
        self.write_new_bitmaps().await?;
        if self.fix == Fix::All {
            self.write_snapshot_table().await?;
        }
        if self.rebuild {
            if self.fix != Fix::All {
                self.report_uncounted(
                    FindingKind::Failure,
                    "ERROR need to rebuild refcount structures",
                );
                return Err(Error::from_errno(Errno::IO));
            }
            self.report_uncounted(FindingKind::Repair, "Rebuilding refcount structure");
            if let Err(error) = self.rebuild_refcounts().await {
                self.report_failure(&format!("ERROR failed to rebuild the refcounts: {error}"));
                if self.table_unknown {
                    return Err(error);
                }
                // Raise the refcounts that have an entry in the old structures. Do not lower any refcount: the old
                // structures may overlap with other data.
                self.raise_refcounts().await?;
                self.complete = false;
            }
        } else if self.fix == Fix::All && (self.too_low > 0 || self.repaired_table.is_some()) {
            self.raise_refcounts().await?;
        }
        let replaced = self.repaired_table.is_some() || !self.dropped_bitmaps.is_empty();
        self.activate_snapshot_table().await?;
        self.forget_dropped_bitmaps();
        if (self.report.leaks > 0 || replaced) && self.complete {
            let lowered = self.change_refcounts(Change::Lower).await?;
            self.report.leaks = self.report.leaks.saturating_sub(lowered);
            self.report.leaks_fixed = self.report.leaks_fixed.saturating_add(lowered);
        }
        if self.copied_suspect {
            // `Fix::Leaks` does not change the tables of an image that has corruptions or check errors. With a wrong pointer in
            // the header, the flags are only checked.
            let repair = !self.wrong_pointer
                && (self.fix == Fix::All
                    || (self.report.corruptions, self.report.check_errors) == (0, 0));
            self.check_copied(repair).await?;
            self.file.flush().await?;
        }
        if (self.report.corruptions, self.report.check_errors) == (0, 0) {
            self.mark_clean().await?;
        }
        Ok(())
    }

    async fn raise_refcounts(&mut self) -> Result<()> {
        let raised = self.change_refcounts(Change::Raise).await?;
        self.too_low = self.too_low.saturating_sub(raised);
        self.count_repaired(raised);
        Ok(())
    }

    /// Counts `count` corruptions as repaired.
    pub(super) fn count_repaired(&mut self, count: u64) {
        self.report.corruptions = self.report.corruptions.saturating_sub(count);
        self.report.corruptions_fixed = self.report.corruptions_fixed.saturating_add(count);
    }

    /// Replaces one entry of a table.
    pub(super) async fn patch(&self, offset: u64, value: u64) -> Result<()> {
        let bytes = IoBuf::from(value.to_be_bytes().to_vec());
        self.file.write(offset, bytes, WriteFlags::empty()).await
    }

    async fn write_patches(&mut self) -> Result<()> {
        for patch in std::mem::take(&mut self.patches) {
            self.patch(patch.offset, patch.value).await?;
        }
        self.file.flush().await
    }

    /// Changes refcounts in place, block by block. Returns the number of changes that were reported.
    async fn change_refcounts(&mut self, change: Change) -> Result<u64> {
        let (per_block, order) =
            (self.geometry.refcounts_per_block(), self.geometry.refcount_order);
        let end = self.clusters_counted();
        let mut changed = 0_u64;
        for (index, offset) in self.blocks_to_read(end) {
            if self.unwritable_blocks.contains(&index) {
                continue;
            }
            // The comparison of the refcounts has already reported the read error.
            let Ok(mut block) = self.read_block(offset).await else { continue };
            let (mut lines, mut dirty) = (Vec::new(), false);
            let start = index.saturating_mul(per_block);
            for (at, cluster) in (0_u64..).zip(start..start.saturating_add(per_block).min(end)) {
                let refcount = refcount_get(&block, at, order).unwrap_or(0);
                let count = self.references.get(cluster).count();
                let wanted = match change {
                    Change::Raise => refcount < count,
                    Change::Lower => refcount > count,
                };
                let reused = change == Change::Lower && self.reused.remove(&cluster);
                if reused {
                    dirty = true;
                    lines.push((cluster, refcount, 0));
                }
                if !wanted || refcount_set(&mut block, at, order, count).is_err() {
                    continue;
                }
                dirty = true;
                if !reused && !self.unreported.contains(&cluster) {
                    lines.push((cluster, refcount, count));
                }
            }
            if !dirty {
                continue;
            }
            if let Err(error) = self.file.write(offset, block.into(), WriteFlags::empty()).await {
                self.report_failure(&format!(
                    "ERROR writing refcount block {index} failed: {error}"
                ));
                continue;
            }
            for (cluster, refcount, count) in lines {
                self.report_uncounted(
                    FindingKind::Repair,
                    format!("Repairing cluster {cluster} refcount={refcount} reference={count}"),
                );
                changed = changed.saturating_add(1);
            }
        }
        self.file.flush().await?;
        // Copied flags that were correct for the old refcounts may be wrong now.
        self.copied_suspect |= changed > 0;
        Ok(changed)
    }

    /// Clears the dirty and the corrupt bit of a repaired image.
    async fn mark_clean(&mut self) -> Result<()> {
        let unclean = Incompatible::DIRTY | Incompatible::CORRUPT;
        if self.header.version < 3 || !self.header.incompatible.intersects(unclean) {
            return Ok(());
        }
        let flags = self.header.incompatible - unclean;
        self.patch(field_offsets::INCOMPATIBLE, flags.bits()).await?;
        self.file.flush().await
    }
}
