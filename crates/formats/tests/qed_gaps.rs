//! Changes of a QED image that free clusters, on a disk on which the clusters cannot be moved or the file cannot be truncated:
//! the change succeeds, and the close of the image removes the unused clusters.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use oxblk_core::check::Fix;
use oxblk_core::create::{CreateRequest, CreateTarget};
use oxblk_core::{
    Attachment, Backend, DriverTable, Errno, Graph, Node, OpenFlags, Options, Perm, Permissions,
    Preallocation, WriteFlags,
};
use oxblk_formats::qed::QED;
use oxblk_protocols::file::{FILE, FileDriver};
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_ring::{File, IoBufMut};

static DRIVERS: DriverTable = &[QED, &FILE];

const CLUSTER: u64 = 4096;
const SIZE: u64 = 256 * CLUSTER;
/// The first part of the disk. Its data lies behind the data of the second part.
const KEPT: u64 = 16 * CLUSTER;

fn options(dotted: &str) -> Options {
    Options::from_dotted(dotted, None).unwrap()
}

fn file(graph: &Graph, disk: &Disk) -> Arc<Node> {
    let driver = FileDriver::from_ring_file(File::sim(disk), disk.len());
    graph.add_node(Some("file"), &FILE, Box::new(driver), OpenFlags::default()).unwrap()
}

async fn open(disk: &Disk) -> Backend {
    let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
    let _file = file(&graph, disk);
    let options = options("driver=qed,file=file");
    graph.open_backend(None, options, OpenFlags::default()).await.unwrap()
}

async fn write(image: &Backend, offset: u64, len: u64, byte: u8) {
    let data = IoBufMut::filled(usize::try_from(len).unwrap(), byte).freeze();
    image.write(offset, data, WriteFlags::empty()).await.unwrap();
}

async fn image(disk: &Disk) -> Backend {
    let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
    let all = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
    let edge = Attachment::new(&file(&graph, disk), "creation", "file", all).unwrap();
    let options = options(&format!("size={SIZE},cluster_size={CLUSTER},table_size=1"));
    let request = CreateRequest { target: CreateTarget::File(Arc::clone(edge.edge())), options };
    QED.create(&graph, request).unwrap().await.unwrap();
    drop(edge);
    let image = open(disk).await;
    write(&image, KEPT, SIZE - KEPT, 2).await;
    write(&image, 0, KEPT, 1).await;
    image.flush().await.unwrap();
    image
}

/// Whether the header has the need-check flag.
fn needs_check(disk: &Disk) -> bool {
    disk.bytes()[16] & 2 != 0
}

/// Runs `change` on an image while operations of the disk of the kind `op` fail, from the `nth` on. `clusters` is the number of data clusters
/// that the change keeps.
async fn try_changing((op, nth): (FaultOp, u64), clusters: u64, change: impl AsyncFn(&Backend)) {
    let disk = Disk::new(1, 0);
    let image = image(&disk).await;
    let rule = FailRule { op, nth: Some(nth), range: None, errno: Errno::IO, once: false };
    disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
    let before = disk.len();
    change(&image).await;
    assert!(disk.len() >= before, "{op:?}: nothing has failed");
    disk.set_faults(Faults::default());
    assert!(needs_check(&disk), "{op:?}");
    if clusters > 0 {
        let read = image.read(0, IoBufMut::new(usize::try_from(KEPT).unwrap())).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 1), "{op:?}");
    }
    image.close().await.unwrap();
    assert!(!needs_check(&disk), "{op:?}");
    let image = open(&disk).await;
    let node = image.node().unwrap();
    let report = node.driver().check().unwrap().check(Fix::Nothing, &|_| ()).await.unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{op:?}");
    assert_eq!(report.allocated_clusters, clusters, "{op:?}");
    drop(node);
    image.close().await.unwrap();
}

#[test]
fn a_shrink_succeeds_although_gaps_cannot_be_filled() {
    sim::run(1, async {
        for op in [(FaultOp::Read, 1), (FaultOp::Truncate, 1)] {
            try_changing(op, KEPT / CLUSTER, async |image| {
                image.resize(KEPT, Preallocation::Off).await.unwrap();
                assert_eq!(image.size(), KEPT);
            })
            .await;
        }
    });
}

#[test]
fn an_image_is_emptied_although_gaps_cannot_be_filled() {
    sim::run(1, async {
        // The file first becomes longer for a new L1 table.
        for op in [(FaultOp::Read, 1), (FaultOp::Truncate, 2)] {
            try_changing(op, 0, async |image| {
                let node = image.node().unwrap();
                node.driver().backing().unwrap().make_empty().await.unwrap();
            })
            .await;
        }
    });
}
