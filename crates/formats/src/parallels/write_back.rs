//! The order in which the BAT reaches the disk, and closing an image.
//!
//! The steps of a write-back:
//!
//! 1. *copy*: copy the changed sectors of the BAT. The data of all clusters to which the copied entries refer has been written;
//! 2. *mark*: set the field `in_use` of the header, unless the field is set. The field says that the image is being changed;
//! 3. *flush*: flush the data and the header;
//! 4. *entries*: write the copies;
//! 5. *flush*: flush the file. After this flush, the clusters whose entries have become 0 are discarded on the host and
//!    freed.
//!
//! If an entry changes after its sector was copied, the next write-back writes the new value.

use std::ops::Range;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use oxblk_core::{DebugEvent, Edge, Result, WriteFlags, run_all};
use oxblk_ring::IoBuf;
use oxblk_ring::perturb::point;

use super::Parallels;
use super::header::{DATA_OFF_OFFSET, IN_USE, IN_USE_OFFSET, SECTOR};
use crate::blocks::BlockImage;
use crate::file_len;

async fn write_field(file: &Edge, offset: u64, value: u32) -> Result<()> {
    file.write(offset, IoBuf::from(value.to_le_bytes().to_vec()), WriteFlags::empty()).await
}

impl Parallels {
    /// Writes and flushes all changes that completed before the call.
    pub(super) async fn write_back(&self) -> Result<()> {
        let _guard = self.writing_back.lock().await;
        let file = self.file()?;
        // The entries of these clusters are already 0 and marked as dirty.
        let freed = self.freed.take();
        let sectors = self.dirty.take();
        if sectors.is_empty() && freed.blocks.is_empty() {
            file.debug_event(DebugEvent::FlushToDisk).await;
            return file.flush().await;
        }
        point();
        let copy = |entries: Range<u32>| {
            (self.entry_offset(entries.start), IoBuf::from(self.map.encode(entries)))
        };
        let copies = sectors.runs(self.map.len()).into_iter().map(copy).collect();
        point();
        let writing = self.barrier.pass().await;
        let outcome = self.write_ordered(&file, copies).await;
        writing.done();
        outcome?;
        sectors.written();
        // If this future is dropped here, the next write-back frees the clusters.
        for cluster in &freed.blocks {
            let (host, size) = (self.header.cluster_offset(*cluster), file.size());
            let len = self.header.cluster.min(size.saturating_sub(host));
            // The discard only saves space, so a failure is not an error.
            if len > 0
                && let Err(error) = file.discard(host, len).await
            {
                tracing::debug!("parallels: cannot discard a freed cluster: {error}");
            }
        }
        freed.free(&self.allocator);
        Ok(())
    }

    async fn write_ordered(&self, file: &Edge, copies: Vec<(u64, IoBuf)>) -> Result<()> {
        if !self.mark.is_certain() {
            self.mark.begin_change();
            write_field(file, IN_USE_OFFSET, IN_USE).await?;
            self.mark.note_present();
        }
        file.flush().await?;
        let write = |(offset, bytes)| file.write(offset, bytes, WriteFlags::empty());
        run_all(copies.into_iter().map(write)).await?;
        file.debug_event(DebugEvent::FlushToDisk).await;
        file.flush().await
    }

    /// Writes the offset of the first cluster to the header.
    pub(super) async fn write_data_offset(&self) -> Result<()> {
        let file = self.file()?;
        let sectors = u32::try_from(self.header.data_offset / SECTOR).unwrap_or(u32::MAX);
        write_field(&file, DATA_OFF_OFFSET, sectors).await?;
        self.data_offset_is_valid.store(true, Release);
        file.flush().await
    }

    /// Writes all metadata to the image, and truncates the file after its last cluster. Then clears the field `in_use` of
    /// the header, unless the image still needs a repair. Does nothing if the image is read-only. No request is in flight.
    pub(super) async fn complete_image(&self) -> Result<()> {
        if self.access.is_read_only() {
            return Ok(());
        }
        self.write_back().await?;
        if !self.allocator.is_known() {
            return Ok(());
        }
        self.allocator.end_quarantine();
        self.trim().await?;
        if !self.mark.is_possible() || self.unclean.load(Acquire) {
            return Ok(());
        }
        let file = self.file()?;
        let _guard = self.writing_back.lock().await;
        let writing = self.barrier.pass().await;
        let outcome = async {
            self.mark.begin_change();
            write_field(&file, IN_USE_OFFSET, 0).await?;
            file.flush().await
        }
        .await;
        writing.done();
        outcome?;
        self.mark.note_absent();
        Ok(())
    }

    /// Truncates the file after its last cluster in use, if the file can change its length and the image has no format
    /// extension.
    pub(super) async fn trim(&self) -> Result<()> {
        let file = self.file()?;
        let end = self.allocator.end();
        let offset = self.header.cluster_offset(end);
        // A device has a fixed length. A format extension may use the space after the last cluster.
        if file.size() <= offset || !file.node().limits().grows || self.header.has_extension {
            return Ok(());
        }
        self.whole_clusters.fetch_min(end, AcqRel);
        if file_len::truncate(&file, offset).await? {
            self.allocator.note_truncated();
        }
        Ok(())
    }
}
