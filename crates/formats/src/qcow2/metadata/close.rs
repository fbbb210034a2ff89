//! Writing all metadata to disk, for example when the image is closed and in each step of a compaction. Reading the L1 table.

use oxblk_core::{Edge, Errno, Error, ErrorKind, Result};

use super::Metadata;

impl Metadata {
    /// Reads the L1 table. Notes the L2 tables as metadata if the image is writable.
    pub(in crate::qcow2) async fn read_l1(&self, file: &Edge) -> Result<()> {
        let (writable, size) = (!self.image_state.is_read_only(), self.geometry.cluster_size());
        let note = |table| {
            if writable {
                self.clusters.note_metadata(table, size);
            }
        };
        self.mapping.read_l1(file, note).await
    }

    /// Writes all metadata, so that the image on disk is complete and no cluster leaks. Does nothing if the image is read-only
    /// or accepts no requests.
    pub(in crate::qcow2) async fn close_image(&self) -> Result<()> {
        if self.image_state.is_read_only() || !self.image_state.is_usable() {
            return Ok(());
        }
        // The first cycle lowers refcounts, the second writes them.
        self.write_back(true).await?;
        let written = self.write_back(true).await;
        let written = written.and(self.write_postponed().await);
        let written = written.and(self.clusters.complete_last_cluster().await);
        written.map_err(|error| {
            if error.kind() == ErrorKind::NoSpace {
                error.prefix("Could not close the image cleanly")
            } else {
                error
            }
        })
    }

    /// Writes all metadata to disk, empties the caches, and makes freed clusters available for allocation. Fails with `EBUSY`
    /// if a cached slice is pinned or dirty.
    pub(in crate::qcow2) async fn write_all_metadata(&self) -> Result<()> {
        // The first write-back cycle lowers refcounts in memory, and the second one writes them.
        self.write_back(true).await?;
        self.write_back(true).await?;
        self.write_postponed().await?;
        self.clusters.free_quarantined().await?;
        if self.mapping.clear() && self.clusters.cache().clear() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Busy, "metadata is in use").errno(Errno::BUSY))
    }
}
