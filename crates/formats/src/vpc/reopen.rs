//! Reopen of a dynamic vpc image. [`crate::blocks::reopen`] describes the procedure.

use oxblk_core::driver::Reopen;
use oxblk_core::{BoxFuture, Error, OpenFlags, Options, Result};
use oxblk_ring::IoBufMut;

use super::Vpc;
use super::footer::SizeRule;
use super::metadata::{Found, read_metadata};
use super::survey::Survey;
use crate::blocks::EntryMap;
use crate::blocks::reopen::{self, Reopenable, WriteAccess};

/// Returns the options of a reopen without the option `force_size_calc`. A reopen cannot change this option.
///
/// # Errors
/// When `force_size_calc` is invalid, or differs from the value with which the image was opened.
pub(super) fn without_size_rule(options: &Options, rule: SizeRule) -> Result<Options> {
    let mut options = options.clone();
    match SizeRule::take(&mut options)? {
        Some(new) if new != rule => {
            Err(Error::invalid("Cannot change the option 'force_size_calc'"))
        }
        _ => Ok(options),
    }
}

impl Reopenable for Vpc {
    type Survey = Survey;

    fn access(&self) -> &WriteAccess<Survey> {
        &self.access
    }

    async fn complete(&self) -> Result<()> {
        self.complete_image().await
    }

    async fn is_header_same(&self) -> Result<bool> {
        let found = read_metadata(&*self.file()?, self.rule).await?;
        Ok(match found {
            Found::Fixed { .. } => false,
            Found::Dynamic { metadata, .. } => {
                metadata.footer == self.metadata.footer && metadata.header == self.metadata.header
            }
        })
    }

    fn map(&self) -> &EntryMap {
        &self.map
    }

    async fn read_chunk(&self, index: u32) -> Result<IoBufMut> {
        self.read_bat_chunk(index).await
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

impl Reopen for Vpc {
    fn prepare(&self, flags: OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>> {
        let options = without_size_rule(options, self.rule);
        Box::pin(async move { reopen::prepare(self, flags, &options?).await })
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        Box::pin(async { reopen::commit(self) })
    }

    fn abort(&self) -> BoxFuture<'_, ()> {
        Box::pin(async { reopen::abort(self) })
    }
}
