//! A disk in memory, for tests of filters: with errors, and with requests that take a random time.

#![allow(dead_code, reason = "not every test program uses every function")]

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oxblk_core::{
    BoxFuture, Driver, DriverFactory, DriverKind, Errno, Error, Graph, Limits, Node, OpenContext,
    OpenFlags, Result, WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, sleep};

/// The driver of [`Memory`]. Options cannot describe such a node.
pub static MEMORY: MemoryFactory = MemoryFactory;

#[derive(Debug)]
pub struct MemoryFactory;

impl DriverFactory for MemoryFactory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn open<'a>(&'a self, _: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async { Err(Error::invalid("Options cannot describe a disk in memory")) })
    }
}

/// The contents of a disk, and its faults.
#[derive(Debug, Default)]
pub struct Contents {
    pub data: Mutex<Vec<u8>>,
    /// The errno of all reads, or 0.
    pub fails_reads: AtomicI32,
    /// The errno of all writes, or 0.
    pub fails_writes: AtomicI32,
    pub flushes: AtomicU64,
    /// The number of reads and of writes that have begun.
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    /// The number of the read or write that fails with `EIO`. The first has the number 1. 0: none.
    pub failing_read: AtomicU64,
    pub failing_write: AtomicU64,
    /// The additional duration of a write in milliseconds.
    pub write_time: AtomicU64,
    /// The number of the next request, which determines how long the request takes.
    requests: AtomicU64,
    /// The seed of the durations. 0: requests take no time.
    seed: AtomicU64,
}

impl Contents {
    pub fn bytes(&self) -> Vec<u8> {
        self.data.lock().unwrap().clone()
    }

    pub fn delay(&self, seed: u64) {
        self.seed.store(seed, Relaxed);
    }

    async fn wait(&self) {
        let seed = self.seed.load(Relaxed);
        if seed != 0 {
            let number = self.requests.fetch_add(1, Relaxed);
            let mixed = (seed ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            sleep(Duration::from_micros((mixed >> 32) % 200)).await;
        }
    }
}

struct Memory(Arc<Contents>);

fn fault(errno: &AtomicI32) -> Result<()> {
    match errno.load(Relaxed) {
        0 => Ok(()),
        errno => Err(Error::from_errno(errno)),
    }
}

fn fault_at(failing: &AtomicU64, number: u64) -> Result<()> {
    if failing.load(Relaxed) == number { Err(Error::from_errno(Errno::IO)) } else { Ok(()) }
}

fn range(offset: u64, len: usize) -> std::ops::Range<usize> {
    let start = usize::try_from(offset).unwrap();
    start..start + len
}

impl Driver for Memory {
    fn read(&self, offset: u64, mut buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            let number = self.0.reads.fetch_add(1, Relaxed) + 1;
            self.0.wait().await;
            fault(&self.0.fails_reads)?;
            fault_at(&self.0.failing_read, number)?;
            let len = buf.len();
            buf.copy_from_slice(&self.0.data.lock().unwrap()[range(offset, len)]);
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: IoBuf, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let number = self.0.writes.fetch_add(1, Relaxed) + 1;
            self.0.wait().await;
            let time = self.0.write_time.load(Relaxed);
            if time != 0 {
                sleep(Duration::from_millis(time)).await;
            }
            fault(&self.0.fails_writes)?;
            fault_at(&self.0.failing_write, number)?;
            self.0.data.lock().unwrap()[range(offset, data.len())].copy_from_slice(&data);
            Ok(())
        })
    }

    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            fault(&self.0.fails_writes)?;
            self.0.flushes.fetch_add(1, Relaxed);
            Ok(())
        }))
    }

    fn size(&self) -> u64 {
        self.0.data.lock().unwrap().len() as u64
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }
}

/// Adds a disk of `size` bytes to the graph. The node stays without users until [`Graph::allow_close`].
pub fn add(graph: &Graph, name: &str, size: usize) -> (Arc<Contents>, Arc<Node>) {
    let contents = Arc::new(Contents { data: Mutex::new(vec![0; size]), ..Contents::default() });
    let driver = Box::new(Memory(Arc::clone(&contents)));
    let node = graph.add_node(Some(name), &MEMORY, driver, OpenFlags::default()).unwrap();
    graph.keep_open(Arc::clone(&node)).unwrap();
    (contents, node)
}
