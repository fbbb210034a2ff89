//! Reading a snapshot through a read-only node: the snapshot's L1 table replaces the active L1 table, in memory only.

use oxblk_core::{Errno, Error, Result};

use super::super::layout::L1Entry;
use super::ImageSnapshots;
use super::change::find;

impl ImageSnapshots {
    /// Makes the node show the contents of a snapshot, and its disk size if the snapshot stores one.
    ///
    /// # Errors
    /// `EACCES` if the node is writable, `ENOENT` if the snapshot does not exist, an error if the L1 table of the snapshot
    /// is invalid or if the image accepts no requests, and the errors of requests to the image file.
    pub(in crate::qcow2) async fn show_snapshot(&self, id: &str) -> Result<()> {
        self.image_state.check_usable()?;
        if !self.image_state.is_read_only() {
            return Err(Error::from_errno(Errno::ACCES));
        }
        let snapshot = find(self.metadata.snapshot_list().await?, id)?.1;
        snapshot.check_l1(self.geometry)?;
        let l1 = self.metadata.read_inactive_l1(snapshot.l1_offset, snapshot.l1_entries).await?;
        let count = u64::try_from(l1.len()).unwrap_or(u64::MAX);
        // As in the active L1 table, an entry with flags but without an offset refers to no table.
        let shown = l1.into_iter().map(|entry| match entry.l2_offset(self.geometry) {
            Ok(None) => L1Entry::EMPTY,
            _ => entry,
        });
        self.mapping.replace_l1(shown, snapshot.l1_offset, count);
        if let Some(size) = snapshot.size {
            self.image_state.set_size(size);
        }
        Ok(())
    }
}
