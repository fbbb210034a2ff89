//! Freeing the VM state that the active L1 table maps behind the end of the disk.

use oxblk_core::Result;

use super::ImageSnapshots;
use super::references::CountPurpose;
use crate::qcow2::layout::L1Entry;

impl ImageSnapshots {
    /// Frees the VM state that the active L1 table maps. First, the L1 entries of the VM state are cleared on disk. Then
    /// the refcounts of the clusters of the VM state are lowered. `oxblk_core` has drained the node.
    pub(in crate::qcow2) async fn free_vm_state(&self) -> Result<()> {
        let first = self.geometry.l1_entries_for(self.image_state.size()).unwrap_or(u64::MAX);
        let indices = first..self.mapping.l1_entries().max(first);
        let l1: Vec<L1Entry> = indices.clone().map(|index| self.mapping.l1_entry(index)).collect();
        if l1.iter().all(|entry| *entry == L1Entry::EMPTY) {
            return Ok(());
        }
        self.metadata.write_back(true).await?;
        let reachable = self.count_reachable(&l1, CountPurpose::Drop).await?;
        for index in indices {
            self.mapping.set_l1_entry(index, L1Entry::EMPTY);
        }
        self.mapping.clear();
        self.metadata.write_back(true).await?;
        self.lower_reachable(&reachable).await.map(drop)
    }
}
