//! Changing the backing file of an image, and emptying the image.
//!
//! An image is emptied by activating an L1 table without allocated entries. After this, the old L2 tables and data clusters are
//! freed. A crash between these two steps only leaks clusters.

use oxblk_core::driver::Backing;
use oxblk_core::{BoxFuture, DebugEvent, Errno, Error, Result};

use super::Qcow2;
use super::layout::{Autoclear, L1Entry};

impl Qcow2 {
    async fn change_backing(&self, filename: Option<&str>, format: Option<&str>) -> Result<()> {
        self.image_state.check_writable()?;
        let raw_data = self.image_state.header().autoclear.contains(Autoclear::RAW_DATA_FILE);
        if raw_data && filename.is_some() {
            // A raw data file must hold the complete contents of the disk, so a backing file is refused.
            return Err(Error::from_errno(Errno::INVAL));
        }
        // A rebase copies data to the image so that the contents of the disk do not change with the new backing file. This data
        // must be on the disk before the header contains the name of the new backing file.
        self.metadata.write_back(true).await?;
        let filename = filename.filter(|name| !name.is_empty());
        self.metadata
            .rewrite_header(|header| {
                header.backing_file = filename.map(str::to_owned);
                header.extensions.backing_format =
                    filename.and(format).filter(|name| !name.is_empty()).map(str::to_owned);
            })
            .await
    }

    /// Empties the image. The change takes effect with the write that makes the header refer to an L1 table without allocated
    /// entries. A crash before or after this write leaks clusters at worst.
    async fn empty_image(&self) -> Result<()> {
        self.image_state.check_writable()?;
        self.image_state.event(DebugEvent::EmptyImagePrepare).await;
        self.metadata.write_back(true).await?;
        let l1: Vec<L1Entry> =
            (0..self.mapping.l1_entries()).map(|index| self.mapping.l1_entry(index)).collect();
        if l1.iter().all(|entry| entry.0 == 0) {
            return Ok(());
        }
        self.begin_empty(l1.len()).await?;
        // The first pass has freed space near the start of the file. The second pass moves the L1 table into this space.
        self.begin_empty(l1.len()).await?;
        self.clusters.trim_file().await
    }

    /// Replaces the active L1 table with a table without allocated entries, and frees the clusters that the old table mapped.
    async fn begin_empty(&self, entries: usize) -> Result<()> {
        let emptied = self.snapshots.activate_empty_l1(entries).await;
        // The first write-back cycle lowers the refcounts of the freed clusters, the second cycle writes these refcounts.
        self.metadata.write_back(true).await?;
        self.metadata.write_back(true).await?;
        emptied
    }
}

impl Backing for Qcow2 {
    fn change<'a>(
        &'a self,
        filename: Option<&'a str>,
        format: Option<&'a str>,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.change_backing(filename, format))
    }

    fn make_empty(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.empty_image())
    }
}
