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
        match self.refcounts.add(start, count).await {
            Ok(()) => run.keep(),
            Err(error) => {
                run.give_back();
                return Err(error);
            }
        }
        Ok(Counted { image: self, start, count, was })
    }
}
