//! Tests of qcow2 on a simulated disk with I/O errors and power cuts, and of qcow2 images with inconsistent metadata.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod autoclear;
mod copying_reads;
mod counted;
mod dirty_bit;
mod write_order;

use std::sync::Arc;
use std::time::Duration;

use oxblk_core::check::{CheckReport, Fix};
use oxblk_core::create::{CreateRequest, CreateTarget};
use oxblk_core::{
    Attachment, Backend, DriverTable, Errno, Graph, Node, OpenFlags, Options, Perm, Permissions,
    WriteFlags,
};
use oxblk_formats::qcow2::QCOW2;
use oxblk_protocols::file::{FILE, FileDriver};
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_ring::{File, IoBufMut, timeout};

static DRIVERS: DriverTable = &[QCOW2, &FILE];

const CLUSTER: usize = 4096;
/// One L2 table covers 512 clusters, so the disk needs four L2 tables.
const SIZE: u64 = 8 << 20;

fn options(dotted: &str) -> Options {
    Options::from_dotted(dotted, None).unwrap()
}

fn all() -> Permissions {
    Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE)
}

fn file(graph: &Graph, disk: &Disk) -> Arc<Node> {
    let driver = FileDriver::from_ring_file(File::sim(disk), disk.len());
    let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
    graph.add_node(Some("file"), &FILE, Box::new(driver), flags).unwrap()
}

/// Creates an empty image.
async fn create(disk: &Disk) {
    create_with(disk, "preallocation=off").await;
}

/// Creates an empty image with further options.
async fn create_with(disk: &Disk, more: &str) {
    let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
    let edge = Attachment::new(&file(&graph, disk), "creation", "file", all()).unwrap();
    let options = options(&format!("size={SIZE},cluster_size={CLUSTER},{more}"));
    let request = CreateRequest { target: CreateTarget::File(Arc::clone(edge.edge())), options };
    QCOW2.create(&graph, request).unwrap().await.unwrap();
    edge.flush().await.unwrap();
    drop(edge);
}

async fn open(disk: &Disk) -> Backend {
    open_with(disk, "cache-clean-interval=0").await
}

/// Opens the image with further options.
async fn open_with(disk: &Disk, more: &str) -> Backend {
    let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
    let _file = file(&graph, disk);
    let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
    let options = options(&format!("driver=qcow2,file=file,{more}"));
    graph.open_backend(None, options, flags).await.unwrap()
}

async fn write(image: &Backend, cluster: u64, byte: u8) {
    let data = IoBufMut::filled(CLUSTER, byte).freeze();
    image.write(cluster * CLUSTER as u64, data, WriteFlags::empty()).await.unwrap();
}

async fn byte(image: &Backend, cluster: u64) -> u8 {
    let read = image.read(cluster * CLUSTER as u64, IoBufMut::new(CLUSTER)).await.unwrap();
    assert!(read.iter().all(|byte| *byte == read[0]), "cluster {cluster} has different bytes");
    read[0]
}

async fn check(image: &Backend) -> CheckReport {
    let node = image.node().unwrap();
    node.driver().check().unwrap().check(Fix::Nothing, &|_| {}).await.unwrap()
}

/// Asserts that the image has no corruption, and no leaks unless `leaks` is set.
async fn assert_sound(disk: &Disk, leaks: bool, context: &str) {
    let image = open(disk).await;
    let report = check(&image).await;
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{context}");
    assert!(leaks || report.leaks == 0, "{context}: {} leaks", report.leaks);
    image.close().await.unwrap();
}

/// A rule that makes the n-th of these operations fail once with `EIO`.
fn fails(op: FaultOp, nth: u64, range: Option<std::ops::Range<u64>>) -> FailRule {
    FailRule { op, nth: Some(nth), range, errno: Errno::IO, once: true }
}

/// Clusters that two L2 tables map. One of these tables is new.
const WRITTEN: [u64; 4] = [1, 2, 700, 701];

/// An image with flushed data and with later changes that are not flushed: new clusters, a new L2 table, and a dropped
/// cluster.
async fn changed(disk: &Disk) -> Backend {
    create(disk).await;
    let image = open(disk).await;
    for cluster in [0, 1, 1600] {
        write(&image, cluster, 1).await;
    }
    image.flush().await.unwrap();
    for cluster in WRITTEN {
        write(&image, cluster, 2).await;
    }
    image.discard(1600 * CLUSTER as u64, CLUSTER as u64).await.unwrap();
    image
}

/// Asserts that flushed data is readable after a power cut, and that no cluster is leaked after the image is closed.
async fn nothing_was_lost(disk: &Disk, image: Backend, context: &str) {
    image.flush().await.unwrap();
    let left = disk.after_power_loss_none();
    let found = open(&left).await;
    assert_eq!(byte(&found, 0).await, 1, "{context}");
    for cluster in WRITTEN {
        assert_eq!(byte(&found, cluster).await, 2, "{context}: cluster {cluster}");
    }
    assert_eq!(byte(&found, 1600).await, 0, "{context}");
    assert_eq!(check(&found).await.corruptions, 0, "{context}");
    found.close().await.unwrap();
    image.close().await.unwrap();
    let closed = open(disk).await;
    let report = check(&closed).await;
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{context}");
    closed.close().await.unwrap();
}

