//! Tests of preallocate nodes that are inserted and removed while the file is in use.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;

use oxblk_core::{
    Backend, ChildIdx, DriverTable, Gate, Graph, Node, OpenFlags, Options, Perm, Permissions,
    Preallocation, WriteFlags, ZeroFlags,
};
use oxblk_filters::copy_on_read::COPY_ON_READ;
use oxblk_filters::preallocate::PREALLOCATE;
use oxblk_protocols::file::FILE;
use oxblk_ring::{IoBuf, IoBufMut, block_on};

static DRIVERS: DriverTable = &[&FILE, &PREALLOCATE, &COPY_ON_READ];

const KIB: usize = 1024;

async fn open(graph: &Graph, text: &str) -> Arc<Node> {
    let options = Options::from_dotted(text, None).unwrap();
    graph.open(options, OpenFlags::default()).await.unwrap()
}

/// A file of `len` bytes that are all 7, as a node with the name of the file.
async fn file(graph: &Graph, directory: &Path, name: &str, len: usize) -> Arc<Node> {
    let path = directory.join(name);
    std::fs::write(&path, vec![7_u8; len]).unwrap();
    open(graph, &format!("driver=file,node-name={name},filename={}", path.display())).await
}

/// A preallocate node with the name `filter` above the node `below`.
async fn filter(graph: &Graph, below: &str) -> Arc<Node> {
    let options = "driver=preallocate,node-name=filter,prealloc-size=64k,prealloc-align=64k";
    open(graph, &format!("{options},file={below}")).await
}

/// A backend that may write and resize.
fn disk(graph: &Graph, node: &Arc<Node>) -> Backend {
    let permissions = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
    Backend::new(graph, "disk", Arc::clone(node), permissions).unwrap()
}

fn len_of(directory: &Path, name: &str) -> usize {
    usize::try_from(std::fs::metadata(directory.join(name)).unwrap().len()).unwrap()
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

#[test]
fn a_file_that_became_longer_before_the_insertion_keeps_its_data() {
    let directory = tempfile::tempdir().unwrap();
    block_on(async {
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let file = file(&graph, directory.path(), "file", 0).await;
        let disk = disk(&graph, &file);
        let filter = filter(&graph, "file").await;
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
    assert_eq!(len_of(directory.path(), "file"), 256 * KIB);
}

#[test]
fn a_node_that_is_used_again_sees_the_length_that_others_have_given_to_the_file() {
    let directory = tempfile::tempdir().unwrap();
    block_on(async {
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let file = file(&graph, directory.path(), "file", 0).await;
        let disk = disk(&graph, &file);
        let filter = filter(&graph, "file").await;
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
    assert_eq!(len_of(directory.path(), "file"), 512 * KIB);
}

#[test]
fn a_node_whose_file_is_replaced_cuts_off_the_space_in_the_old_file_and_leaves_the_new_file_as_it_is()
 {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    block_on(async {
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let _old = file(&graph, path, "old", 64 * KIB).await;
        let new = file(&graph, path, "new", 1024 * KIB).await;
        let filter = filter(&graph, "old").await;
        let disk = disk(&graph, &filter);
        // Only a write through the edge may make the node longer.
        let data = IoBuf::from(vec![1; 4 * KIB]);
        disk.root().unwrap().write(64 << 10, data, WriteFlags::empty()).await.unwrap();
        assert_eq!(len_of(path, "old"), 192 * KIB);
        let mut change = graph.change();
        change.replace_child(&filter, ChildIdx::FILE, Some(&new));
        change.run().await.unwrap();
        assert_eq!((len_of(path, "old"), disk.size()), (68 * KIB, 1024 << 10));
        // This part of the old file was preallocated.
        disk.write_zeroes(68 << 10, 4 << 10, ZeroFlags::empty()).await.unwrap();
        assert_bytes(&disk, 64 * KIB, 4 * KIB, 7).await;
        assert_bytes(&disk, 68 * KIB, 4 * KIB, 0).await;
        assert_bytes(&disk, 72 * KIB, 952 * KIB, 7).await;
        disk.close().await.unwrap();
    });
    assert_eq!((len_of(path, "old"), len_of(path, "new")), (68 * KIB, 1024 * KIB));
}

#[test]
fn one_change_replaces_the_file_below_another_filter_and_gives_the_node_a_writer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    block_on(async {
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let _old = file(&graph, path, "old", 64 * KIB).await;
        let new = file(&graph, path, "new", 1024 * KIB).await;
        let middle = open(&graph, "driver=copy-on-read,node-name=middle,file=old").await;
        let filter = filter(&graph, "middle").await;
        let disk = disk(&graph, &new);
        let mut change = graph.change();
        change.replace_child(&middle, ChildIdx::FILE, Some(&new));
        change.set_root(&disk, &filter);
        change.run().await.unwrap();
        assert_eq!(disk.size(), 1024 << 10);
        write(&disk, 512 * KIB, 4 * KIB, 1).await;
        assert_bytes(&disk, 0, 512 * KIB, 7).await;
        assert_bytes(&disk, 516 * KIB, 508 * KIB, 7).await;
        disk.close().await.unwrap();
    });
    assert_eq!(len_of(path, "new"), 1024 * KIB);
}
