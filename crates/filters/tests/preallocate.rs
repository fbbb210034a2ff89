//! Tests of preallocate nodes that are inserted and removed while the file is in use.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;

use oxblk_core::{
    Backend, DriverTable, Gate, Graph, Node, OpenFlags, Options, Perm, Permissions, Preallocation,
    WriteFlags, ZeroFlags,
};
use oxblk_filters::preallocate::PREALLOCATE;
use oxblk_protocols::file::FILE;
use oxblk_ring::{IoBuf, IoBufMut, block_on};

static DRIVERS: DriverTable = &[&FILE, &PREALLOCATE];

const KIB: usize = 1024;

async fn open(graph: &Graph, text: &str) -> Arc<Node> {
    let options = Options::from_dotted(text, None).unwrap();
    graph.open(options, OpenFlags::default()).await.unwrap()
}

/// An empty file in `directory`, as the medium of a backend that makes it longer.
async fn disk(graph: &Graph, directory: &Path) -> (Arc<Node>, Backend) {
    let path = directory.join("disk.raw");
    std::fs::write(&path, []).unwrap();
    let file =
        open(graph, &format!("driver=file,node-name=file,filename={}", path.display())).await;
    let permissions = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
    let disk = Backend::new(graph, "disk", Arc::clone(&file), permissions).unwrap();
    (file, disk)
}

async fn resize(disk: &Backend, len: usize) {
    disk.resize(len as u64, Preallocation::Off).await.unwrap();
}

async fn write(disk: &Backend, offset: usize, len: usize, byte: u8) {
    let data = IoBuf::from(vec![byte; len]);
    disk.write(offset as u64, data, WriteFlags::empty()).await.unwrap();
}

async fn assert_bytes(disk: &Backend, offset: usize, len: usize, byte: u8) {
    let read = disk.read(offset as u64, IoBufMut::new(len)).await.unwrap();
    assert!(read.iter().all(|found| *found == byte), "{len} bytes at {offset} are not {byte}");
}

const OPTIONS: &str =
    "driver=preallocate,file=file,prealloc-size=64k,prealloc-align=64k,node-name=";

#[test]
fn a_file_that_became_longer_before_the_insertion_keeps_its_data() {
    let directory = tempfile::tempdir().unwrap();
    block_on(async {
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let (file, disk) = disk(&graph, directory.path()).await;
        let filter = open(&graph, &format!("{OPTIONS}filter")).await;
        resize(&disk, 256 * KIB).await;
        write(&disk, 0, 256 * KIB, 1).await;
        let mut change = graph.change();
        change.replace_node(&file, &filter, |_| true);
        change.run().await.unwrap();
        assert_eq!(disk.size(), 256 * 1024);
        write(&disk, 8 * KIB, 4 * KIB, 2).await;
        disk.write_zeroes(16 << 10, 4 << 10, ZeroFlags::empty()).await.unwrap();
        assert_bytes(&disk, 0, 8 * KIB, 1).await;
        assert_bytes(&disk, 8 * KIB, 4 * KIB, 2).await;
        assert_bytes(&disk, 16 * KIB, 4 * KIB, 0).await;
        assert_bytes(&disk, 20 * KIB, 236 * KIB, 1).await;
        disk.close().await.unwrap();
    });
    assert_eq!(std::fs::metadata(directory.path().join("disk.raw")).unwrap().len(), 256 * 1024);
}

#[test]
fn a_node_that_is_used_again_sees_the_length_that_others_have_given_to_the_file() {
    let directory = tempfile::tempdir().unwrap();
    block_on(async {
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let (file, disk) = disk(&graph, directory.path()).await;
        let filter = open(&graph, &format!("{OPTIONS}filter")).await;
        graph.keep_open(Arc::clone(&filter)).unwrap();
        for (round, byte) in (1_u8..5).enumerate() {
            let at = round * 128 * KIB;
            let mut change = graph.change();
            change.set_root(&disk, &filter);
            change.run().await.unwrap();
            assert_eq!(disk.size(), at as u64);
            resize(&disk, at + 4 * KIB).await;
            write(&disk, at, 4 * KIB, byte).await;
            let mut change = graph.change();
            change.set_root(&disk, &file);
            change.run().await.unwrap();
            resize(&disk, at + 128 * KIB).await;
            write(&disk, at + 4 * KIB, 124 * KIB, byte).await;
        }
        for (round, byte) in (1_u8..5).enumerate() {
            assert_bytes(&disk, round * 128 * KIB, 128 * KIB, byte).await;
        }
        disk.close().await.unwrap();
        graph.allow_close(filter).await.unwrap();
    });
    assert_eq!(std::fs::metadata(directory.path().join("disk.raw")).unwrap().len(), 512 * 1024);
}
