//! Reopening raw images on files: cache mode, writability, several nodes in one reopen, locks of other processes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use oxblk_core::{
    Backend, DriverTable, Errno, ErrorKind, Graph, OpenFlags, Options, Perm, Permissions,
    ReopenRequest, Result, WriteFlags,
};
use oxblk_formats::raw::RAW;
use oxblk_protocols::file::{FILE, locks::FileLocks};
use oxblk_protocols::null::NULL_CO;
use oxblk_ring::{IoBufMut, block_on, spawn, yield_now};

static DRIVERS: DriverTable = &[&RAW, &FILE, &NULL_CO];

fn options(dotted: &str) -> Options {
    Options::from_dotted(dotted, None).unwrap()
}

fn file() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

async fn open(graph: &Graph, path: &Path, text: &str) -> Backend {
    let flags = OpenFlags::default();
    graph.open_backend(path.to_str(), options(text), flags).await.unwrap()
}

async fn write(backend: &Backend, offset: u64, data: &[u8]) -> Result<()> {
    backend.write(offset, data.to_vec().into(), WriteFlags::empty()).await
}

#[test]
fn a_disk_becomes_read_only_and_writable_again_with_its_file() {
    let file = file();
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let disk = open(&graph, file.path(), "driver=raw").await;
        write(&disk, 0, b"one").await.unwrap();
        disk.reopen(options("read-only=on")).await.unwrap();
        assert!(disk.is_read_only());
        let below = disk.root().unwrap().node().child(oxblk_core::ChildIdx::FILE).unwrap();
        assert!(below.is_read_only());
        assert_eq!(write(&disk, 0, b"two").await.unwrap_err().raw_errno(), Errno::PERM);
        // The read-only disk no longer prevents other processes from writing.
        let other = FileLocks::new(file.as_file(), "other").unwrap().unwrap();
        let alone = Permissions { taken: Perm::WRITE, shared: Perm::CONSISTENT_READ };
        other.set(alone).unwrap();
        let refused = disk.reopen(options("read-only=off")).await.unwrap_err();
        assert_eq!(refused.to_string(), "Failed to get \"write\" lock");
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(disk.is_read_only() && below.is_read_only());
        other.set(Permissions::NONE).unwrap();
        disk.reopen(options("read-only=off")).await.unwrap();
        write(&disk, 0, b"two").await.unwrap();
        disk.flush().await.unwrap();
        disk.close().await.unwrap();
    });
    assert_eq!(std::fs::read(file.path()).unwrap()[..3], *b"two");
}

#[test]
fn a_reopen_of_a_file_alone_changes_the_limits_of_all_nodes_above() {
    let file = file();
    let name = file.path().to_str().unwrap();
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let nodes = options(&format!(
            "driver=raw,node-name=top,file.driver=raw,file.node-name=middle,\
             file.file.driver=file,file.file.node-name=below,file.file.filename={name}"
        ));
        let disk = graph.open_backend(None, nodes, OpenFlags::default()).await.unwrap();
        let alignments = || {
            ["top", "middle", "below"].map(|name| graph.node(name).unwrap().limits().mem_alignment)
        };
        assert_eq!(alignments(), [1; 3]);
        for direct in [true, false] {
            let below = graph.node("below").unwrap();
            let options = options(if direct { "cache.direct=on" } else { "cache.direct=off" });
            graph.reopen(vec![ReopenRequest { node: below, options, keep: true }]).await.unwrap();
            let [top, middle, below] = alignments();
            assert_eq!(below > 1, direct);
            assert_eq!((top, middle), (below, below));
        }
        disk.close().await.unwrap();
    });
}

#[test]
fn requests_complete_while_the_cache_mode_changes() {
    let file = file();
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let disk = open(&graph, file.path(), "driver=raw").await;
        let stop = Rc::new(Cell::new(false));
        let writers: Vec<_> = (0..4_u64)
            .map(|task| {
                let (disk, stop) = (disk.clone(), Rc::clone(&stop));
                spawn(async move {
                    let mut round = 0_u8;
                    while !stop.get() {
                        round = round.wrapping_add(1);
                        // The range is not aligned for direct I/O, and shares blocks with the ranges of other tasks.
                        let offset = task * 1000 + 77;
                        write(&disk, offset, &[round; 1000]).await.unwrap();
                        let back = disk.read(offset, IoBufMut::new(1000)).await.unwrap();
                        assert!(back.iter().all(|byte| *byte == round));
                    }
                })
            })
            .collect();
        for round in 0..20 {
            for _ in 0..5 {
                yield_now().await;
            }
            let direct = if round % 2 == 0 { "on" } else { "off" };
            disk.reopen(options(&format!("cache.direct={direct},cache.no-flush=on")))
                .await
                .unwrap();
            let below = disk.root().unwrap().node().child(oxblk_core::ChildIdx::FILE).unwrap();
            assert_eq!(below.flags().direct, round % 2 == 0);
            assert_eq!(below.limits().request_alignment > 1, round % 2 == 0);
        }
        stop.set(true);
        for writer in writers {
            writer.await;
        }
        disk.close().await.unwrap();
    });
}

