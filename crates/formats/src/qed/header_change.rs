//! Changes of the header of an open image.
//!
//! The fixed part of the header lies in one sector, so the disk has either the old or the new header after a crash. If a write
//! of the header fails, the old header is written again. If the second write fails too, the contents of the header on disk are
//! unknown, and the image refuses all further writes.
//!
//! The need-check flag has its own state ([`crate::header_mark`]), because requests set it concurrently. The flag is
//! written and flushed before the first cluster is allocated or the first table is changed. The flag is removed when the
//! image is closed and all changes have been written and flushed.

use std::sync::atomic::Ordering::Release;

use oxblk_core::{Result, WriteFlags};
use oxblk_ring::IoBuf;

use super::header::{AUTOCLEAR_OFFSET, FEATURES_OFFSET, Header};
use super::{HeaderState, Qed};

impl Qed {
    async fn write_durably(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        let file = self.file()?;
        file.write(offset, IoBuf::from(bytes), WriteFlags::empty()).await?;
        file.flush().await
    }

    /// Writes the need-check flag and flushes, unless the flag is known to be set on disk.
    pub(super) async fn set_need_check(&self) -> Result<()> {
        if self.mark.is_certain() {
            return Ok(());
        }
        let _guard = self.header_write.lock().await;
        if self.mark.is_certain() {
            return Ok(());
        }
        self.write_need_check(true).await?;
        self.mark.note_present();
        Ok(())
    }

    /// Removes the need-check flag, unless it is known to be absent on disk. All changes have been flushed, and no request
    /// is in flight.
    pub(super) async fn clear_need_check(&self) -> Result<()> {
        if !self.mark.is_possible() {
            return Ok(());
        }
        self.check_running()?;
        let _guard = self.header_write.lock().await;
        self.write_need_check(false).await?;
        self.mark.note_absent();
        Ok(())
    }

    async fn write_need_check(&self, need_check: bool) -> Result<()> {
        let features = Header { need_check, ..self.header().header.clone() }.features();
        self.mark.begin_change();
        let writing = self.flag_barrier.pass().await;
        let outcome = self.write_durably(FEATURES_OFFSET, features.to_le_bytes().to_vec()).await;
        writing.done();
        outcome
    }

    /// Clears the autoclear feature bits, because this driver does not know them.
    pub(super) async fn clear_autoclear(&self) -> Result<()> {
        if self.header().header.autoclear_features == 0 {
            return Ok(());
        }
        self.write_durably(AUTOCLEAR_OFFSET, vec![0; 8]).await?;
        self.header().header.autoclear_features = 0;
        Ok(())
    }

    /// Changes the header on disk, flushes, and then changes the header in memory. No request is in flight.
    ///
    /// # Errors
    /// The errors of requests to the image file. The old header is then written again. If this fails too, the image refuses all
    /// further writes.
    pub(super) async fn change_header(&self, change: impl FnOnce(&mut HeaderState)) -> Result<()> {
        let _guard = self.header_write.lock().await;
        let old = self.header().clone();
        let mut new = old.clone();
        change(&mut new);
        let encode = |state: &HeaderState| {
            Header { need_check: self.mark.is_possible(), ..state.header.clone() }.encode()
        };
        match self.write_durably(0, encode(&new)).await {
            Ok(()) => {
                *self.header() = new;
                Ok(())
            }
            Err(error) => {
                if let Err(second) = self.write_durably(0, encode(&old)).await {
                    self.stopped.store(true, Release);
                    tracing::error!("qed: the header is unknown after a failed write: {second}");
                }
                Err(error)
            }
        }
    }
}
