//! Fixed images: the data of the disk lies at the beginning of the file, and the footer is the last sector.
//!
//! Requests go to the same offset of the file. The driver never changes the footer. Requests cannot overwrite the footer,
//! because no request reaches beyond the end of the disk.

use std::sync::Arc;

use oxblk_core::check::{Check, CheckReport, Finding, Fix};
use oxblk_core::driver::Reopen;
use oxblk_core::{
    BoxFuture, ChildIdx, ChildrenRef, Driver, Edge, Errno, Error, ImageInfo, Limits, MapOp,
    OpenContext, OpenFlags, Options, Result, Status, Step, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

use super::footer::{Footer, SizeRule};
use super::metadata::{Found, read_metadata};
use super::reopen::without_size_rule;
use crate::blocks::EntryMap;
use crate::blocks::reopen::{self, Reopenable, WriteAccess};

/// An open fixed image.
pub(super) struct Fixed {
    footer: Footer,
    /// Virtual size in bytes.
    size: u64,
    /// Selects the field of the footer from which `size` was read.
    rule: SizeRule,
    children: ChildrenRef,
    access: WriteAccess<()>,
    /// An empty map, for [`reopen`]. A fixed image has no block map.
    map: EntryMap,
}

impl Fixed {
    pub(super) fn new(context: &OpenContext, footer: Footer, size: u64, rule: SizeRule) -> Self {
        let children = Arc::clone(&context.children);
        let access = WriteAccess::new(context.flags.read_only);
        Self { footer, size, rule, children, access, map: EntryMap::new(0) }
    }

    fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    fn writable_file(&self) -> Result<Arc<Edge>> {
        self.access.check_writable()?;
        self.file()
    }
}

impl Driver for Fixed {
    fn map(&self, _op: MapOp, offset: u64, len: u64) -> Step {
        Step::Forward { child: ChildIdx::FILE, offset, len }
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.file()?.read(offset, buf).await })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.writable_file()?.write(offset, data, flags).await })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { self.writable_file()?.write_zeroes(offset, len, flags).await }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { self.writable_file()?.discard(offset, len).await }))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        let status = Status::stored(len, ChildIdx::FILE, offset);
        Some(Box::pin(std::future::ready(Ok(status))))
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        let below = self.children.get(ChildIdx::FILE).map(|file| file.node().limits());
        let below = below.as_deref();
        Limits {
            write_flags: WriteFlags::FUA,
            zero_flags: ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK,
            has_zero_init: below.is_some_and(|limits| limits.has_zero_init),
            ..Limits::default()
        }
    }

    fn info(&self) -> ImageInfo {
        ImageInfo { is_always_shown: true, ..ImageInfo::default() }
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    fn check(&self) -> Option<&dyn Check> {
        Some(self)
    }
}

impl Check for Fixed {
    /// Reports no faults. The footer and the length of the file were checked when the image was opened, and a fixed image has
    /// no other metadata.
    fn check<'a>(
        &'a self,
        fix: Fix,
        _report: &'a dyn Fn(Finding),
    ) -> BoxFuture<'a, Result<CheckReport>> {
        Box::pin(async move {
            if self.access.is_read_only() && fix != Fix::Nothing {
                return Err(Error::from_errno(Errno::ROFS).prefix("Cannot repair the image"));
            }
            Ok(CheckReport::default())
        })
    }
}

impl Reopenable for Fixed {
    type Survey = ();

    fn access(&self) -> &WriteAccess<()> {
        &self.access
    }

    async fn complete(&self) -> Result<()> {
        self.file()?.flush().await
    }

    async fn is_header_same(&self) -> Result<bool> {
        let found = read_metadata(&*self.file()?, self.rule).await?;
        Ok(matches!(found, Found::Fixed { footer, .. } if *footer == self.footer))
    }

    fn map(&self) -> &EntryMap {
        &self.map
    }

    async fn read_chunk(&self, _index: u32) -> Result<IoBufMut> {
        Ok(IoBufMut::new(0))
    }

    async fn survey_to_write(&self) -> Result<()> {
        Ok(())
    }

    fn begin_to_write(&self, _survey: &()) {}
}

impl Reopen for Fixed {
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
