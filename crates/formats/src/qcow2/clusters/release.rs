//! Releasing references to host clusters, and freeing clusters after their quarantine.
//!
//! A dropped reference is first added to a list (see `dropped`). A write-back cycle lowers the refcount of the cluster when
//! the reference is no longer in the image file. A cluster whose refcount reaches 0 is quarantined (see `allocator`).

use std::collections::VecDeque;

use oxblk_core::{ErrorKind, Result};
use oxblk_ring::MutexGuard;
use oxblk_ring::perturb::point;
use roaring::RoaringTreemap;

use super::Clusters;
use super::allocator::Quarantined;
use super::dropped::{Dropped, ReleaseReason};
use crate::qcow2::image_state::run_options::Modes;
use crate::qcow2::layout::{L2Entry, L2Kind};

impl Clusters {
    /// Frees the quarantined clusters whose epoch has passed. Clusters that must be discarded on the host are discarded first.
    pub(in crate::qcow2) async fn free_quarantined(&self) -> Result<()> {
        if !self.allocator.has_quarantined() {
            return Ok(());
        }
        // Without this lock, a scan would find clusters free that are still being discarded.
        let _guard = self.allocator.scanning.lock().await;
        let ended = self.allocator.end_quarantine(self.image_state.epochs());
        if ended.is_empty() {
            return Ok(());
        }
        let file = self.image_state.file()?;
        let mut ended = Discarding { clusters: self, runs: merge(ended).into() };
        while let Some(run) = ended.runs.front() {
            let bits = self.geometry.cluster_bits;
            let end = (run.cluster.saturating_add(run.count) << bits).min(file.size());
            let start = run.cluster << bits;
            if start < end {
                // The discard only saves space, so its errors are ignored.
                let _ = file.discard(start, end - start).await;
            }
            if let Some(run) = ended.runs.pop_front() {
                self.allocator.free(run);
            }
        }
        Ok(())
    }

    /// Lowers the refcounts for the references in `dropped`, and removes these references from the list. The caller ensures
    /// that these references are no longer in the image file. If a refcount cannot be read, this reference and the following
    /// references stay in the list, and the error is returned. A refcount that is already 0 is not an error: the guest's
    /// data is on the disk, and a repair corrects such refcounts.
    ///
    /// `check_release` gets the byte offset of a cluster that was not freed as a table, and refuses to free protected
    /// metadata. If `check_release` refuses, the reference is removed from the list, and the error is returned.
    pub(in crate::qcow2) async fn lower(
        &self,
        dropped: &mut VecDeque<Dropped>,
        check_release: impl AsyncFn(u64) -> Result<()>,
    ) -> Result<()> {
        if dropped.is_empty() {
            return Ok(());
        }
        let mut missing = Missing::default();
        // A scan must not find a cluster with refcount 0 before the cluster is quarantined.
        let _guard = self.allocator.scanning.lock().await;
        while let Some(run) = dropped.front().copied() {
            let outcome = self.lower_first(run, &check_release, &mut missing).await;
            if matches!(&outcome, Err(error) if error.kind() != ErrorKind::Corrupt) {
                return outcome;
            }
            if let Some(run) = dropped.front_mut() {
                run.cluster = run.cluster.saturating_add(1);
                run.count = run.count.saturating_sub(1);
                if run.count == 0 {
                    dropped.pop_front();
                }
            }
            outcome?;
        }
        Ok(())
    }

    /// Lowers the refcount of the first cluster of a run.
    async fn lower_first(
        &self,
        Dropped { cluster, times, reason, .. }: Dropped,
        check_release: &impl AsyncFn(u64) -> Result<()>,
        missing: &mut Missing,
    ) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let (offset, size) = (cluster << bits, self.geometry.cluster_size());
        if reason != ReleaseReason::Table {
            check_release(offset).await?;
        }
        match self.drop_up_to(cluster, times).await {
            Ok(before) if before > times => return Ok(()),
            Ok(before) if before < times => missing.add(offset),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                missing.add(offset);
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        point();
        if reason == ReleaseReason::Table {
            self.allocator.forget_metadata(offset, size);
        }
        self.tail.close_cluster(cluster, bits);
        let (epoch, discard) = (self.image_state.epochs().current(), self.passes_discard(reason));
        self.allocator.quarantine(Quarantined { epoch, cluster, count: 1, discard });
        Ok(())
    }

    /// Passes the references of the entries `old` to the write-back. The caller has marked the slices of these entries dirty.
    pub(in crate::qcow2) fn drop_entries(&self, old: &[L2Entry], reason: ReleaseReason) {
        self.drop_entries_of(old, 1, reason);
    }

