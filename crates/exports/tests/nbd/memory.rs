//! A disk in memory for tests. A test can delay the requests to the disk and make them fail. The disk records which of
//! its blocks are allocated.

use oxblk_core::{
    Backend, BoxFuture, Driver, DriverFactory, DriverKind, Errno, Error, Graph, Limits,
    OpenContext, OpenFlags, Perm, Permissions, Result, Status, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{Event, IoBuf, IoBufMut};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Unit of allocation in bytes.
pub(crate) const BLOCK: u64 = 4096;

/// The disk, with methods for the test.
#[derive(Default)]
pub(crate) struct Disk {
    bytes: Mutex<Vec<u8>>,
    written: Mutex<BTreeSet<u64>>,
    log: Mutex<Vec<String>>,
    held: AtomicBool,
    waiting: AtomicUsize,
    failing: AtomicBool,
    released: Event,
}

impl Disk {
    pub(crate) fn new(size: usize) -> Arc<Disk> {
        Arc::new(Disk { bytes: Mutex::new(vec![0; size]), ..Disk::default() })
    }

    /// Makes requests wait until [`Disk::release`] is called.
    pub(crate) fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    pub(crate) fn release(&self) {
        self.held.store(false, Ordering::SeqCst);
        self.released.notify(usize::MAX);
    }

    /// The number of waiting requests.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Makes all requests, except block status queries, fail with `EIO`.
    pub(crate) fn fail(&self) {
        self.failing.store(true, Ordering::SeqCst);
    }

    pub(crate) fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    pub(crate) fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        self.bytes.lock().unwrap()[offset..offset + len].to_vec()
    }

    /// A backend on this disk.
    pub(crate) fn backend(self: &Arc<Disk>, read_only: bool) -> Backend {
        let graph = Graph::new(&[], oxblk_core::Gate::Anything);
        let flags = OpenFlags { read_only, unmap: true, ..OpenFlags::default() };
        let driver = Box::new(MemoryDriver(Arc::clone(self)));
        let node = graph.add_node(None, &Factory, driver, flags).unwrap();
        let taken =
            if read_only { Perm::CONSISTENT_READ } else { Perm::CONSISTENT_READ | Perm::WRITE };
        Backend::new(&graph, "disk", node, Permissions::sharing_all(taken)).unwrap()
    }

    async fn begin(&self, what: &str, offset: u64, len: u64) -> Result<()> {
        self.log.lock().unwrap().push(format!("{what} {offset}+{len}"));
        self.waiting.fetch_add(1, Ordering::SeqCst);
        while self.held.load(Ordering::SeqCst) {
            let listener = self.released.listen();
            if self.held.load(Ordering::SeqCst) {
                listener.await;
            }
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        if self.failing.load(Ordering::SeqCst) { Err(Error::from_errno(Errno::IO)) } else { Ok(()) }
    }

    fn mark(&self, offset: u64, len: u64, written: bool) {
        let mut blocks = self.written.lock().unwrap();
        for block in offset / BLOCK..(offset + len).div_ceil(BLOCK) {
            if written {
                blocks.insert(block);
            } else {
                blocks.remove(&block);
            }
        }
    }
}

struct MemoryDriver(Arc<Disk>);

impl Driver for MemoryDriver {
    fn read(&self, offset: u64, mut buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            self.0.begin("read", offset, buf.len() as u64).await?;
            let at = usize::try_from(offset).unwrap();
            let len = buf.len();
            buf.copy_from_slice(&self.0.bytes(at, len));
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: IoBuf, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.0.begin("write", offset, data.len() as u64).await?;
            let at = usize::try_from(offset).unwrap();
            self.0.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(&data);
            self.0.mark(offset, data.len() as u64, true);
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
            self.0.begin(&format!("zero{flags:?}"), offset, len).await?;
            if flags.contains(ZeroFlags::NO_FALLBACK) && !flags.contains(ZeroFlags::MAY_UNMAP) {
                return Err(Error::unsupported("this disk cannot write zeroes fast"));
            }
            let at = usize::try_from(offset).unwrap();
            let len = usize::try_from(len).unwrap();
            self.0.bytes.lock().unwrap()[at..at + len].fill(0);
            self.0.mark(offset, len as u64, !flags.contains(ZeroFlags::MAY_UNMAP));
            Ok(())
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.0.begin("discard", offset, len).await?;
            self.0.mark(offset, len, false);
            Ok(())
        }))
    }

    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.0.begin("flush", 0, 0)))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        Some(Box::pin(async move {
            let written = self.0.written.lock().unwrap().contains(&(offset / BLOCK));
            let len = len.min(BLOCK - offset % BLOCK);
            Ok(if written { Status::data(len) } else { Status::zero(len) })
        }))
    }

    fn size(&self) -> u64 {
        self.0.bytes.lock().unwrap().len() as u64
    }

    fn limits(&self) -> Limits {
        Limits { zero_flags: ZeroFlags::all(), ..Limits::default() }
    }
}

struct Factory;

impl DriverFactory for Factory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn open<'a>(&'a self, _: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async { Err(Error::unsupported("this driver cannot be opened by name")) })
    }
}
