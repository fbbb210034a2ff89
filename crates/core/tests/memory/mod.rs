//! Drivers in memory for the tests of the request path: a protocol with configurable limits, and a format that scatters
//! its clusters and reads unallocated clusters from its backing file.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oxblk_core::{
    BoxFuture, ChildIdx, Children, Driver, DriverFactory, DriverKind, Errno, Error, Graph, Limits,
    MapOp, Node, OpenContext, OpenFlags, Options, Permissions, Preallocation, Result, Status, Step,
    Want, WriteFlags, ZeroFlags, driver::Resize,
};
use oxblk_ring::{IoBuf, IoBufMut};

/// The data, the settings and the log of a memory protocol.
#[derive(Debug, Default)]
pub struct Memory {
    pub bytes: Mutex<Vec<u8>>,
    pub log: Mutex<Vec<String>>,
    pub limits: Limits,
    /// Number of times that each request yields to other tasks.
    pub yields: u32,
    /// While this is set, no request ends.
    pub held: AtomicBool,
    /// The driver implements zero writes itself.
    pub zeroes: bool,
    /// Number of times that the driver yields to other tasks before a discard takes effect. As on a host, the discard
    /// takes effect even if its future is dropped. A number other than 0 applies to writes too.
    pub landing: AtomicU32,
    /// Writes and discards that start at this offset fail and change nothing.
    pub bad: Option<u64>,
    /// Reads that start at this offset fail.
    pub bad_read: Option<u64>,
    /// A resize fails after it has changed the size.
    pub resize_fails: AtomicBool,
    /// The errno with which all reads, writes, zero writes, discards and flushes fail; 0: they succeed.
    pub errno: AtomicI32,
    /// Duration of each read, write, zero write, discard and flush in milliseconds.
    pub delay_ms: AtomicU64,
    /// The permissions that the driver received last.
    pub permissions: Mutex<Option<Permissions>>,
}

impl Memory {
    pub fn new(size: usize, limits: Limits) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(vec![0; size]), limits, ..Self::default() })
    }

    /// Like [`new`](Memory::new) without limits; each request yields `yields` times to other tasks.
    pub fn slow(size: usize, yields: u32) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(vec![0; size]), yields, ..Self::default() })
    }

    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    fn record(&self, what: &str, offset: u64, len: usize) {
        self.log.lock().unwrap().push(format!("{what} {offset}+{len}"));
    }

    async fn pause(&self) {
        for _ in 0..self.yields {
            oxblk_ring::yield_now().await;
        }
        while self.held.load(SeqCst) {
            oxblk_ring::yield_now().await;
        }
        let delay = self.delay_ms.load(SeqCst);
        if delay != 0 {
            oxblk_ring::sleep(Duration::from_millis(delay)).await;
        }
    }

    /// The outcome of a request, after its delay.
    async fn outcome(&self) -> Result<()> {
        self.pause().await;
        match self.errno.load(SeqCst) {
            0 => Ok(()),
            errno => Err(Error::from_errno(errno)),
        }
    }

    /// Carries out `change`, even if the caller's future is dropped.
    async fn land(self: &Arc<Self>, change: impl FnOnce(&Self) + 'static) {
        let landed = Arc::new(AtomicBool::new(false));
        let (memory, done) = (Arc::clone(self), Arc::clone(&landed));
        let yields = self.landing.load(SeqCst);
        oxblk_ring::spawn(async move {
            for _ in 0..yields {
                oxblk_ring::yield_now().await;
            }
            change(&memory);
            done.store(true, SeqCst);
        })
        .detach();
        while !landed.load(SeqCst) {
            oxblk_ring::yield_now().await;
        }
    }

    fn put(&self, offset: u64, data: &[u8]) {
        let mut bytes = self.bytes.lock().unwrap();
        let at = usize::try_from(offset).unwrap();
        if bytes.len() < at + data.len() {
            bytes.resize(at + data.len(), 0);
        }
        bytes[at..at + data.len()].copy_from_slice(data);
    }

    fn refuse(&self, offset: u64) -> Result<()> {
        if self.bad == Some(offset) { Err(Error::from_errno(Errno::IO)) } else { Ok(()) }
    }
}

