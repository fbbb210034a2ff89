//! Clusters whose refcount is raised, but to which no table refers yet.
//!
//! An operation first raises the refcount of a cluster and then writes a reference to it. It may fail in between. A [`Counted`]
//! that is dropped passes its references to the write-back, which releases them. So a failed operation leaks nothing.

use oxblk_core::Result;

use super::Qcow2;
use super::allocator::Reserved;
use super::write_back::ReleaseReason;

/// Host clusters with one reference each, which this value owns.
pub(super) struct Counted<'a> {
    image: &'a Qcow2,
    start: u64,
    count: u64,
    was: ReleaseReason,
}

impl Counted<'_> {
    /// Call this when a table refers to the first `count` clusters: dropping no longer releases them.
    pub(super) fn keep_first(&mut self, count: u64) {
        let count = count.min(self.count);
        self.start = self.start.saturating_add(count);
        self.count = self.count.saturating_sub(count);
    }

    /// Call this when a table refers to all clusters: dropping releases nothing.
    pub(super) fn keep(mut self) {
        self.count = 0;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        if self.count > 0 {
            self.image.drop_clusters(self.start, self.count, self.was);
        }
    }
}

impl Qcow2 {
    /// Counts one reference to each cluster of a run whose contents have been written. `was` is the release reason if the
    /// references are dropped again.
    ///
    /// # Errors
    /// As the file reports. The run is then freed.
    pub(super) async fn count<'a>(
        &'a self,
        run: Reserved<'a>,
        was: ReleaseReason,
    ) -> Result<Counted<'a>> {
        let (start, count) = (run.start(), run.count());
        let mut counting = Counting { image: self, run: Some(run), at: start, was };
        let end = start.saturating_add(count);
        if let Err(error) = self.refcounts.add_up_to(&mut counting.at, end).await {
            if let Some(rest) = counting.stop() {
                rest.give_back();
            }
            return Err(error);
        }
        if let Some(run) = counting.run.take() {
            run.keep();
        }
        Ok(Counted { image: self, start, count, was })
    }
}

/// A run whose clusters are being counted, one after the other. If this is dropped because counting failed or was cancelled,
/// the write-back releases the counted clusters. The uncounted clusters are freed.
struct Counting<'a> {
    image: &'a Qcow2,
    run: Option<Reserved<'a>>,
    /// The first cluster that has not been counted.
    at: u64,
    was: ReleaseReason,
}

impl<'a> Counting<'a> {
    /// Passes the references that have been counted to the write-back. Returns the clusters that were not counted.
    fn stop(&mut self) -> Option<Reserved<'a>> {
        let mut run = self.run.take()?;
        let counted = self.at.saturating_sub(run.start());
        if counted > 0 {
            let start = run.start();
            run.split_first(counted).keep();
            self.image.drop_clusters(start, counted, self.was);
        }
        Some(run)
    }
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        drop(self.stop());
    }
}
