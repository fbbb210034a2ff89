//! Changing the backing file of an image, and emptying an image.
//!
//! To empty an image, the header is changed to refer to a new L1 table without entries. After that, the old tables and all
//! data clusters are freed. So after a crash the image has all of its data or none.

use oxblk_core::driver::Backing;
use oxblk_core::{BoxFuture, Error, ErrorKind, Result, ZeroFlags};
use oxblk_ring::IoBuf;

use super::Qed;
use super::header::{BackingName, HEADER_BYTES, check_name};

impl Qed {
    async fn change_backing(&self, filename: Option<&str>, format: Option<&str>) -> Result<()> {
        self.check_writable()?;
        // The caller may have copied data from the old backing file into the image. This data must be on disk before the new
        // name.
        self.write_back(true).await?;
        let Some(filename) = filename.filter(|name| !name.is_empty()) else {
            let remove = |state: &mut super::HeaderState| {
                state.header.backing = None;
                state.backing = None;
            };
            return self.change_header(remove).await;
        };
        check_name(filename)?;
        let bytes = oxblk_core::names::to_bytes(filename).into_owned();
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        // The header on disk still refers to the old name, so the new name must not overwrite the old one.
        let first_place = u32::try_from(HEADER_BYTES).unwrap_or(0);
        let offset = match self.header().header.backing.clone() {
            Some(old) if first_place.saturating_add(len) > old.offset => {
                old.offset.saturating_add(old.len)
            }
            _ => first_place,
        };
        if u64::from(offset).saturating_add(len.into()) > self.first_cluster {
            return Err(Error::new(ErrorKind::NoSpace, "Backing file name too long"));
        }
        self.write_file(offset.into(), IoBuf::from(bytes)).await?;
        self.file()?.flush().await?;
        let is_raw = format == Some("raw");
        self.change_header(|state| {
            state.header.backing = Some(BackingName { offset, len, is_raw });
            state.backing = Some(filename.to_owned());
        })
        .await
    }

    /// Empties the image: all clusters become unallocated.
    async fn empty(&self) -> Result<()> {
        self.check_writable()?;
        self.write_back(true).await?;
        if (0..self.geometry.l1_entries()).all(|index| self.l1_entry(index) == 0) {
            return Ok(());
        }
        let run = self.reserve_table().await?;
        let (place, bytes) = (self.offset_of(run.start), self.geometry.table_bytes());
        if !run.fresh {
            self.file()?.write_zeroes(place, bytes, ZeroFlags::MAY_UNMAP).await?;
        }
        self.file()?.flush().await?;
        let old = self.cluster_at(self.header().header.l1_offset);
        self.change_header(|state| state.header.l1_offset = place).await?;
        run.keep();
        self.freed.add(old..old.saturating_add(self.geometry.table_clusters));
        self.forget(0).await?;
        self.write_back(true).await?;
        // Moves the L1 table to the start of the file.
        self.close_gaps_after_change().await;
        Ok(())
    }
}

impl Backing for Qed {
    fn change<'a>(
        &'a self,
        filename: Option<&'a str>,
        format: Option<&'a str>,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.change_backing(filename, format))
    }

    fn make_empty(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.empty())
    }
}
