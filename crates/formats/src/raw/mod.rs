//! The `raw` driver: the image is the complete file, or a part of it.
//!
//! `offset` and `size` select a window of the file. All requests are forwarded to the file. The permissions of the parents are
//! passed to the file unchanged, because raw has no metadata that must be protected.
//!
//! If an image was *probed* as raw, the guest could write the header of another format to the image, and the next probe
//! would find that format. `oxblk_core` refuses such writes. The driver of a probed image requires requests of whole
//! sectors, so that the guest cannot build a header with smaller writes.

mod create;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use oxblk_core::create::{CreateOption, CreateRequest, Measure, MeasureRequest};
use oxblk_core::driver::{Reopen, Resize};
use oxblk_core::{
    BoxFuture, ChildIdx, ChildSpec, Children, DebugEvent, DebugEvents, Driver, DriverFactory,
    DriverKind, Edge, Error, Graph, Limits, MapOp, OpenContext, OpenFlags, Options, Preallocation,
    Result, Status, Step, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};
use serde::{Deserialize, Serialize};

const SECTOR: u64 = 512;

/// The `raw` driver.
pub static RAW: RawFactory = RawFactory;

/// The factory of raw nodes.
#[derive(Debug)]
pub struct RawFactory;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct RawOptions {
    offset: Option<u64>,
    size: Option<u64>,
}

/// The part of the file that forms the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    offset: u64,
    /// The `size` option, or `None` for the rest of the file.
    size: Option<u64>,
}

impl Window {
    /// Checks the options against a file of `file_size` bytes. Returns the window and the size of the image.
    fn new(options: &RawOptions, file_size: u64) -> Result<(Self, u64)> {
        let offset = options.offset.unwrap_or(0);
        let Some(rest) = file_size.checked_sub(offset) else {
            return Err(Error::invalid(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({file_size})"
            )));
        };
        let Some(size) = options.size else { return Ok((Self { offset, size: None }, rest)) };
        if size > rest {
            return Err(Error::invalid(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  \
                 actual size of the containing file ({file_size})"
            )));
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!("Specified size is not multiple of {SECTOR}")));
        }
        Ok((Self { offset, size: Some(size) }, size))
    }
}

struct Raw {
    children: Arc<Children>,
    offset: AtomicU64,
    /// The `size` option was given, so the size of the image cannot change.
    fixed: Mutex<bool>,
    size: AtomicU64,
    probed: bool,
    prepared: Mutex<Option<(Window, u64)>>,
}

impl Raw {
    fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    fn offset(&self) -> u64 {
        self.offset.load(Ordering::Acquire)
    }

    /// The offset in the file for an offset of the image.
    fn below(&self, offset: u64) -> u64 {
        offset.saturating_add(self.offset())
    }

    fn is_fixed(&self) -> bool {
        *self.fixed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, window: Window, size: u64) {
        self.offset.store(window.offset, Ordering::Release);
        *self.fixed.lock().unwrap_or_else(PoisonError::into_inner) = window.size.is_some();
        self.size.store(size, Ordering::Release);
    }

    fn grow_to(&self, end: u64) {
        self.size.fetch_max(end, Ordering::AcqRel);
    }
}

