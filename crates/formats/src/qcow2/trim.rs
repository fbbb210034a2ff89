//! Giving the end of the file back to the host.

use oxblk_core::{ChildIdx, Preallocation, Result};

use super::Qcow2;

impl Qcow2 {
    /// Cuts the file off behind its last cluster in use. Core has drained the node, and all metadata is durable, so
    /// that nothing on disk refers to what is cut off.
    ///
    /// # Errors
    /// As the file reports. The image is whole all the same.
    pub(super) async fn trim_file(&self) -> Result<()> {
        let file = self.children.require(ChildIdx::FILE)?;
        if !file.node().limits().grows {
            // A device is as long as it is.
            return Ok(());
        }
        let size = file.size();
        let last = self.refcounts.last_in_use(self.geometry.clusters_for(size)).await?;
        let end = last.unwrap_or(0).saturating_add(1) << self.geometry.cluster_bits;
        if end < size { file.resize(end, Preallocation::Off).await } else { Ok(()) }
    }
}
