//! A freed cluster is quarantined: it is allocated again only after all requests that were in flight when it was freed
//! have ended.
//!
//! The storage delays one read of a data cluster. During this delay, the cluster is discarded and other clusters are
//! written. A read through a backend counts as in flight, and returns the old contents. If the test bypasses the backend,
//! the same read returns the data of another cluster. This proves that the quarantine is effective.
//!
//! Other tests delay a write. During this delay, the cluster of the write is discarded, or a part of the cluster is zeroed
//! with permission to unmap. The written data must not go to a cluster that was freed and allocated again. The other
//! clusters must keep their data.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use oxblk_core::check::Fix;
use oxblk_core::create::{CreateRequest, CreateTarget};
use oxblk_core::driver::Resize;
use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{
    Attachment, Backend, BoxFuture, Driver, DriverFactory, DriverKind, Error, Graph, Limits,
    OpenContext, OpenFlags, Options, Perm, Permissions, Preallocation, Result, WriteFlags,
    ZeroFlags,
};
use oxblk_formats::qcow2::QCOW2;
use oxblk_ring::{Event, IoBuf, IoBufMut, block_on, spawn, yield_now};

const CLUSTER: u64 = 65536;

/// The kind of operation that the storage delays. The storage delays only the first such operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A read of a whole cluster.
    Read,
    /// A write that contains this byte.
    Write(u8),
}

/// Storage in memory that delays one operation.
#[derive(Default)]
struct Storage {
    bytes: Mutex<Vec<u8>>,
    held: Mutex<Option<Kind>>,
    waiting: AtomicBool,
    released: Event,
}

impl Storage {
    fn hold(&self, kind: Kind) {
        *self.held.lock().unwrap() = Some(kind);
    }

    fn release(&self) {
        *self.held.lock().unwrap() = None;
        self.released.notify(usize::MAX);
    }

    /// Waits for the release if `is_meant` accepts the delayed kind and no operation was delayed before.
    async fn wait_if(&self, is_meant: impl Fn(Kind) -> bool) {
        let held = || self.held.lock().unwrap().is_some_and(&is_meant);
        if held() && !self.waiting.swap(true, SeqCst) {
            let released = self.released.listen();
            if held() {
                released.await;
            }
        }
    }

    /// Waits until the storage is delaying an operation.
    async fn until_waiting(&self) {
        while !self.waiting.load(SeqCst) {
            yield_now().await;
        }
    }
}

struct Held(Arc<Storage>);

impl Driver for Held {
    fn read(&self, offset: u64, mut buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            let whole = buf.len() as u64 == CLUSTER;
            self.0.wait_if(|kind| kind == Kind::Read && whole).await;
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
            let is_meant = |kind| matches!(kind, Kind::Write(byte) if data.contains(&byte));
            self.0.wait_if(is_meant).await;
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

async fn new_image(graph: &Graph, storage: &Arc<Storage>, with: &str, opened: &str) -> Backend {
    let driver = Box::new(Held(Arc::clone(storage)));
    let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
    let file = graph.add_node(Some("store"), &HELD, driver, flags.clone()).unwrap();
    let all = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
    let edge = Attachment::new(&file, "creation", "file", all).unwrap();
    let options = Options::from_dotted(&format!("size=1M{with}"), None).unwrap();
    let request = CreateRequest { target: CreateTarget::File(Arc::clone(edge.edge())), options };
    QCOW2.create(graph, request).unwrap().await.unwrap();
    drop(edge);
    let options = format!("driver=qcow2,file=store{opened}");
    let options = Options::from_dotted(&options, None).unwrap();
    graph.open_backend(None, options, flags).await.unwrap()
}

/// Reads guest cluster 0 with `read`. The storage delays the read until the cluster is discarded and three other clusters
/// are written. Returns the first byte of the result.
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
    storage.hold(Kind::Read);
    let reader = spawn(read());
    storage.until_waiting().await;
    disk.discard(0, CLUSTER).await.unwrap();
    // The first write-back drops the reference. Only the second write-back could make the cluster available for allocation.
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
        let disk = new_image(&graph, &storage, "", "").await;
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
fn a_read_that_is_not_counted_as_in_flight_sees_another_clusters_data() {
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let storage = Arc::new(Storage::default());
        let disk = new_image(&graph, &storage, "", "").await;
        let node = disk.node().unwrap();
        let len = usize::try_from(CLUSTER).unwrap();
        let seen = read_across_a_discard(&disk, &storage, || async move {
            node.driver().read(0, IoBufMut::new(len)).await
        })
        .await;
        assert_eq!(seen, 0xbb, "the cluster was not allocated again: the test proves nothing");
        disk.close().await.unwrap();
    });
}

