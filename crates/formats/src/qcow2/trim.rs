//! Truncating the unused end of the file.

use oxblk_core::{Preallocation, Result};

use super::Qcow2;

impl Qcow2 {
    /// Truncates the file behind its last cluster in use. Core has drained the node, and all metadata is durable, so nothing on
    /// disk refers to the truncated part.
    ///
    /// # Errors
    /// As the file reports. The image is valid nevertheless.
    pub(super) async fn trim_file(&self) -> Result<()> {
        let file = self.facts.file()?;
        if !file.node().limits().grows {
            // A device cannot be truncated.
            return Ok(());
        }
        let size = file.size();
        let last = self.refcounts.last_in_use(self.geometry.clusters_for(size)).await?;
        let end = last.unwrap_or(0).saturating_add(1) << self.geometry.cluster_bits;
        if end < size { file.resize(end, Preallocation::Off).await } else { Ok(()) }
    }
}
