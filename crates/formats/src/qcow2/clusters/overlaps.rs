//! Recording the host clusters that several metadata structures use, and refusing writes to these clusters.
//!
//! `metadata/overlap` computes the overlaps. The allocator never causes an overlap, because it does not allocate
//! clusters that are recorded as metadata.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Release},
};
use std::sync::{Mutex, PoisonError};

use oxblk_core::{Error, Result};

use super::Clusters;
use crate::qcow2::image_state::run_options::{Modes, structure_names};

/// Clusters that several structures use.
#[derive(Default)]
pub(in crate::qcow2) struct Overlaps {
    any: AtomicBool,
    /// The structures that use a cluster, by cluster.
    found: Mutex<BTreeMap<u64, Modes>>,
}

impl Overlaps {
    /// Replaces the known overlaps.
    fn set(&self, found: BTreeMap<u64, Modes>) {
        self.any.store(!found.is_empty(), Release);
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = found;
    }

    /// Whether any structures overlap.
    fn exist(&self) -> bool {
        self.any.load(Acquire)
    }

    /// Refuses a write of the structure `own` to a range of clusters if a structure of `protected` uses one of these clusters
    /// too.
    ///
    /// # Errors
    /// [`oxblk_core::ErrorKind::Corrupt`], with the structures' names.
    pub(in crate::qcow2) fn check(
        &self,
        own: Modes,
        clusters: Range<u64>,
        protected: Modes,
    ) -> Result<()> {
        if !self.any.load(Acquire) {
            return Ok(());
        }
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, here) in found.range(clusters) {
            let others = (*here - own) & protected;
            if here.contains(own) && !others.is_empty() {
                return Err(Error::corrupt(format!(
                    "Preventing invalid write on {} (overlaps with {})",
                    structure_names(own),
                    structure_names(others)
                )));
            }
        }
        Ok(())
    }
}

impl Clusters {
    /// Refuses a write of the structure `own` to a range of the file if a protected structure also uses a cluster of the range.
    ///
    /// # Errors
    /// `Corrupt`; the image is then marked corrupt.
    pub(in crate::qcow2) async fn check_overlaps(
        &self,
        own: Modes,
        offset: u64,
        bytes: u64,
    ) -> Result<()> {
        let end = self.geometry.clusters_for(offset.saturating_add(bytes));
        let range = self.geometry.cluster_index(offset)..end;
        self.image_state
            .mark_if_corrupt(
                self.overlaps.check(own, range, self.image_state.modes() & Modes::EVERYTHING),
                offset,
            )
            .await
    }

    /// Replaces the known overlaps. `found` contains the structures that use a cluster, by cluster.
    pub(in crate::qcow2) fn set_overlaps(&self, found: BTreeMap<u64, Modes>) {
        self.overlaps.set(found);
    }

    /// Whether any structures overlap.
    pub(in crate::qcow2) fn have_overlaps(&self) -> bool {
        self.overlaps.exist()
    }
}
