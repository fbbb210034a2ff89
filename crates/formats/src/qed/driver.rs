//! Implements the traits `Driver` (including `map`, the lookup of host offsets without I/O) and `DriverFactory` for QED.

use oxblk_core::check::{Check, CheckReport, Finding, Fix};
use oxblk_core::create::{CreateOption, CreateRequest, Measure, MeasureRequest};
use oxblk_core::driver::{Backing, Reopen, Resize};
use oxblk_core::{
    BoxFuture, ChildIdx, Driver, DriverFactory, DriverKind, Error, Graph, ImageInfo, Limits, MapOp,
    OpenContext, Options, Preallocation, Result, Status, Step, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Qed;
use super::create;
use super::header::looks_like_qed;
use super::lookup::Extent;
use super::measure::measure;
use super::open::open;

impl Driver for Qed {
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        let Ok(extent) = self.lookup(offset, len) else { return Step::Slow };
        match (extent, op) {
            (Extent::Data { host, len }, MapOp::Read | MapOp::Write) => {
                Step::Forward { child: ChildIdx::FILE, offset: host, len }
            }
            (Extent::Zero { len }, MapOp::Read) => Step::Zero { len },
            (Extent::Unallocated { len }, MapOp::Read) => {
                match self.children.has(ChildIdx::BACKING) {
                    true => Step::Forward { child: ChildIdx::BACKING, offset, len },
                    false => Step::Zero { len },
                }
            }
            (Extent::Zero { .. } | Extent::Unallocated { .. }, MapOp::Write) => Step::Slow,
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
        Some(Box::pin(self.write_back(true)))
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
        Self::size(self)
    }

    fn below_changed(&self) {
        self.file_changed();
    }

    fn limits(&self) -> Limits {
        let cluster = u32::try_from(self.geometry.cluster()).unwrap_or(1);
        Limits {
            write_zeroes_alignment: cluster,
            discard_alignment: cluster,
            zero_flags: ZeroFlags::MAY_UNMAP,
            has_zero_init: true,
            ..Limits::default()
        }
    }

    fn info(&self) -> ImageInfo {
        let state = self.header();
        ImageInfo {
            cluster_size: self.geometry.cluster(),
            is_corrupt: self.stopped.load(std::sync::atomic::Ordering::Acquire),
            backing_filename: state.backing.clone(),
            backing_format: state.backing_format().map(str::to_owned),
            ..ImageInfo::default()
        }
    }

    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async {
            self.cleaner.set_interval(std::time::Duration::ZERO);
            self.complete_image().await
        }))
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    fn check(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn backing(&self) -> Option<&dyn Backing> {
        Some(self)
    }
}

impl Resize for Qed {
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.resize_image(size, preallocation))
    }
}

impl Check for Qed {
    fn check<'a>(
        &'a self,
        fix: Fix,
        report: &'a dyn Fn(Finding),
    ) -> BoxFuture<'a, Result<CheckReport>> {
        Box::pin(self.check_image(fix, report))
    }
}

struct Factory;

/// The QED driver.
pub static QED: &dyn DriverFactory = &Factory;

/// Refuses a backing file format for which there is no driver.
fn check_backing_format(graph: &Graph, options: &Options) -> Result<()> {
    match options.get_str("backing_fmt").filter(|name| graph.driver(name).is_err()) {
        Some(name) => {
            Err(Error::invalid(format!("Parameter 'backing-fmt' does not accept value '{name}'")))
        }
        None => Ok(()),
    }
}

impl DriverFactory for Factory {
    fn name(&self) -> &'static str {
        "qed"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], _filename: Option<&str>) -> u32 {
        if looks_like_qed(head) { 100 } else { 0 }
    }

    fn supports_backing(&self) -> bool {
        true
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

    fn check_create(&self, graph: &Graph, options: &Options) -> Result<()> {
        check_backing_format(graph, options)?;
        create::check(options.clone())
    }

    fn create<'a>(
        &'a self,
        graph: &'a Graph,
        request: CreateRequest,
    ) -> Option<BoxFuture<'a, Result<()>>> {
        Some(Box::pin(async move {
            check_backing_format(graph, &request.options)?;
            create::create(request).await
        }))
    }

    fn measure<'a>(
        &'a self,
        request: MeasureRequest<'a>,
    ) -> Option<BoxFuture<'a, Result<Measure>>> {
        Some(Box::pin(measure(request)))
    }
}