#[test]
fn several_nodes_are_reopened_together_or_not_at_all() {
    let (first, second) = (file(), file());
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let a = open(&graph, first.path(), "driver=raw,node-name=a").await;
        let b = open(&graph, second.path(), "driver=raw,node-name=b").await;
        let request = |backend: &Backend, text: &str| ReopenRequest {
            node: backend.node().unwrap(),
            options: options(text),
            keep: true,
        };
        let requests = vec![request(&a, "cache.direct=on"), request(&b, "offset=9999999")];
        let refused = graph.reopen(requests).await.unwrap_err();
        assert!(refused.to_string().starts_with("Offset (9999999) cannot be greater"), "{refused}");
        assert!(!a.node().unwrap().flags().direct);
        // Permissions are checked last. If this check fails, all changes are rolled back too.
        let requests = vec![request(&a, "cache.direct=on"), request(&b, "read-only=on")];
        let refused = graph.reopen(requests).await.unwrap_err();
        assert_eq!(refused.to_string(), "Read-only block node 'b' cannot support read-write users");
        assert!(!a.node().unwrap().flags().direct && !b.is_read_only());
        write(&a, 0, b"x").await.unwrap();
        write(&b, 0, b"x").await.unwrap();
        let requests = vec![
            request(&a, "detect-zeroes=on"),
            request(&b, "offset=4096,size=8192,discard=unmap"),
        ];
        graph.reopen(requests).await.unwrap();
        assert_eq!(b.size(), 8192);
        assert!(b.node().unwrap().flags().unmap && !a.node().unwrap().flags().unmap);
        // Without `keep`, options that are not given return to their defaults.
        let node = b.node().unwrap();
        let request =
            ReopenRequest { node, options: options("driver=raw,node-name=b"), keep: false };
        graph.reopen(vec![request]).await.unwrap();
        assert_eq!(b.size(), 1 << 20);
        assert!(!b.node().unwrap().flags().unmap);
        a.close().await.unwrap();
        b.close().await.unwrap();
    });
}

#[test]
fn a_reopen_names_the_option_that_it_cannot_change() {
    let file = file();
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let disk = open(&graph, file.path(), "driver=raw,node-name=disk").await;
        let cases = [
            ("driver=qcow2", "Cannot change the option 'driver'"),
            ("node-name=other", "Cannot change the option 'node-name'"),
            ("file.filename=/dev/zero", "Cannot change the option 'filename'"),
            ("file.locking=off", "Cannot change the option 'locking'"),
            ("file.colour=red", "Cannot change the option 'colour'"),
            ("colour=red", "Cannot change the option 'colour'"),
            ("file=other", "Cannot find device='' nor node-name='other'"),
            ("file=disk", "Making 'disk' a file child of 'disk' would create a cycle"),
            ("read-only=maybe", "Parameter 'read-only' expects 'on' or 'off'"),
        ];
        for (text, message) in cases {
            let refused = disk.reopen(options(text)).await.unwrap_err();
            assert_eq!(refused.to_string(), message, "{text}");
        }
        let node = disk.node().unwrap();
        let twice = (0..2).map(|_| ReopenRequest {
            node: Arc::clone(&node),
            options: Options::new(),
            keep: true,
        });
        let refused = graph.reopen(twice.collect()).await.unwrap_err();
        assert_eq!(refused.to_string(), "Node 'disk' is to be reopened twice");
        write(&disk, 0, b"still there").await.unwrap();
        disk.close().await.unwrap();
    });
}

#[test]
fn a_file_that_was_replaced_by_another_is_not_reopened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, [1; 4096]).unwrap();
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let disk = open(&graph, &path, "driver=raw").await;
        std::fs::remove_file(&path).unwrap();
        let gone = disk.reopen(options("cache.direct=on")).await.unwrap_err();
        let name = path.display();
        assert_eq!(gone.to_string(), format!("Could not open '{name}': No such file or directory"));
        std::fs::write(&path, [2; 4096]).unwrap();
        let other = disk.reopen(options("cache.direct=on")).await.unwrap_err();
        assert_eq!(
            other.to_string(),
            format!("Could not open '{name}': another file has its name now")
        );
        let back = disk.read(0, IoBufMut::new(1)).await.unwrap();
        assert_eq!(back[0], 1);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_reopen_replaces_the_file_of_an_image() {
    let file = file();
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let text = "driver=raw,node-name=disk,file.node-name=file";
        let disk = open(&graph, file.path(), text).await;
        write(&disk, 0, b"before").await.unwrap();
        let node = options("driver=raw,node-name=part,offset=512,file=file");
        let part = graph.open(node, OpenFlags::default()).await.unwrap();
        disk.reopen(options("file=part")).await.unwrap();
        let size = std::fs::metadata(file.path()).unwrap().len();
        assert_eq!(disk.size(), size - 512);
        write(&disk, 0, b"after").await.unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        assert!(bytes.starts_with(b"before") && bytes[512..].starts_with(b"after"));
        disk.reopen(options("file=file")).await.unwrap();
        assert_eq!(disk.size(), size);
        drop(part);
        assert!(graph.node("part").is_none());
        disk.close().await.unwrap();
        assert!(graph.nodes().is_empty());
    });
}