    /// Like [`Self::drop_entries`], for the entries of an L2 table to which `times` L1 entries referred.
    pub(in crate::qcow2) fn drop_entries_of(
        &self,
        old: &[L2Entry],
        times: u64,
        reason: ReleaseReason,
    ) {
        if self.geometry.data_file {
            // Clusters of a data file have no refcounts.
            return;
        }
        for entry in old {
            let (host, bytes) = match entry.kind(self.geometry, self.image_state.version()) {
                Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) => {
                    (host, self.geometry.cluster_size())
                }
                Ok(L2Kind::Compressed { host, len }) => (host, len),
                _ => continue,
            };
            let first = host >> self.geometry.cluster_bits;
            let last = host.saturating_add(bytes).saturating_sub(1) >> self.geometry.cluster_bits;
            let count = last.saturating_sub(first).saturating_add(1);
            self.drop_references(first, count, times, reason);
        }
    }

    /// Passes one reference to each of the `count` host clusters from `cluster` on to the write-back.
    pub(in crate::qcow2) fn drop_clusters(&self, cluster: u64, count: u64, reason: ReleaseReason) {
        self.drop_references(cluster, count, 1, reason);
    }

    /// Passes `times` references to each of the `count` host clusters from `cluster` on to the write-back.
    pub(in crate::qcow2) fn drop_references(
        &self,
        cluster: u64,
        count: u64,
        times: u64,
        reason: ReleaseReason,
    ) {
        self.dropped.push(cluster, count, times, reason);
    }

    /// Passes one reference to each of these metadata clusters to the write-back. The write-back lowers the refcounts.
    pub(in crate::qcow2) fn drop_table_clusters(&self, clusters: &RoaringTreemap) {
        for cluster in clusters {
            self.drop_clusters(cluster, 1, ReleaseReason::Table);
        }
    }

    /// Drops the references to the clusters of an L1 table.
    pub(in crate::qcow2) fn drop_l1_clusters(&self, entries: usize, offset: u64) {
        let bytes = u64::try_from(entries).unwrap_or(0).saturating_mul(8);
        if bytes > 0 {
            let clusters = self.geometry.clusters_for(bytes);
            self.drop_clusters(
                offset >> self.geometry.cluster_bits,
                clusters,
                ReleaseReason::Table,
            );
        }
    }

    /// Takes all references out of the list of dropped references.
    pub(in crate::qcow2) fn take_dropped(&self) -> VecDeque<Dropped> {
        self.dropped.take().into()
    }

    /// Puts references back into the list, because their refcounts could not be lowered.
    pub(in crate::qcow2) fn restore_dropped(&self, rest: impl IntoIterator<Item = Dropped>) {
        self.dropped.restore(rest);
    }

    /// Quarantines clusters whose refcount became 0 on disk. No further compressed data is placed in these clusters. The caller
    /// has held the guard of [`Self::lock_scanning`] since before the refcount changed.
    pub(in crate::qcow2) fn quarantine(&self, cluster: u64, count: u64, reason: ReleaseReason) {
        let (epoch, discard) = (self.image_state.epochs().current(), self.passes_discard(reason));
        self.tail.close_run(cluster, count, self.geometry.cluster_bits);
        self.allocator.quarantine(Quarantined { epoch, cluster, count, discard });
    }

    /// Takes the scanning lock. While this lock is held, no refcount block is scanned for free clusters.
    pub(in crate::qcow2) async fn lock_scanning(&self) -> MutexGuard<'_, ()> {
        self.allocator.scanning.lock().await
    }

    /// Whether a freed cluster is discarded on the host.
    pub(in crate::qcow2) fn passes_discard(&self, reason: ReleaseReason) -> bool {
        let modes = self.image_state.modes();
        match reason {
            ReleaseReason::CutOff => true,
            ReleaseReason::Discarded => modes.contains(Modes::PASS_REQUEST),
            ReleaseReason::Snapshot => modes.contains(Modes::PASS_SNAPSHOT),
            ReleaseReason::Data | ReleaseReason::Table => modes.contains(Modes::PASS_OTHER),
        }
    }
}

/// Clusters whose quarantine has ended and that are being discarded on the host, in ascending order. If [`Discarding`] is
/// dropped before all clusters are discarded, the remaining clusters are quarantined again. The host may still be discarding
/// the first of these clusters. The cancelled request holds its epoch guard until that discard has ended.
struct Discarding<'a> {
    clusters: &'a Clusters,
    runs: VecDeque<Quarantined>,
}

impl Drop for Discarding<'_> {
    fn drop(&mut self) {
        for run in self.runs.drain(..) {
            let epoch = self.clusters.image_state.epochs().current();
            self.clusters.allocator.quarantine(Quarantined { epoch, ..run });
        }
    }
}

/// Merges adjacent runs.
fn merge(mut runs: Vec<Quarantined>) -> Vec<Quarantined> {
    runs.sort_unstable_by_key(|run| run.cluster);
    let mut merged: Vec<Quarantined> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if last.cluster.saturating_add(last.count) == run.cluster => {
                last.count = last.count.saturating_add(run.count);
            }
            _ => merged.push(run),
        }
    }
    merged
}

/// Clusters that lost more references than their refcounts counted. One log message reports all of them when the value is
/// dropped.
#[derive(Default)]
struct Missing {
    first: Option<u64>,
    count: u64,
}

impl Missing {
    fn add(&mut self, offset: u64) {
        self.first.get_or_insert(offset);
        self.count = self.count.saturating_add(1);
    }
}

impl Drop for Missing {
    fn drop(&mut self) {
        if let Some(offset) = self.first {
            tracing::warn!(
                "qcow2: {} freed clusters had no refcount (the first at offset {offset:#x}); 'img check -r all' repairs the image",
                self.count
            );
        }
    }
}
