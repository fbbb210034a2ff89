//! New metadata clusters that are written and have refcounts, but to which no metadata refers yet.
//!
//! Unless [`NewClusters::keep`] is called, dropping [`NewClusters`] frees these clusters. So a change that fails leaks no
//! clusters.

use oxblk_core::{Result, WriteFlags, run_all};
use oxblk_ring::{IoBuf, IoBufMut};
use roaring::RoaringTreemap;

use super::super::clusters::ReleaseReason;
use super::Bitmaps;

/// New metadata clusters that one change has written.
pub(super) struct NewClusters<'a> {
    bitmaps: &'a Bitmaps,
    clusters: RoaringTreemap,
    kept: bool,
}

impl<'a> NewClusters<'a> {
    /// Makes an empty set of clusters.
    pub(super) fn new(bitmaps: &'a Bitmaps) -> Self {
        Self { bitmaps, clusters: RoaringTreemap::new(), kept: false }
    }

    /// Writes each of `pieces` (one cluster each) to a new cluster, and returns the cluster numbers.
    pub(super) async fn write(&mut self, mut pieces: Vec<IoBufMut>) -> Result<Vec<u64>> {
        let bits = self.bitmaps.geometry.cluster_bits;
        let file = self.bitmaps.image_state.file()?;
        let mut clusters = Vec::new();
        while !pieces.is_empty() {
            let wanted = u64::try_from(pieces.len()).unwrap_or(u64::MAX);
            let mut run = self.bitmaps.clusters.reserve(wanted).await?;
            run.begin_write();
            let (start, count) = (run.start(), run.count());
            let rest = pieces.split_off(usize::try_from(count).unwrap_or(0).min(pieces.len()));
            let writes = (start..).zip(pieces).map(|(cluster, piece)| {
                file.write(cluster << bits, piece.freeze(), WriteFlags::empty())
            });
            run_all(writes).await?;
            self.bitmaps.clusters.count(run, ReleaseReason::Table).await?.keep();
            self.note(start, count);
            clusters.extend(start..start.saturating_add(count));
            pieces = rest;
        }
        Ok(clusters)
    }

    /// Writes `bytes` to new contiguous clusters, and returns the number of the first cluster. The part of the last cluster
    /// behind `bytes` keeps its old contents.
    pub(super) async fn write_contiguous(&mut self, bytes: Vec<u8>) -> Result<u64> {
        let geometry = self.bitmaps.geometry;
        let count = geometry.clusters_for(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        let mut run = self.bitmaps.clusters.reserve_contiguous(count).await?;
        run.begin_write();
        let start = run.start();
        let file = self.bitmaps.image_state.file()?;
        let place = start << geometry.cluster_bits;
        file.write(place, IoBuf::from(bytes), WriteFlags::empty()).await?;
        self.bitmaps.clusters.count(run, ReleaseReason::Table).await?.keep();
        self.note(start, count);
        Ok(start)
    }

    fn note(&mut self, start: u64, count: u64) {
        let geometry = self.bitmaps.geometry;
        self.clusters.insert_range(start..start.saturating_add(count));
        let bytes = count << geometry.cluster_bits;
        self.bitmaps.clusters.note_metadata(start << geometry.cluster_bits, bytes);
    }

    /// The highest cluster number plus one, or 0 if there are no clusters.
    pub(super) fn end(&self) -> u64 {
        self.clusters.max().map_or(0, |last| last.saturating_add(1))
    }

    /// Writes the refcounts of the clusters, and flushes. After this, metadata may refer to the clusters.
    pub(super) async fn make_durable(&self) -> Result<()> {
        self.bitmaps.clusters.write_back_refcounts().await?;
        self.bitmaps.image_state.file()?.flush().await
    }

    /// Keeps the clusters allocated, because metadata refers or may refer to these clusters.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for NewClusters<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.bitmaps.clusters.drop_table_clusters(&self.clusters);
        }
    }
}
