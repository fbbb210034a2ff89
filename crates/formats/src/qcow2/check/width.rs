//! Checking whether the refcount width in the header is plausible.
//!
//! With a wrong width, wrong refcounts are read, for example refcounts that are too high or 0. If a repair lowered these
//! refcounts, clusters in use would be free as soon as the header is correct again.
//!
//! The first refcount block contains the refcounts of the first clusters for every width. If another width has fewer than half
//! as many differences to the counted references of these clusters, the width in the header is doubtful. Then nothing is
//! repaired. There are two exceptions. [`Fix::All`] corrects all refcounts with the width of the header if all references are
//! known. In version 2, the width is always 16 bits.

use oxblk_core::check::Fix;

use super::Checker;
use crate::qcow2::layout::{RefcountTableEntry, refcount_get};

/// The valid refcount orders: 1 to 64 bits.
const ORDERS: std::ops::RangeInclusive<u32> = 0..=6;

impl Checker<'_> {
    /// Notes if the width is doubtful. The caller has already compared the refcounts with the counted references.
    pub(super) async fn check_width(&mut self) {
        let faults = self.report.leaks > 0 || self.report.corruptions > 0;
        let rewritten = self.fix == Fix::All && self.complete;
        if !faults || rewritten || self.header.version < 3 {
            return;
        }
        if let Some(order) = self.better_order().await {
            self.wrong_width = true;
            let (stated, likely) = (1 << self.geometry.refcount_order, 1 << order);
            self.note_unknown_references(&format!(
                "ERROR the header says that refcounts have {stated} bits, but they seem to have {likely}: \
                 clusters that seem leaked may be in use"
            ));
        }
    }

    /// The refcount order, other than the order in the header, that fits the first refcount block best. `None` unless this
    /// order has fewer than half as many differences as the order in the header.
    async fn better_order(&self) -> Option<u32> {
        let offset = RefcountTableEntry(*self.refcount_table.first()?).raw_offset();
        if offset == 0 || self.broken_blocks.contains(&0) || self.unreadable_blocks.contains(&0) {
            return None;
        }
        let block = self.read_block(offset).await.ok()?;
        let differences = |order| {
            // A block contains at least this many refcounts, for every width.
            let clusters = (self.geometry.cluster_size() / 8).min(self.clusters);
            let differs = |cluster: &u64| {
                refcount_get(&block, *cluster, order) != Some(self.references.get(*cluster).count())
            };
            (0..clusters).filter(differs).count()
        };
        let own = self.geometry.refcount_order;
        let best = ORDERS.filter(|order| *order != own).min_by_key(|order| differences(*order))?;
        (differences(best).saturating_mul(2) < differences(own)).then_some(best)
    }
}
