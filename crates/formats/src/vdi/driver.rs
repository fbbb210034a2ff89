//! Implements the traits `Driver` (including `map`, the lookup of host offsets without I/O) and `DriverFactory` for vdi.

use oxblk_core::check::{Check, CheckReport, Finding, Fix};
use oxblk_core::create::{CreateOption, CreateRequest, Measure, MeasureRequest};
use oxblk_core::driver::Reopen;
use oxblk_core::{
    BoxFuture, ChildIdx, Driver, DriverFactory, DriverKind, Graph, ImageInfo, Limits, MapOp,
    OpenContext, Options, Result, Status, Step, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Vdi;
use super::create::{self, Wanted};
use super::header::{BLOCK, ImageType, looks_like_vdi};
use super::measure::measure;
use super::open::open;
use crate::blocks::{BlockImage, Content};

impl Driver for Vdi {
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
        want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        Some(Box::pin(self.status(offset, len, want)))
    }

    fn size(&self) -> u64 {
        self.header.size
    }

    fn below_changed(&self) {
        self.file_changed();
    }

    fn limits(&self) -> Limits {
        let file = self.children.get(ChildIdx::FILE);
        let file_is_zero = file.is_some_and(|file| file.node().limits().has_zero_init);
        Limits {
            zero_flags: ZeroFlags::MAY_UNMAP,
            has_zero_init: self.header.image_type != ImageType::Static || file_is_zero,
            ..Limits::default()
        }
    }

    fn info(&self) -> ImageInfo {
        ImageInfo { cluster_size: BLOCK, ..ImageInfo::default() }
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

impl Check for Vdi {
    fn check<'a>(
        &'a self,
        fix: Fix,
        report: &'a dyn Fn(Finding),
    ) -> BoxFuture<'a, Result<CheckReport>> {
        Box::pin(self.check_image(fix, report))
    }
}

struct Factory;

/// The vdi driver.
pub static VDI: &dyn DriverFactory = &Factory;

impl DriverFactory for Factory {
    fn name(&self) -> &'static str {
        "vdi"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], _filename: Option<&str>) -> u32 {
        if looks_like_vdi(head) { 100 } else { 0 }
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
        Wanted::from_options(options.clone(), None).map(drop)
    }

    fn create<'a>(
        &'a self,
        _graph: &'a Graph,
        request: CreateRequest,
    ) -> Option<BoxFuture<'a, Result<()>>> {
        Some(Box::pin(create::create(request)))
    }

    fn measure<'a>(
        &'a self,
        request: MeasureRequest<'a>,
    ) -> Option<BoxFuture<'a, Result<Measure>>> {
        Some(Box::pin(measure(request)))
    }
}
