//! Implements the traits `Driver` (including `map`, the lookup of host offsets without I/O) and `DriverFactory` for parallels.

use oxblk_core::check::{Check, CheckReport, Finding, Fix};
use oxblk_core::create::{CreateOption, CreateRequest};
use oxblk_core::driver::Reopen;
use oxblk_core::{
    BoxFuture, Driver, DriverFactory, DriverKind, Graph, Limits, MapOp, OpenContext, Options,
    Result, Status, Step, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Parallels;
use super::create::{self, Wanted};
use super::header::looks_like_parallels;
use super::open::open;
use crate::blocks::{BlockImage, Content};

impl Driver for Parallels {
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        self.step(op, offset, len)
    }

    fn load_map(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { self.extent(offset, len).await.map(drop) }))
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(self.read_guest(offset, buf))
    }

    fn write(&self, offset: u64, data: IoBuf, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.change(offset, Content::Data(data)))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.zero_guest(offset, len, flags)))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.discard_guest(offset, len)))
    }

    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.write_back()))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        Some(Box::pin(self.status(offset, len)))
    }

    fn size(&self) -> u64 {
        self.header.size
    }

    fn below_changed(&self) {
        self.file_changed();
    }

    fn limits(&self) -> Limits {
        let cluster = u32::try_from(self.header.cluster).unwrap_or(1);
        Limits {
            write_zeroes_alignment: cluster,
            discard_alignment: cluster,
            zero_flags: ZeroFlags::MAY_UNMAP,
            has_zero_init: true,
            ..Limits::default()
        }
    }

    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.complete_image()))
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    fn check(&self) -> Option<&dyn Check> {
        Some(self)
    }
}

impl Check for Parallels {
    fn check<'a>(
        &'a self,
        fix: Fix,
        report: &'a dyn Fn(Finding),
    ) -> BoxFuture<'a, Result<CheckReport>> {
        Box::pin(self.check_image(fix, report))
    }
}

struct Factory;

/// The parallels driver.
pub static PARALLELS: &dyn DriverFactory = &Factory;

impl DriverFactory for Factory {
    fn name(&self) -> &'static str {
        "parallels"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], _filename: Option<&str>) -> u32 {
        if looks_like_parallels(head) { 100 } else { 0 }
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let image: Box<dyn Driver> = Box::new(open(context).await?);
            Ok(image)
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        create::OPTIONS
    }

    fn check_create(&self, _graph: &Graph, options: &Options) -> Result<()> {
        Wanted::from_options(options.clone()).map(drop)
    }

    fn create<'a>(
        &'a self,
        _graph: &'a Graph,
        request: CreateRequest,
    ) -> Option<BoxFuture<'a, Result<()>>> {
        Some(Box::pin(create::create(request)))
    }
}
