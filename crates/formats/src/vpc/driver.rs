//! Implements the traits `Driver` (including `map`, the lookup of host offsets without I/O) and `DriverFactory` for vpc.

use oxblk_core::check::{Check, CheckReport, Finding, Fix};
use oxblk_core::create::{CreateOption, CreateRequest, Measure, MeasureRequest};
use oxblk_core::driver::Reopen;
use oxblk_core::{
    BoxFuture, ChildIdx, Driver, DriverFactory, DriverKind, Graph, ImageInfo, Limits, MapOp,
    OpenContext, Options, Result, Status, Step, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Vpc;
use super::create::{self, Wanted};
use super::footer::looks_like_vpc;
use super::measure::measure;
use super::open::open;
use crate::blocks::Extent;

impl Driver for Vpc {
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        let child = ChildIdx::FILE;
        match (self.lookup(offset, len), op) {
            (Some(Extent::Unallocated { len }), MapOp::Read) => Step::Zero { len },
            (Some(Extent::Data { host, len }), _) if !self.is_inside(host, len) => Step::Slow,
            (Some(Extent::Data { host, len }), MapOp::Read) => {
                Step::Forward { child, offset: host, len }
            }
            // If the sector bitmap of the block may have bits that are not set, the slow path sets them.
            (Some(Extent::Data { host, len }), MapOp::Write)
                if self.full.contains(self.block_of(offset)) =>
            {
                Step::Forward { child, offset: host, len }
            }
            (Some(_), MapOp::Write) | (None, _) => Step::Slow,
        }
    }

    fn load_map(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { self.extent(offset, len).await.map(drop) }))
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(self.read_guest(offset, buf))
    }

    fn write(&self, offset: u64, data: IoBuf, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write_guest(offset, data))
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
        self.size
    }

    fn below_changed(&self) {
        self.file_changed();
    }

    fn limits(&self) -> Limits {
        Limits { zero_flags: ZeroFlags::MAY_UNMAP, has_zero_init: true, ..Limits::default() }
    }

    fn info(&self) -> ImageInfo {
        ImageInfo { cluster_size: self.metadata.header.block(), ..ImageInfo::default() }
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

impl Check for Vpc {
    fn check<'a>(
        &'a self,
        fix: Fix,
        report: &'a dyn Fn(Finding),
    ) -> BoxFuture<'a, Result<CheckReport>> {
        Box::pin(self.check_image(fix, report))
    }
}

struct Factory;

/// The vpc driver.
pub static VPC: &dyn DriverFactory = &Factory;

impl DriverFactory for Factory {
    fn name(&self) -> &'static str {
        "vpc"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    /// Recognises an image that begins with a copy of the footer: a dynamic image. A fixed image has no magic number at its
    /// beginning.
    fn probe(&self, head: &[u8], _filename: Option<&str>) -> u32 {
        if looks_like_vpc(head) { 100 } else { 0 }
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(open(context))
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
