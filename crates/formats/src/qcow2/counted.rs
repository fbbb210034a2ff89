//! Clusters that are counted and that nothing refers to yet.
//!
//! Between the moment in which a refcount becomes one and the moment in which something refers to the cluster an operation
//! may fail. A [`Counted`] that is dropped gives its references to the write-back, so that a failure leaks nothing.

use oxblk_core::Result;

use super::Qcow2;
use super::allocator::Reserved;
use super::write_back::ReleaseReason;

/// Host clusters with one reference each that is held by this alone.
pub(super) struct Counted<'a> {
    image: &'a Qcow2,
    start: u64,
    count: u64,
    was: ReleaseReason,
}

impl Counted<'_> {
    /// Something refers to the first `count` of them.
    pub(super) fn keep_first(&mut self, count: u64) {
        let count = count.min(self.count);
        self.start = self.start.saturating_add(count);
        self.count = self.count.saturating_sub(count);
    }

    /// Something refers to all of them.
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
    /// Counts one reference to each cluster of a run whose contents are written; `was` tells what they are to hold.
    ///
    /// # Errors
    /// As the file reports. The run is then given back.
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

/// A run whose clusters are being counted, one after the other. If this is dropped, because counting failed or was cancelled,
/// those that have been counted go to the write-back, and the others are given back.
struct Counting<'a> {
    image: &'a Qcow2,
    run: Option<Reserved<'a>>,
    /// The first cluster that has not been counted.
    at: u64,
    was: ReleaseReason,
}

impl<'a> Counting<'a> {
    /// Has the write-back drop the references that have been counted. Gives the clusters that were not counted.
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
