//! The end of the file: completing the last cluster, and truncating the unused end.

use oxblk_core::Result;

use super::Clusters;
use crate::file_len;

impl Clusters {
    /// Extends the file to the end of its last cluster or subcluster with a hole, as QEMU does. The file is extended only if
    /// this last cluster contains guest data, lies behind the end that the file had when it was opened or last truncated, and
    /// does not contain the last compressed stream.
    pub(in crate::qcow2) async fn complete_last_cluster(&self) -> Result<()> {
        let file = self.image_state.file()?;
        let (size, unit) = (file.size(), self.geometry.subcluster_size());
        let cluster = self.geometry.cluster_index(size);
        if size.is_multiple_of(unit)
            || !self.allocator.is_new_data(cluster)
            || self.tail.is_in(cluster, self.geometry.cluster_bits)
            || self.get(cluster).await? == 0
        {
            return Ok(());
        }
        let end = size.checked_next_multiple_of(unit).unwrap_or(size);
        file_len::extend(&file, end).await
    }

    /// Truncates the file behind its last cluster in use. A file that cannot change its size is not truncated. The caller
    /// ensures that the node is drained and that all metadata is written and flushed. So nothing on disk refers to the
    /// truncated part.
    ///
    /// # Errors
    /// The errors of requests to the image file. The image is valid after an error too.
    pub(in crate::qcow2) async fn trim_file(&self) -> Result<()> {
        let file = self.image_state.file()?;
        if !file.node().limits().grows {
            // A device cannot be truncated.
            return Ok(());
        }
        let size = file.size();
        let last = self.last_in_use(self.geometry.clusters_for(size)).await?;
        let end = last.unwrap_or(0).saturating_add(1) << self.geometry.cluster_bits;
        if end >= size {
            return Ok(());
        }
        file_len::truncate(&file, end).await.map(drop)
    }
}
