//! Clusters whose refcount is raised, but to which no table refers yet.
//!
//! A task first raises the refcount of a cluster and then writes a reference to the cluster. The task may fail or be cancelled
//! between these two steps. [`Counted`] owns the added references until the task reports that tables refer to the clusters. A
//! [`Counted`] that is dropped before this report passes its references to the list of dropped references (see `dropped`), and
//! the next write-back cycle lowers the refcounts. So a task that fails or is cancelled leaks no cluster, and a cluster with a
//! raised refcount never becomes free too early.
//!
//! All code that raises refcounts of new clusters in the cache uses [`Counted`].

use oxblk_core::Result;

use super::Clusters;
use super::allocator::Reserved;
use super::dropped::ReleaseReason;

/// Owns references to a run of host clusters, the same number for each cluster.
pub(in crate::qcow2) struct Counted<'a> {
    pub(super) clusters: &'a Clusters,
    pub(super) start: u64,
    pub(super) count: u64,
    /// Number of owned references to each cluster.
    pub(super) times: u64,
    pub(super) reason: ReleaseReason,
}

impl Counted<'_> {
    /// Call this when a table refers to the first `count` clusters. The drop of the [`Counted`] then keeps their references.
    pub(in crate::qcow2) fn keep_first(&mut self, count: u64) {
        let count = count.min(self.count);
        self.start = self.start.saturating_add(count);
        self.count = self.count.saturating_sub(count);
    }

    /// Call this when a table refers to all clusters. All references are then kept.
    pub(in crate::qcow2) fn keep(mut self) {
        self.count = 0;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.clusters.dropped.push(self.start, self.count, self.times, self.reason);
    }
}

impl Clusters {
    /// Like [`Self::count`], but for clusters whose refcount blocks exist. This function never creates a refcount block.
    pub(super) async fn count_in_place<'a>(
        &'a self,
        run: Reserved<'a>,
        reason: ReleaseReason,
    ) -> Result<Counted<'a>> {
        let mut counting = Counting::new(self, run, reason);
        while counting.at < counting.end {
            if let Err(error) = self.add_one(counting.at).await {
                return counting.finish(Err(error));
            }
            counting.at = counting.at.saturating_add(1);
        }
        counting.finish(Ok(()))
    }

    /// Takes ownership of one reference that was already added to the refcount of `cluster`.
    pub(super) fn own_reference(&self, cluster: u64, reason: ReleaseReason) -> Counted<'_> {
        Counted { clusters: self, start: cluster, count: 1, times: 1, reason }
    }
}

/// A run whose refcounts are being raised, one cluster after the other. If [`Counting`] is dropped because the task failed or
/// was cancelled, the added references are dropped, and the remaining clusters are freed.
pub(super) struct Counting<'a> {
    clusters: &'a Clusters,
    run: Option<Reserved<'a>>,
    /// The first cluster whose refcount has not been raised.
    pub(super) at: u64,
    /// The end of the run.
    pub(super) end: u64,
    reason: ReleaseReason,
}

impl<'a> Counting<'a> {
    pub(super) fn new(clusters: &'a Clusters, run: Reserved<'a>, reason: ReleaseReason) -> Self {
        let (at, end) = (run.start(), run.start().saturating_add(run.count()));
        Self { clusters, run: Some(run), at, end, reason }
    }

    /// Returns the added references. If `outcome` is an error, drops the added references and frees the remaining clusters.
    pub(super) fn finish(mut self, outcome: Result<()>) -> Result<Counted<'a>> {
        if let Err(error) = outcome {
            if let Some(rest) = self.drop_added() {
                rest.give_back();
            }
            return Err(error);
        }
        let (clusters, reason) = (self.clusters, self.reason);
        let (start, count) = self.run.take().map_or((0, 0), |run| {
            let place = (run.start(), run.count());
            run.keep();
            place
        });
        Ok(Counted { clusters, start, count, times: 1, reason })
    }

    /// Drops the added references. Returns the remaining clusters, whose refcounts have not been raised.
    fn drop_added(&mut self) -> Option<Reserved<'a>> {
        let mut run = self.run.take()?;
        let counted = self.at.saturating_sub(run.start());
        if counted > 0 {
            let start = run.start();
            run.split_first(counted).keep();
            self.clusters.dropped.push(start, counted, 1, self.reason);
        }
        Some(run)
    }
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        drop(self.drop_added());
    }
}