/// Images without and with subclusters.
const LAYOUTS: [&str; 2] = ["", ",extended_l2=on"];
/// The byte that the delayed write writes.
const HELD_BYTE: u8 = 0xcc;
/// The disk offset of the delayed write, in bytes. The write is within cluster 0.
const HELD_AT: u64 = 8192;
/// The length of the delayed write, in bytes.
const HELD_LEN: usize = 4096;

/// The state of cluster 0 before the delayed write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// Data in a cluster that the image owns: the write goes to this cluster.
    Data,
    /// An allocated zero cluster: the write goes to its host cluster, with zeroes around it.
    KeptZeroes,
    /// Data in a cluster shared with a snapshot: the write goes to a new cluster, with the old data around it.
    Shared,
}

impl Before {
    const ALL: [Self; 3] = [Self::Data, Self::KeptZeroes, Self::Shared];

    fn byte(self) -> u8 {
        if self == Self::KeptZeroes { 0 } else { 0xaa }
    }
}

fn filled(len: usize, byte: u8) -> IoBuf {
    IoBufMut::filled(len, byte).freeze()
}

async fn bytes(disk: &Backend, offset: u64, len: usize) -> Vec<u8> {
    disk.read(offset, IoBufMut::new(len)).await.unwrap().to_vec()
}

async fn prepare(disk: &Backend, before: Before) {
    let cluster = usize::try_from(CLUSTER).unwrap();
    disk.write(0, filled(cluster, 0xaa), WriteFlags::empty()).await.unwrap();
    match before {
        Before::Data => {}
        Before::KeptZeroes => disk.write_zeroes(0, CLUSTER, ZeroFlags::empty()).await.unwrap(),
        Before::Shared => {
            let new = SnapshotInfo { name: "shared".to_owned(), ..SnapshotInfo::default() };
            disk.create_snapshot(&new).await.unwrap();
        }
    }
    disk.flush().await.unwrap();
}

/// Writes a part of cluster 0. While the storage delays this write, starts `other`, and allocates the clusters that
/// become free.
async fn during_a_write<F>(disk: &Backend, storage: &Storage, other: F)
where
    F: Future<Output = Result<()>> + 'static,
{
    let writer = disk.clone();
    storage.hold(Kind::Write(HELD_BYTE));
    let writing = spawn(async move {
        writer.write(HELD_AT, filled(HELD_LEN, HELD_BYTE), WriteFlags::empty()).await
    });
    storage.until_waiting().await;
    let other = spawn(other);
    for _ in 0..50 {
        yield_now().await;
    }
    disk.flush().await.unwrap();
    for index in 1..4 {
        let data = filled(usize::try_from(CLUSTER).unwrap(), 0xbb);
        disk.write(index * CLUSTER, data, WriteFlags::FUA).await.unwrap();
    }
    storage.release();
    writing.await.unwrap();
    other.await.unwrap();
    for index in 4..7 {
        let data = filled(usize::try_from(CLUSTER).unwrap(), 0xdd);
        disk.write(index * CLUSTER, data, WriteFlags::FUA).await.unwrap();
    }
}

