//! Reopen of a parallels image. [`crate::blocks::reopen`] describes the procedure.

use std::sync::atomic::Ordering::Acquire;

use oxblk_core::driver::Reopen;
use oxblk_core::{BoxFuture, Error, ErrorKind, OpenFlags, Options, Result};
use oxblk_ring::IoBufMut;

use super::Parallels;
use super::header::Header;
use super::open::{HAS_EXTENSION, read_header};
use super::survey::Survey;
use crate::blocks::BlockImage;
use crate::blocks::EntryMap;
use crate::blocks::reopen::{self, Reopenable, WriteAccess};
use crate::not_writable;

impl Reopenable for Parallels {
    type Survey = Survey;

    fn access(&self) -> &WriteAccess<Survey> {
        &self.access
    }

    async fn complete(&self) -> Result<()> {
        self.complete_image().await
    }

    async fn is_header_same(&self) -> Result<bool> {
        if self.header.has_extension {
            return Err(Error::new(ErrorKind::ReadOnly, HAS_EXTENSION));
        }
        if self.unclean.load(Acquire) || !self.data_offset_is_valid.load(Acquire) {
            return Err(not_writable::not_closed());
        }
        let header = read_header(&*self.file()?).await?;
        Ok(header == Header { in_use: false, data_offset_is_valid: true, ..self.header })
    }

    fn map(&self) -> &EntryMap {
        &self.map
    }

    async fn read_chunk(&self, index: u32) -> Result<IoBufMut> {
        self.read_map_chunk(index).await
    }

    async fn survey_to_write(&self) -> Result<Survey> {
        self.survey_sound().await
    }

    fn begin_to_write(&self, survey: &Survey) {
        if let Ok(file) = self.file() {
            self.allow_allocations(&file, survey);
        }
    }
}

impl Reopen for Parallels {
    fn prepare(&self, flags: OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>> {
        let options = options.clone();
        Box::pin(async move { reopen::prepare(self, flags, &options).await })
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        Box::pin(async { reopen::commit(self) })
    }

    fn abort(&self) -> BoxFuture<'_, ()> {
        Box::pin(async { reopen::abort(self) })
    }
}
