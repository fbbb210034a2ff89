//! Reopen, which can make an image read-only or writable.
//!
//! An image that becomes read-only is completed on disk while it can still be written. An image that becomes writable
//! must have the same metadata on disk as in memory: without file locks, another program may have written to it
//! meanwhile.

use std::sync::atomic::Ordering::Relaxed;

use oxblk_core::Errno;
use oxblk_core::driver::Reopen;
use oxblk_core::{BoxFuture, Error, ErrorKind, OpenFlags, Options, Result};

use super::header::Header;
use super::open::read_header;
use super::survey::Survey;
use super::{Parallels, lock};

/// A prepared reopen, before commit or abort.
pub(super) struct Prepared {
    read_only: bool,
    /// The survey of an image that becomes writable.
    survey: Option<Survey>,
}

impl Parallels {
    async fn prepare_reopen(&self, flags: OpenFlags, options: &Options) -> Result<Prepared> {
        if let Some(key) = options.keys().next() {
            return Err(Error::invalid(format!("Cannot change the option '{key}'")));
        }
        let mut survey = None;
        match (self.is_read_only(), flags.read_only) {
            (true, false) => {
                self.require_unchanged().await?;
                survey = Some(self.survey_to_write().await?);
            }
            (false, true) => self.complete().await?,
            _ => {}
        }
        Ok(Prepared { read_only: flags.read_only, survey })
    }

    /// Checks that the metadata in the file equals the metadata in memory.
    async fn require_unchanged(&self) -> Result<()> {
        let changed = || {
            let text = "Image was changed while it was open read-only";
            Error::new(ErrorKind::Busy, text).errno(Errno::BUSY)
        };
        let header = read_header(&*self.file()?).await?;
        let now = Header {
            in_use: self.in_use.load(Relaxed),
            data_offset_is_told: self.data_offset_is_told.load(Relaxed),
            ..self.header
        };
        if header != now || self.header.has_extension || header.in_use {
            return Err(changed());
        }
        let mut start = 0;
        while start < self.map.len() {
            if self.map.is_loaded(start) && !self.map.is_same(start, &self.read_chunk(start).await?)
            {
                return Err(changed());
            }
            start = self.map.chunk_of(start).end;
        }
        Ok(())
    }
}

impl Reopen for Parallels {
    fn prepare(&self, flags: OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>> {
        let options = options.clone();
        Box::pin(async move {
            let prepared = self.prepare_reopen(flags, &options).await?;
            *lock(&self.prepared) = Some(prepared);
            Ok(())
        })
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let Some(prepared) = lock(&self.prepared).take() else { return };
            if let (Some(survey), Ok(file)) = (&prepared.survey, self.file()) {
                self.begin_to_write(&file, survey);
            }
            self.read_only.store(prepared.read_only, Relaxed);
        })
    }

    fn abort(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            lock(&self.prepared).take();
        })
    }
}