impl Driver for Raw {
    fn map(&self, _op: MapOp, offset: u64, len: u64) -> Step {
        Step::Forward { child: ChildIdx::FILE, offset: self.below(offset), len }
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            let file = self.file()?;
            file.debug_event(DebugEvent::ReadAio).await;
            file.read(self.below(offset), buf).await
        })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let end = offset.saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
            let file = self.file()?;
            file.debug_event(DebugEvent::WriteAio).await;
            file.write(self.below(offset), data, flags).await?;
            self.grow_to(end);
            Ok(())
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.file()?.write_zeroes(self.below(offset), len, flags).await?;
            self.grow_to(offset.saturating_add(len));
            Ok(())
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            let (file, from) = (self.file()?, self.below(offset));
            // The last sector of the image may end after the end of the file.
            let len = len.min(file.size().saturating_sub(from));
            if len == 0 { Ok(()) } else { file.discard(from, len).await }
        }))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        let status = Status::mapped(len, ChildIdx::FILE, self.below(offset));
        Some(Box::pin(std::future::ready(Ok(status))))
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn refresh_size(&self) -> Option<BoxFuture<'_, Result<u64>>> {
        if self.is_fixed() {
            return None;
        }
        Some(Box::pin(async move {
            let size = self.file()?.size().saturating_sub(self.offset());
            self.size.store(size, Ordering::Release);
            Ok(size)
        }))
    }

    fn limits(&self) -> Limits {
        let below = self.children.get(ChildIdx::FILE).map(|file| file.node().limits());
        let below = below.as_deref();
        Limits {
            request_alignment: if self.probed { 512 } else { 1 },
            mem_alignment: below.map_or(1, |limits| limits.mem_alignment),
            opt_transfer: below.map_or(0, |limits| limits.opt_transfer),
            write_flags: WriteFlags::FUA,
            zero_flags: ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK,
            has_zero_init: self.offset() == 0 && below.is_some_and(|limits| limits.has_zero_init),
            grows: !self.is_fixed() && below.is_some_and(|limits| limits.grows),
            ..Limits::default()
        }
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    fn debug_events(&self) -> Option<&dyn DebugEvents> {
        self.file().is_ok_and(|file| file.node().takes_debug_events()).then_some(self)
    }
}

/// Events go to the file.
impl DebugEvents for Raw {
    fn raise(&self, event: DebugEvent) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            if let Ok(file) = self.file() {
                file.debug_event(event).await;
            }
        })
    }
}

impl Resize for Raw {
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if self.is_fixed() {
                return Err(Error::unsupported("Cannot resize fixed-size raw disks"));
            }
            let below = size.checked_add(self.offset()).filter(|end| i64::try_from(*end).is_ok());
            let Some(below) = below else {
                return Err(Error::invalid("Disk size too large for the chosen offset"));
            };
            let file = self.file()?;
            file.resize(below, preallocation).await?;
            if file.size() != below {
                return Err(Error::unsupported("Cannot resize device files"));
            }
            self.size.store(size, Ordering::Release);
            Ok(())
        })
    }
}

impl Reopen for Raw {
    fn prepare(&self, _flags: OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>> {
        let mut options = options.clone();
        Box::pin(async move {
            let own: RawOptions = options.extract()?;
            if let Some(key) = options.first_key() {
                return Err(Error::invalid(format!("Cannot change the option '{key}'")));
            }
            let prepared = Window::new(&own, self.file()?.size())?;
            *self.prepared.lock().unwrap_or_else(PoisonError::into_inner) = Some(prepared);
            Ok(())
        })
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some((window, size)) = prepared {
                self.apply(window, size);
            }
        })
    }

    fn abort(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.prepared.lock().unwrap_or_else(PoisonError::into_inner).take();
        })
    }
}

impl RawFactory {
    fn open_raw(context: &mut OpenContext) -> Result<Raw> {
        let options: RawOptions = context.options.extract()?;
        let (window, size) = Window::new(&options, context.file()?.size())?;
        let raw = Raw {
            children: Arc::clone(&context.children),
            offset: AtomicU64::new(0),
            fixed: Mutex::new(false),
            size: AtomicU64::new(0),
            probed: context.flags.probed,
            prepared: Mutex::new(None),
        };
        raw.apply(window, size);
        if raw.probed && !context.flags.read_only {
            let file = context.file()?;
            let name = file.node().filename().or_else(|| context.filename.clone());
            context.graph.warn(&format!(
                "Image format was not specified for '{}' and probing guessed raw.\n         \
                 Automatically detecting the format is dangerous for raw images, write operations \
                 on block 0 will be restricted.\n         \
                 Specify the 'raw' format explicitly to remove the restrictions.",
                name.unwrap_or_default()
            ));
        }
        Ok(raw)
    }
}

impl DriverFactory for RawFactory {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    /// The file contains only guest data.
    fn children(&self) -> &'static [ChildSpec] {
        &[ChildSpec::FILTERED]
    }

    fn probe(&self, _head: &[u8], _filename: Option<&str>) -> u32 {
        1
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move { Ok(Box::new(Self::open_raw(context)?) as Box<dyn Driver>) })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        create::OPTIONS
    }

    fn check_create(&self, _graph: &Graph, options: &Options) -> Result<()> {
        create::read(options.clone()).map(drop)
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
        Some(Box::pin(std::future::ready(create::measure(request))))
    }
}
