//! Another backing file, and giving up all contents.

use oxblk_core::driver::Backing;
use oxblk_core::{BoxFuture, Errno, Error, Result};

use super::Qcow2;
use super::layout::{Autoclear, L1Entry};

impl Qcow2 {
    async fn change_backing(&self, filename: Option<&str>, format: Option<&str>) -> Result<()> {
        self.check_writable()?;
        let raw_data = self.header().autoclear.contains(Autoclear::RAW_DATA_FILE);
        if raw_data && filename.is_some() {
            // The data file alone must tell what the disk holds.
            return Err(Error::from_errno(Errno::INVAL));
        }
        // What was written because of the change must not be lost if the change is not.
        self.write_back(true).await?;
        let filename = filename.filter(|name| !name.is_empty());
        self.rewrite_header(|header| {
            header.backing_file = filename.map(str::to_owned);
            header.extensions.backing_format =
                filename.and(format).filter(|name| !name.is_empty()).map(str::to_owned);
        })
        .await
    }

    /// The step that decides is that the header names an L1 table without entries; before it and after it, refcounts
    /// are too high at worst.
    async fn give_up_contents(&self) -> Result<()> {
        self.check_writable()?;
        self.write_back(true).await?;
        let l1: Vec<L1Entry> = (0..self.l1_entries()).map(|index| self.l1_entry(index)).collect();
        if l1.iter().all(|entry| entry.0 == 0) {
            return Ok(());
        }
        self.begin_empty(l1.len()).await?;
        // Another time, for now there is room for the table near the beginning of the file.
        self.begin_empty(l1.len()).await?;
        self.trim_file().await
    }

    /// Makes an L1 table without entries the active one.
    async fn begin_empty(&self, entries: usize) -> Result<()> {
        let emptied = self.activate_nothing(entries).await;
        // The first cycle lowers refcounts, the second writes them.
        self.write_back(true).await?;
        self.write_back(true).await?;
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
        Box::pin(self.give_up_contents())
    }
}