/// Asserts that the other clusters contain the data written to them, and that a check of the image finds no errors.
async fn nothing_else_is_harmed(disk: &Backend, before: Before) {
    let cluster = usize::try_from(CLUSTER).unwrap();
    for index in 1..7 {
        let byte = if index < 4 { 0xbb } else { 0xdd };
        assert!(bytes(disk, index * CLUSTER, cluster).await.iter().all(|b| *b == byte));
    }
    // The first write-back cycle lowers refcounts in memory, and the second one writes them.
    disk.flush().await.unwrap();
    disk.flush().await.unwrap();
    let node = disk.node().unwrap();
    let report = node.driver().check().unwrap().check(Fix::Nothing, &|_| ()).await.unwrap();
    assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0));
    if before == Before::Shared {
        let id = disk.snapshots().await.unwrap()[0].id.clone();
        disk.apply_snapshot(&id).await.unwrap();
        assert!(bytes(disk, 0, cluster).await.iter().all(|b| *b == 0xaa));
    }
}

#[test]
fn a_discard_during_a_write_with_copy_on_write_corrupts_nothing() {
    for (layout, before) in LAYOUTS.into_iter().flat_map(|l| Before::ALL.map(|b| (l, b))) {
        block_on(async {
            let (graph, storage) =
                (Graph::new(DRIVERS, oxblk_core::Gate::Anything), Arc::new(Storage::default()));
            let disk = new_image(&graph, &storage, layout, "").await;
            prepare(&disk, before).await;
            let other = disk.clone();
            let discard = async move { other.discard(0, CLUSTER).await };
            during_a_write(&disk, &storage, discard).await;
            let (at, cluster) =
                (usize::try_from(HELD_AT).unwrap(), usize::try_from(CLUSTER).unwrap());
            let seen = bytes(&disk, 0, cluster).await;
            // The requests overlap, so the write may take effect before or after the discard.
            let written = seen[at];
            assert!([0, HELD_BYTE].contains(&written), "{layout} {before:?}");
            assert!(seen[at..at + HELD_LEN].iter().all(|byte| *byte == written));
            assert!(seen[..at].iter().all(|byte| *byte == 0), "{layout} {before:?}");
            assert!(seen[at + HELD_LEN..].iter().all(|byte| *byte == 0), "{layout} {before:?}");
            nothing_else_is_harmed(&disk, before).await;
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn a_zero_write_with_unmap_does_not_affect_a_write_to_another_part_of_the_cluster() {
    // Zero everything around the delayed write, or only a part of it.
    let zeroed =
        [vec![(0, HELD_AT), (HELD_AT + 4096, CLUSTER - HELD_AT - 4096)], vec![(32768, 4096)]];
    let cases = LAYOUTS.into_iter().flat_map(|l| Before::ALL.map(|b| (l, b)));
    for (layout, before) in cases {
        for ranges in zeroed.clone() {
            block_on(async {
                let (graph, storage) =
                    (Graph::new(DRIVERS, oxblk_core::Gate::Anything), Arc::new(Storage::default()));
                let detect = ",discard=unmap,detect-zeroes=unmap";
                let disk = new_image(&graph, &storage, layout, detect).await;
                prepare(&disk, before).await;
                let (other, zeroes) = (disk.clone(), ranges.clone());
                let zero = async move {
                    for (offset, len) in zeroes {
                        let data = filled(usize::try_from(len).unwrap(), 0);
                        other.write(offset, data, WriteFlags::empty()).await?;
                    }
                    Ok(())
                };
                during_a_write(&disk, &storage, zero).await;
                let cluster = usize::try_from(CLUSTER).unwrap();
                let seen = bytes(&disk, 0, cluster).await;
                for (at, byte) in (0_u64..).zip(&seen) {
                    let expected = if (HELD_AT..HELD_AT + HELD_LEN as u64).contains(&at) {
                        HELD_BYTE
                    } else if ranges
                        .iter()
                        .any(|(offset, len)| (*offset..offset + len).contains(&at))
                    {
                        0
                    } else {
                        before.byte()
                    };
                    assert_eq!(*byte, expected, "{layout} {before:?} {ranges:?} at {at}");
                }
                nothing_else_is_harmed(&disk, before).await;
                disk.close().await.unwrap();
            });
        }
    }
}