#[test]
fn a_write_back_that_fails_is_completed_by_the_next_one() {
    let mut failures = 0;
    for nth in 1..100 {
        let disk = Disk::new(nth, 0);
        let failed = sim::run(nth, async {
            let image = changed(&disk).await;
            let rule = fails(FaultOp::Write, nth, None);
            disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
            let failed = image.flush().await.is_err();
            disk.set_faults(Faults::default());
            nothing_was_lost(&disk, image, &format!("write {nth} failed")).await;
            failed
        });
        if !failed {
            break;
        }
        failures += 1;
    }
    assert!(failures >= 4, "only {failures} writes could fail");
}

#[test]
fn a_write_back_that_is_cancelled_is_completed_by_the_next_one() {
    let mut moments = 0;
    for moment in 0..2000 {
        let disk = Disk::new(moment, 0);
        let finished = sim::run(moment, async {
            let image = changed(&disk).await;
            let node = image.node().unwrap();
            let flush = node.driver().flush().unwrap();
            // Call the driver directly, because `oxblk_core` would run the flush to completion.
            let outcome = timeout(Duration::from_micros(moment * 50), flush).await;
            nothing_was_lost(&disk, image, &format!("cancelled at moment {moment}")).await;
            outcome.is_ok()
        });
        if finished {
            break;
        }
        moments += 1;
    }
    assert!(moments >= 4, "a write-back has more than {moments} moments");
}