pub struct MemoryDriver(pub Arc<Memory>);

impl MemoryDriver {
    fn check(&self, offset: u64, len: usize) {
        let alignment = u64::from(self.0.limits.request_alignment);
        assert_eq!(offset % alignment, 0, "misaligned request reached the driver");
        assert_eq!(len as u64 % alignment, 0, "misaligned request reached the driver");
        let most = self.0.limits.max_transfer;
        assert!(most == 0 || len as u64 <= most, "a request that is too long reached the driver");
    }
}

impl Driver for MemoryDriver {
    fn read(&self, offset: u64, mut buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            self.check(offset, buf.len());
            self.0.record("read", offset, buf.len());
            self.0.outcome().await?;
            if self.0.bad_read == Some(offset) {
                return Err(Error::from_errno(Errno::IO));
            }
            let bytes = self.0.bytes.lock().unwrap();
            let at = usize::try_from(offset).unwrap();
            for (i, byte) in buf.iter_mut().enumerate() {
                *byte = bytes.get(at + i).copied().unwrap_or(0);
            }
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check(offset, data.len());
            let fua = flags.contains(WriteFlags::FUA);
            self.0.record(if fua { "write FUA" } else { "write" }, offset, data.len());
            self.0.outcome().await?;
            self.0.refuse(offset)?;
            if self.0.landing.load(SeqCst) == 0 {
                self.0.put(offset, &data);
            } else {
                self.0.land(move |memory| memory.put(offset, &data)).await;
            }
            Ok(())
        })
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            let len = usize::try_from(len).unwrap();
            self.0.record("discard", offset, len);
            self.0.outcome().await?;
            self.0.refuse(offset)?;
            self.0.land(move |memory| memory.put(offset, &vec![0; len])).await;
            Ok(())
        }))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        if !self.0.zeroes {
            return None;
        }
        Some(Box::pin(async move {
            let len = usize::try_from(len).unwrap();
            let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
            self.0.record(if unmap { "unmap" } else { "zero" }, offset, len);
            self.0.outcome().await?;
            let at = usize::try_from(offset).unwrap();
            self.0.bytes.lock().unwrap()[at..at + len].fill(0);
            Ok(())
        }))
    }

    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.0.record("flush", 0, 0);
            self.0.outcome().await
        }))
    }

    fn block_status(
        &self,
        _offset: u64,
        len: u64,
        _want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        Some(Box::pin(async move { Ok(Status::data(len)) }))
    }

    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async {
            self.0.record("close", 0, 0);
            self.0.pause().await;
            Ok(())
        }))
    }

    fn size(&self) -> u64 {
        self.0.bytes.lock().unwrap().len() as u64
    }

    fn limits(&self) -> Limits {
        let zero_flags = self.0.limits.zero_flags | ZeroFlags::MAY_UNMAP;
        Limits { zero_flags, ..self.0.limits.clone() }
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn commit_permissions(&self, permissions: Permissions) {
        *self.0.permissions.lock().unwrap() = Some(permissions);
    }
}

impl Resize for MemoryDriver {
    fn resize(&self, size: u64, _preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.0.bytes.lock().unwrap().resize(usize::try_from(size).unwrap(), 0);
            if self.0.resize_fails.load(SeqCst) {
                return Err(Error::from_errno(Errno::IO));
            }
            Ok(())
        })
    }
}

pub struct MemoryFactory;

impl DriverFactory for MemoryFactory {
    fn name(&self) -> &'static str {
        "memory"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            oxblk_ring::yield_now().await;
            let size = context
                .options
                .take_size("size")?
                .ok_or_else(|| Error::invalid("size is required"))?;
            let memory = Memory::new(usize::try_from(size).unwrap(), Limits::default());
            let driver: Box<dyn Driver> = Box::new(MemoryDriver(memory));
            Ok(driver)
        })
    }
}

/// A format without metadata on disk. Even blocks of `block` bytes are swapped pairwise in the file; odd blocks are
/// read from the backing file.
pub struct Checkered {
    pub block: u64,
    pub size: u64,
}

