//! The list of dropped references: host clusters that have lost a reference, but whose refcounts are not lowered yet.
//!
//! A write-back cycle lowers a refcount only after the disk no longer contains the dropped reference (see
//! `metadata/write_back`). Until then the dropped references are in [`DroppedList`]. The list also contains references that
//! were added to a refcount, but that no table contains, because a task failed or was cancelled (see `counted`).

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Contiguous host clusters that lost the same number of references each.
#[derive(Debug, Clone, Copy)]
pub(in crate::qcow2) struct Dropped {
    pub(in crate::qcow2) cluster: u64,
    pub(in crate::qcow2) count: u64,
    /// Lost references of each cluster.
    pub(in crate::qcow2) times: u64,
    pub(in crate::qcow2) reason: ReleaseReason,
}

/// Why a reference to a host cluster was released, or what the cluster contained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) enum ReleaseReason {
    /// Guest data.
    Data,
    /// Guest data that was discarded, or that a compaction has moved to another cluster.
    Discarded,
    /// Guest data behind the end of the disk.
    CutOff,
    /// Guest data of a snapshot, or of the active disk state that was replaced when a snapshot was applied.
    Snapshot,
    /// An L1 table or an L2 table, or other metadata.
    Table,
}

/// The lost references whose refcounts are not lowered yet.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct DroppedList(Mutex<Vec<Dropped>>);

impl DroppedList {
    fn lock(&self) -> MutexGuard<'_, Vec<Dropped>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds `times` dropped references for each of the `count` host clusters from `cluster` on.
    pub(in crate::qcow2) fn push(
        &self,
        cluster: u64,
        count: u64,
        times: u64,
        reason: ReleaseReason,
    ) {
        if count == 0 || times == 0 {
            return;
        }
        let mut list = self.lock();
        if let Some(last) = list.last_mut()
            && last.cluster.saturating_add(last.count) == cluster
            && (last.times, last.reason) == (times, reason)
        {
            last.count = last.count.saturating_add(count);
            return;
        }
        list.push(Dropped { cluster, count, times, reason });
    }

    /// Takes all entries out of the list.
    pub(in crate::qcow2) fn take(&self) -> Vec<Dropped> {
        std::mem::take(&mut *self.lock())
    }

    /// Puts back entries whose refcounts could not be lowered.
    pub(in crate::qcow2) fn restore(&self, rest: impl IntoIterator<Item = Dropped>) {
        self.lock().extend(rest);
    }

    /// Number of entries.
    pub(in crate::qcow2) fn len(&self) -> usize {
        self.lock().len()
    }
}
