//! Reopen of a vdi image. [`crate::blocks::reopen`] describes the procedure.

use oxblk_core::driver::Reopen;
use oxblk_core::{BoxFuture, OpenFlags, Options, Result};
use oxblk_ring::IoBufMut;

use super::Vdi;
use super::header::Header;
use super::open::read_header;
use super::survey::Survey;
use crate::blocks::BlockImage;
use crate::blocks::EntryMap;
use crate::blocks::reopen::{self, Reopenable, WriteAccess};

impl Reopenable for Vdi {
    type Survey = Survey;

    fn access(&self) -> &WriteAccess<Survey> {
        &self.access
    }

    async fn complete(&self) -> Result<()> {
        self.complete_image().await
    }

    async fn is_header_same(&self) -> Result<bool> {
        let header = read_header(&*self.file()?).await?;
        let allocated = self.count_on_disk().unwrap_or(header.allocated);
        Ok(header == Header { allocated, ..self.header })
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

impl Reopen for Vdi {
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
