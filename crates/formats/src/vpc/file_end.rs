//! The footer at the end of the file, and the repair of its copy at the beginning.
//!
//! The file grows when a slot is used for the first time. The footer is then written after the new slot. After that, the
//! sector bitmap of the new block overwrites the old footer. When the image is closed after such a change, the footer is
//! written after the last block, and the file is truncated after the footer.
//!
//! The new footer is written without a flush, so after a power cut the file possibly does not end with a footer. Therefore the
//! copy at the beginning must be valid. If the copy is not valid, it is written and flushed before the file grows for the first
//! time.

use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{AcqRel, Acquire, Release},
};

use oxblk_core::{Edge, Errno, Error, Result, WriteFlags};
use oxblk_ring::IoBuf;

use super::Vpc;
use super::footer::FOOTER_BYTES;
use super::metadata::Copy;
use crate::file_len;
use crate::write_barrier::WriteBarrier;

/// What is known about the footer at the end of the file.
#[derive(Debug, Default)]
pub(super) struct FileEnd {
    /// Byte offset of a footer after all blocks; 0 if it is not certain that the file has such a footer.
    footer: AtomicU64,
    /// The end of the file must be corrected when the image is closed: possibly the footer is not the last sector of the
    /// file, or the slots before the footer are unused.
    is_touched: AtomicBool,
    /// This driver has written and flushed the copy at the beginning.
    is_start_written: AtomicBool,
    barrier: WriteBarrier,
}

impl FileEnd {
    /// Byte offset of a footer after all blocks; 0 if it is not certain that the file has such a footer.
    pub(super) fn footer(&self) -> u64 {
        self.footer.load(Acquire)
    }

    /// Initialises the state before the first write. `footer` is the byte offset of the footer if the last sector of the file
    /// contains it.
    pub(super) fn begin(&self, footer: Option<u64>) {
        self.footer.store(footer.unwrap_or(0), Release);
        self.is_touched.store(false, Release);
    }

    /// Records that the end of the file must be corrected when the image is closed.
    pub(super) fn touch(&self) {
        self.is_touched.store(true, Release);
    }
}

impl Vpc {
    /// Extends the file so that it contains all slots before `end`, with the footer after them. The `growing` lock
    /// serialises extensions, so that no footer is written over a block.
    ///
    /// # Errors
    /// `ENOSPC` if the file cannot grow and is too short, and the errors of requests to the image file.
    pub(super) async fn lengthen(&self, end: u32) -> Result<()> {
        let needed = self.slot_offset(end);
        if self.end.footer() >= needed {
            return Ok(());
        }
        let _guard = self.growing.lock().await;
        if self.end.footer() >= needed {
            return Ok(());
        }
        let file = self.file()?;
        self.restore_start(&file).await?;
        self.write_footer(&file, needed).await?;
        self.end.footer.fetch_max(needed, AcqRel);
        Ok(())
    }

    /// Writes and flushes the copy of the footer at the beginning if it was not good when the image was opened. The caller
    /// holds the `growing` lock.
    async fn restore_start(&self, file: &Edge) -> Result<()> {
        if self.metadata.at_start == Copy::Good || self.end.is_start_written.load(Acquire) {
            return Ok(());
        }
        let bytes = IoBuf::from(self.metadata.footer.encode());
        file.write(0, bytes, WriteFlags::empty()).await?;
        file.flush().await?;
        self.end.is_start_written.store(true, Release);
        Ok(())
    }

    /// Writes the footer at `offset`. The caller holds the `growing` lock.
    async fn write_footer(&self, file: &Edge, offset: u64) -> Result<()> {
        let end = offset.saturating_add(FOOTER_BYTES);
        if !file.node().limits().grows && file.size() < end {
            return Err(Error::from_errno(Errno::NOSPC));
        }
        // If the write of an earlier footer was cancelled, its I/O must end before a block is written to the same place.
        let writing = self.end.barrier.pass().await;
        self.end.touch();
        let bytes = IoBuf::from(self.metadata.footer.encode());
        let outcome = file.write(offset, bytes, WriteFlags::empty()).await;
        writing.done();
        outcome?;
        self.file_len.fetch_max(end, AcqRel);
        Ok(())
    }

    /// Writes all metadata to the image. If the end of the file was touched, corrects it ([`Self::write_footer_at_end`]). Does
    /// nothing if the image is read-only. No request is in flight.
    pub(super) async fn complete_image(&self) -> Result<()> {
        if self.access.is_read_only() {
            return Ok(());
        }
        self.write_back().await?;
        if !self.allocator.is_known() || !self.end.is_touched.load(Acquire) {
            return Ok(());
        }
        self.allocator.end_quarantine();
        self.write_footer_at_end().await
    }

    /// Writes the footer after the last block in use. If the file can change its length, truncates it after the footer. The
    /// BAT has been flushed, and no request is in flight.
    pub(super) async fn write_footer_at_end(&self) -> Result<()> {
        let file = self.file()?;
        let offset = self.slot_offset(self.allocator.end());
        let end = offset.saturating_add(FOOTER_BYTES);
        let _guard = self.growing.lock().await;
        if self.end.footer() != offset {
            self.write_footer(&file, offset).await?;
            self.end.footer.store(offset, Release);
            file.flush().await?;
        }
        // A device has a fixed length.
        if file.node().limits().grows {
            let mut is_truncated = true;
            if file.size() > end {
                self.file_len.store(end, Release);
                is_truncated = file_len::truncate(&file, end).await?;
                file.flush().await?;
            }
            if is_truncated {
                self.allocator.note_truncated();
            }
        }
        self.end.is_touched.store(false, Release);
        Ok(())
    }
}