#[test]
fn an_image_whose_write_back_fails_does_not_become_read_only() {
    for nth in 1..100 {
        let disk = Disk::new(nth, 0);
        let refused = sim::run(nth, async {
            let image = changed(&disk).await;
            let rule = fails(FaultOp::Write, nth, None);
            disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
            let refused = image.reopen(options("read-only=on")).await.is_err();
            disk.set_faults(Faults::default());
            assert_eq!(image.is_read_only(), !refused);
            if refused {
                write(&image, 0, 1).await;
                image.reopen(options("read-only=on")).await.unwrap();
            }
            // The read-only image has no unwritten metadata, so the state after a power cut is complete.
            let left = open(&disk.after_power_loss_none()).await;
            let report = check(&left).await;
            assert_eq!((report.corruptions, report.leaks), (0, 0), "write {nth} failed");
            left.close().await.unwrap();
            image.reopen(options("read-only=off")).await.unwrap();
            nothing_was_lost(&disk, image, &format!("write {nth} failed")).await;
            refused
        });
        if !refused {
            assert!(nth > 4, "only {nth} writes could fail");
            break;
        }
    }
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn metadata_is_not_freed_if_a_damaged_l2_entry_refers_to_it() {
    // The entry of guest cluster 1 refers to the refcount block: as an allocated zero cluster, or as compressed data.
    for (bits, message) in [
        (1 << 63 | 1_u64, "Preventing invalid write on metadata"),
        (1 << 62, "Preventing invalid freeing of metadata"),
    ] {
        let disk = Disk::new(1, 0);
        sim::run(1, async {
            create(&disk).await;
            let image = open(&disk).await;
            write(&image, 0, 1).await;
            image.close().await.unwrap();
        });
        let mut bytes = disk.bytes();
        let place = 0x00ff_ffff_ffff_fe00;
        let table = word(&bytes, 48);
        let (block, tables) = (word(&bytes, table), word(&bytes, word(&bytes, 40)) & place);
        let at = usize::try_from(tables).unwrap() + 8;
        bytes[at..at + 8].copy_from_slice(&(bits | block).to_be_bytes());
        let damaged = Disk::from_bytes(2, &bytes);
        sim::run(2, async {
            let image = open(&damaged).await;
            let discarded = image.discard(CLUSTER as u64, CLUSTER as u64).await;
            let refused = match discarded {
                Ok(()) => image.flush().await,
                refused => refused,
            };
            let refused = refused.unwrap_err().to_string();
            assert!(refused.contains(message), "{refused}");
            assert!(image.write(0, vec![1; 512].into(), WriteFlags::empty()).await.is_err());
            drop(image.close().await);
        });
        let bytes = damaged.bytes();
        let index = usize::try_from(block).unwrap() / CLUSTER * 2;
        let block = usize::try_from(block).unwrap();
        let count = &bytes[block + index..block + index + 2];
        assert_eq!(count, [0, 1], "{message}: the refcount of the block has changed");
        assert_eq!(word(&bytes, 72), 2, "{message}: the image is not marked corrupt");
    }
}

#[test]
fn compressed_data_is_not_appended_to_a_cluster_that_was_freed_and_allocated_again() {
    let disk = Disk::new(1, 0);
    sim::run(1, async {
        create(&disk).await;
        let image = open(&disk).await;
        let compressed = |cluster: u64, byte| {
            let data = IoBufMut::filled(CLUSTER, byte).freeze();
            image.write(cluster * CLUSTER as u64, data, WriteFlags::COMPRESSED)
        };
        compressed(0, 1).await.unwrap();
        image.discard(0, CLUSTER as u64).await.unwrap();
        // The first flush frees the cluster, and the second one ends its quarantine.
        image.flush().await.unwrap();
        write(&image, 10, 2).await;
        image.flush().await.unwrap();
        for cluster in 11..16 {
            write(&image, cluster, 2).await;
        }
        compressed(1, 3).await.unwrap();
        for cluster in 10..16 {
            assert_eq!(byte(&image, cluster).await, 2, "cluster {cluster}");
        }
        assert_eq!(byte(&image, 1).await, 3);
        image.close().await.unwrap();
        let again = open(&disk).await;
        let report = check(&again).await;
        assert_eq!((report.corruptions, report.leaks), (0, 0));
        again.close().await.unwrap();
    });
}

/// Faults that make reads of this byte range fail.
fn bad_sectors(range: std::ops::Range<u64>) -> Faults {
    let rule = FailRule {
        op: FaultOp::Read,
        nth: None,
        range: Some(range),
        errno: Errno::IO,
        once: false,
    };
    Faults { fail: vec![rule], ..Faults::default() }
}

#[test]
fn bad_sectors_affect_only_reads_of_these_sectors() {
    let disk = Disk::new(1, 0);
    sim::run(1, async {
        create(&disk).await;
        let image = open(&disk).await;
        for cluster in 0..3 {
            write(&image, cluster, 7).await;
        }
        image.close().await.unwrap();
        let data = disk.bytes().chunks(CLUSTER).position(|cluster| cluster[0] == 7).unwrap() as u64;
        let data = data * CLUSTER as u64;
        // The bad sector is behind the header and its extensions, or in the first data cluster.
        for bad in [1024..1536, data..data + 512] {
            disk.set_faults(bad_sectors(bad));
            let image = open(&disk).await;
            assert_eq!(byte(&image, 1).await, 7);
            assert_eq!(byte(&image, 2).await, 7);
            assert_eq!(check(&image).await.check_errors, 0);
            image.close().await.unwrap();
        }
        disk.set_faults(bad_sectors(data..data + 512));
        let image = open(&disk).await;
        let error = image.read(0, IoBufMut::new(CLUSTER)).await.unwrap_err();
        assert_eq!(error.raw_errno(), Errno::IO);
        disk.set_faults(Faults::default());
        image.close().await.unwrap();
    });
}

#[test]
fn copy_on_read_fails_only_if_the_requested_data_cannot_be_read() {
    let (disk, base) = (Disk::new(1, 0), Disk::from_bytes(2, &[5; 4 * CLUSTER]));
    sim::run(1, async {
        create(&disk).await;
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let _file = file(&graph, &disk);
        let below = FileDriver::from_ring_file(File::sim(&base), base.len());
        let flags = OpenFlags::default();
        let _base = graph.add_node(Some("base"), &FILE, Box::new(below), flags).unwrap();
        let flags = OpenFlags { copy_on_read: true, ..OpenFlags::default() };
        let options = options("driver=qcow2,file=file,backing=base");
        let image = graph.open_backend(None, options, flags).await.unwrap();
        base.set_faults(bad_sectors(512..1024));
        let sector = |at: u64| image.read(at, IoBufMut::new(512));
        assert!(sector(2048).await.unwrap().iter().all(|byte| *byte == 5));
        assert_eq!(sector(512).await.unwrap_err().raw_errno(), Errno::IO);
        base.set_faults(Faults::default());
        assert_eq!(byte(&image, 0).await, 5);
        image.close().await.unwrap();
    });
}

#[test]
fn preallocated_clusters_over_old_data_read_as_zeroes() {
    for version in ["0.10", "1.1"] {
        let disk = Disk::from_bytes(1, &vec![0xaa; 2 * usize::try_from(SIZE).unwrap()]);
        sim::run(1, async {
            create_with(&disk, &format!("compat={version},preallocation=metadata")).await;
            let image = open(&disk).await;
            for cluster in [0, 1, 700, SIZE / CLUSTER as u64 - 1] {
                assert_eq!(byte(&image, cluster).await, 0, "version {version}");
            }
            let half = IoBufMut::filled(CLUSTER / 2, 1).freeze();
            image.write(0, half, WriteFlags::empty()).await.unwrap();
            let read = image.read(0, IoBufMut::new(CLUSTER)).await.unwrap();
            let (written, rest) = read.split_at(CLUSTER / 2);
            assert!(written.iter().all(|byte| *byte == 1) && rest.iter().all(|byte| *byte == 0));
            image.close().await.unwrap();
            let image = open(&disk).await;
            let report = check(&image).await;
            assert_eq!((report.corruptions, report.leaks), (0, 0));
            image.close().await.unwrap();
        });
    }
}