impl Checkered {
    fn place(&self, offset: u64) -> (Option<u64>, u64) {
        let index = offset / self.block;
        let within = offset % self.block;
        let place = index.is_multiple_of(2).then(|| (index ^ 2) / 2 * self.block + within);
        (place, self.block - within)
    }
}

impl Driver for Checkered {
    fn map(&self, op: MapOp, offset: u64, _len: u64) -> Step {
        match (self.place(offset), op) {
            ((Some(place), len), _) => Step::Forward { child: ChildIdx::FILE, offset: place, len },
            ((None, len), MapOp::Read) => Step::Forward { child: ChildIdx::BACKING, offset, len },
            _ => Step::Slow,
        }
    }
    fn read(&self, _offset: u64, _buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async { Err(Error::invalid("reads of this format never need the slow path")) })
    }
    fn write(&self, _offset: u64, _data: IoBuf, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Err(Error::from_errno(Errno::NOSPC)) })
    }
    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        Some(Box::pin(async move {
            Ok(match self.place(offset) {
                (Some(place), room) => Status::stored(len.min(room), ChildIdx::FILE, place),
                (None, room) => Status::unallocated(len.min(room)),
            })
        }))
    }
    fn size(&self) -> u64 {
        self.size
    }
}

pub struct CheckeredFactory;

impl DriverFactory for CheckeredFactory {
    fn name(&self) -> &'static str {
        "checkered"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }
    fn supports_backing(&self) -> bool {
        true
    }
    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let size = context.options.take_size("size")?.unwrap_or(8192);
            let driver: Box<dyn Driver> = Box::new(Checkered { block: 512, size });
            Ok(driver)
        })
    }
}

/// A filter that passes all requests on. With the option `reads=on`, the open reads the first sector of the child; with
/// `fails=on`, the open then fails.
struct Pass(Arc<Children>);

impl Driver for Pass {
    fn map(&self, _op: MapOp, offset: u64, len: u64) -> Step {
        Step::Forward { child: ChildIdx::FILE, offset, len }
    }
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.0.require(ChildIdx::FILE)?.read(offset, buf).await })
    }
    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.0.require(ChildIdx::FILE)?.write(offset, data, flags).await })
    }
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.0.require(ChildIdx::FILE)?.write_zeroes(offset, len, flags).await
        }))
    }
    fn size(&self) -> u64 {
        self.0.get(ChildIdx::FILE).map_or(0, |file| file.size())
    }
    fn limits(&self) -> Limits {
        Limits { write_flags: WriteFlags::FUA, ..Limits::default() }
    }
}

pub struct PassFactory;

impl DriverFactory for PassFactory {
    fn name(&self) -> &'static str {
        "pass"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }
    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            if context.options.take_bool("reads")? == Some(true) {
                context.file()?.read(0, IoBufMut::new(512)).await?;
            }
            if context.options.take_bool("fails")? == Some(true) {
                return Err(Error::from_errno(Errno::IO));
            }
            let driver: Box<dyn Driver> = Box::new(Pass(Arc::clone(&context.children)));
            Ok(driver)
        })
    }
}

pub static DRIVERS: &[&dyn DriverFactory] = &[&MemoryFactory, &CheckeredFactory, &PassFactory];

pub fn graph() -> Graph {
    Graph::new(DRIVERS, oxblk_core::Gate::Anything)
}

/// A node with a [`MemoryDriver`] for `memory`.
pub fn node(graph: &Graph, name: &str, memory: &Arc<Memory>) -> Arc<Node> {
    node_with(graph, name, memory, OpenFlags { unmap: true, ..OpenFlags::default() })
}

/// Like [`node`], with the flags `flags`.
pub fn node_with(graph: &Graph, name: &str, memory: &Arc<Memory>, flags: OpenFlags) -> Arc<Node> {
    let driver = Box::new(MemoryDriver(Arc::clone(memory)));
    graph.add_node(Some(name), &MemoryFactory, driver, flags).unwrap()
}

pub fn options(dotted: &str) -> Options {
    Options::from_dotted(dotted, None).unwrap()
}
