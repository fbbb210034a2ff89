//! Whether the refcounts have the width that the header tells.
//!
//! Read with a wrong width, refcounts look too high or are zero. To lower them would free clusters in use once the header
//! is right again. The first refcount block holds the refcounts of the first clusters whatever their width is. If another
//! width fits what has been counted much better there, the one in the header is doubtful. Then nothing is repaired, unless
//! everything may be repaired and all references are known: that writes all refcounts with the width of the header.

use oxblk_core::check::Fix;

use super::Checker;
use crate::qcow2::layout::{RefcountTableEntry, refcount_get};

/// The orders that a header can tell: 1 to 64 bits.
const ORDERS: std::ops::RangeInclusive<u32> = 0..=6;

impl Checker<'_> {
    /// Notes that the width is doubtful. The counts and the refcounts must have been compared before.
    pub(super) async fn check_width(&mut self) {
        let faults = self.report.leaks > 0 || self.report.corruptions > 0;
        let rewritten = self.fix == Fix::All && self.complete;
        if !faults || rewritten || self.header.version < 3 {
            return;
        }
        if let Some(order) = self.better_order().await {
            self.wrong_width = true;
            let (told, fits) = (1 << self.geometry.refcount_order, 1 << order);
            self.not_seen(&format!(
                "ERROR the header says that refcounts have {told} bits, but they seem to have {fits}: \
                 what seems to leak may be in use"
            ));
        }
    }

    /// The order that fits the first refcount block much better than that of the header.
    async fn better_order(&self) -> Option<u32> {
        let offset = RefcountTableEntry(*self.refcount_table.first()?).raw_offset();
        if offset == 0 || self.broken_blocks.contains(&0) || self.unreadable_blocks.contains(&0) {
            return None;
        }
        let block = self.read_block(offset).await.ok()?;
        let misfits = |order| {
            // So many refcounts of every width are in a block.
            let clusters = (self.geometry.cluster_size() / 8).min(self.clusters);
            let misfit = |cluster: &u64| {
                refcount_get(&block, *cluster, order) != Some(self.references.get(*cluster).count())
            };
            (0..clusters).filter(misfit).count()
        };
        let own = self.geometry.refcount_order;
        let best = ORDERS.filter(|order| *order != own).min_by_key(|order| misfits(*order))?;
        (misfits(best).saturating_mul(2) < misfits(own)).then_some(best)
    }
}
