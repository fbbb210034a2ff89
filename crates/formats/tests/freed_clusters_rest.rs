//! A freed cluster is handed out again only after every request that was in flight when it was freed has ended.
//!
//! The storage holds back one read of a data cluster while that cluster is discarded and others are written. Through a
//! backend, which marks the request as being in flight, the read sees the old contents. The same read made behind
//! core's back sees another cluster's data: the rule is what stands between the two.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use oxblk_core::create::{CreateRequest, CreateTarget};
use oxblk_core::driver::Resize;
use oxblk_core::{
    Backend, BoxFuture, Driver, DriverFactory, DriverKind, Edge, Error, Graph, Limits, OpenContext,
    OpenFlags, Options, Perm, Permissions, Preallocation, Result, WriteFlags, ZeroFlags,
};
use oxblk_formats::qcow2::QCOW2;
use oxblk_ring::{Event, IoBuf, IoBufMut, block_on, spawn, yield_now};

const CLUSTER: u64 = 65536;

/// Memory whose reads wait while it is held.
#[derive(Default)]
struct Storage {
    bytes: Mutex<Vec<u8>>,
    held: AtomicBool,
    waiting: AtomicBool,
    released: Event,
}

impl Storage {
    fn hold(&self) {
        self.held.store(true, SeqCst);
    }

    fn release(&self) {
        self.held.store(false, SeqCst);
        self.released.notify(usize::MAX);
    }
}

struct Held(Arc<Storage>);

impl Driver for Held {
    fn read(&self, offset: u64, mut buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            // Only the first read of a whole cluster is held: it is the one of the test.
            if self.0.held.load(SeqCst)
                && buf.len() as u64 == CLUSTER
                && !self.0.waiting.swap(true, SeqCst)
            {
                let released = self.0.released.listen();
                if self.0.held.load(SeqCst) {
                    released.await;
                }
            }
            let bytes = self.0.bytes.lock().unwrap();
            let at = usize::try_from(offset).unwrap();
            for (index, byte) in buf.iter_mut().enumerate() {
                *byte = bytes.get(at + index).copied().unwrap_or(0);
            }
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: IoBuf, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let at = usize::try_from(offset).unwrap();
            let mut bytes = self.0.bytes.lock().unwrap();
            if bytes.len() < at + data.len() {
                bytes.resize(at + data.len(), 0);
            }
            bytes[at..at + data.len()].copy_from_slice(&data);
            Ok(())
        })
    }

    fn write_zeroes(
        &self,
        _offset: u64,
        _len: u64,
        _flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        None
    }

    fn size(&self) -> u64 {
        self.0.bytes.lock().unwrap().len() as u64
    }

    fn limits(&self) -> Limits {
        Limits { grows: true, ..Limits::default() }
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }
}

impl Resize for Held {
    fn resize(&self, size: u64, _preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.0.bytes.lock().unwrap().resize(usize::try_from(size).unwrap(), 0);
            Ok(())
        })
    }
}

struct HeldFactory;
static HELD: HeldFactory = HeldFactory;

impl DriverFactory for HeldFactory {
    fn name(&self) -> &'static str {
        "held"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn open<'a>(&'a self, _context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async { Err(Error::invalid("made by hand")) })
    }
}

static DRIVERS: &[&dyn DriverFactory] = &[&HELD, QCOW2];

async fn new_image(graph: &Graph, storage: &Arc<Storage>) -> Backend {
    let driver = Box::new(Held(Arc::clone(storage)));
    let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
    let file = graph.add_node(Some("store"), &HELD, driver, flags.clone()).unwrap();
    let all = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
    let edge = Edge::attach(Arc::clone(&file), "creation", "file", all).unwrap();
    let options = Options::from_dotted("size=1M", None).unwrap();
    let request = CreateRequest { target: CreateTarget::File(Arc::clone(&edge)), options };
    QCOW2.create(graph, request).unwrap().await.unwrap();
    edge.detach();
    let options = Options::from_dotted("driver=qcow2,file=store", None).unwrap();
    graph.open_backend(None, options, flags).await.unwrap()
}

/// Reads guest cluster 0 with `read`, which the storage holds back while the cluster is discarded and three others are
/// written, and gives the first byte that the read returns.
async fn read_across_a_discard<F>(
    disk: &Backend,
    storage: &Arc<Storage>,
    read: impl FnOnce() -> F,
) -> u8
where
    F: Future<Output = Result<IoBufMut>> + 'static,
{
    let cluster = |byte| IoBufMut::filled(usize::try_from(CLUSTER).unwrap(), byte).freeze();
    disk.write(0, cluster(0xaa), WriteFlags::FUA).await.unwrap();
    storage.hold();
    let reader = spawn(read());
    while !storage.waiting.load(SeqCst) {
        yield_now().await;
    }
    disk.discard(0, CLUSTER).await.unwrap();
    // The first write-back drops the reference, the second would be the earliest to see the cluster free.
    disk.flush().await.unwrap();
    for index in 1..4 {
        disk.write(index * CLUSTER, cluster(0xbb), WriteFlags::FUA).await.unwrap();
    }
    storage.release();
    let read = reader.await.unwrap();
    assert!(read.iter().all(|byte| *byte == read[0]));
    read[0]
}

#[test]
fn a_read_in_flight_never_sees_another_clusters_data() {
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let storage = Arc::new(Storage::default());
        let disk = new_image(&graph, &storage).await;
        let reader = disk.clone();
        let len = usize::try_from(CLUSTER).unwrap();
        let seen = read_across_a_discard(&disk, &storage, || async move {
            reader.read(0, IoBufMut::new(len)).await
        })
        .await;
        assert_eq!(seen, 0xaa);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_read_that_nobody_counts_would_see_it() {
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let storage = Arc::new(Storage::default());
        let disk = new_image(&graph, &storage).await;
        let node = disk.node().unwrap();
        let len = usize::try_from(CLUSTER).unwrap();
        let seen = read_across_a_discard(&disk, &storage, || async move {
            node.driver().read(0, IoBufMut::new(len)).await
        })
        .await;
        assert_eq!(seen, 0xbb, "the cluster was not handed out again: the test shows nothing");
        disk.close().await.unwrap();
    });
}
