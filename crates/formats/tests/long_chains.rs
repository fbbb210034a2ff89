//! Long backing chains: requests, permissions and errors must not recurse over the images.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::path::Path;

use oxblk_core::{
    Backend, DriverTable, ErrorKind, Graph, OpenFlags, Options, Perm, Permissions, Want, WriteFlags,
};
use oxblk_formats::qcow2::QCOW2;
use oxblk_protocols::file::FILE;
use oxblk_ring::{IoBufMut, block_on};

static DRIVERS: DriverTable = &[QCOW2, &FILE];

const LEVELS: usize = 1000;
const CLUSTER: u64 = 65536;
/// An image needs two file descriptors. The usual limit of a process may be lower than this number.
const WANTED_DESCRIPTORS: u64 = 2 * LEVELS as u64 + 200;

/// Creates `levels` images, each an overlay of the previous image. All overlays are copies of one file, apart from the name
/// of the backing file.
fn make_chain(dir: &Path, levels: usize) {
    let image = |index: usize| dir.join(format!("{index:04}")).to_str().unwrap().to_owned();
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let size = Options::from_dotted("size=1M", None).unwrap();
        graph.create_image(&image(0), "qcow2", &size).await.unwrap();
        let mut overlay = Options::from_dotted("size=1M,backing_fmt=qcow2", None).unwrap();
        overlay.insert("backing_file", "0000");
        graph.create_image(&image(1), "qcow2", &overlay).await.unwrap();
        // Only image 0 allocates cluster 0, and every overlay allocates cluster 1, so that it has an L2 table. A read of
        // cluster 0 must look into the L2 tables of all images.
        for (index, byte) in [(0, 1), (1, 2)] {
            let mut options = Options::from_dotted("driver=qcow2", None).unwrap();
            options.insert("backing", serde_json::Value::Null);
            let flags = OpenFlags::default();
            let disk = graph.open_backend(Some(&image(index)), options, flags).await.unwrap();
            let data = vec![byte; 4096].into();
            disk.write(CLUSTER * index as u64, data, WriteFlags::empty()).await.unwrap();
            disk.close().await.unwrap();
        }
    });
    let overlay = std::fs::read(image(1)).unwrap();
    let name = overlay.windows(4).position(|bytes| bytes == b"0000").unwrap();
    for index in 2..levels {
        let mut copy = overlay.clone();
        copy[name..name + 4].copy_from_slice(format!("{:04}", index - 1).as_bytes());
        std::fs::write(image(index), copy).unwrap();
    }
}

fn allow_descriptors() -> bool {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let enough = |limit: Option<u64>| limit.is_none_or(|limit| limit >= WANTED_DESCRIPTORS);
    if enough(limit.current) {
        return true;
    }
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    enough(limit.maximum)
        && rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).is_ok()
}

/// Runs `work` with a small stack. The stack would overflow if calls nested as deeply as the chain.
fn on_a_thread(work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(1 << 20).spawn(work).unwrap().join().unwrap();
}

#[test]
fn a_chain_of_a_thousand_images_can_be_opened_read_and_closed() {
    if !allow_descriptors() {
        eprintln!("too few descriptors are allowed: skipped");
        return;
    }
    on_a_thread(|| {
        let dir = tempfile::tempdir().unwrap();
        make_chain(dir.path(), LEVELS);
        let top = dir.path().join(format!("{:04}", LEVELS - 1));
        block_on(async move {
            let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
            let options = Options::from_dotted("driver=qcow2", None).unwrap();
            let name = top.to_str().unwrap();
            let node = graph.open_image(name, options, OpenFlags::default()).await.unwrap();
            // This changes the permissions of all nodes in the chain.
            let permissions = Permissions {
                taken: Perm::CONSISTENT_READ | Perm::WRITE,
                shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
            };
            let disk = Backend::new(&graph, "", node, permissions).unwrap();
            let read = disk.read(0, IoBufMut::new(8192)).await.unwrap();
            assert_eq!((&read[..4096], &read[4096..]), (&[1; 4096][..], &[0; 4096][..]));
            assert_eq!(*disk.read(CLUSTER, IoBufMut::new(4096)).await.unwrap(), [2; 4096]);
            assert_eq!(*disk.read(2 * CLUSTER, IoBufMut::new(4096)).await.unwrap(), [0; 4096]);
            // Copy-on-write fills the rest of the cluster from the backing chain.
            disk.write(0, vec![3; 512].into(), WriteFlags::empty()).await.unwrap();
            let read = disk.read(0, IoBufMut::new(1024)).await.unwrap();
            assert_eq!((&read[..512], &read[512..]), (&[3; 512][..], &[1; 512][..]));
            let found = disk.block_status(2 * CLUSTER, CLUSTER, Want::Precise).await.unwrap();
            assert!(found.status.is_zero());
            disk.close().await.unwrap();
            assert!(graph.nodes().is_empty());
        });
    });
}

#[test]
fn a_chain_that_cannot_be_opened_gives_one_short_error_message() {
    on_a_thread(|| {
        let dir = tempfile::tempdir().unwrap();
        make_chain(dir.path(), 200);
        std::fs::remove_file(dir.path().join("0000")).unwrap();
        let top = dir.path().join("0199");
        block_on(async move {
            let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
            let options = || Options::from_dotted("driver=qcow2", None).unwrap();
            let name = top.to_str().unwrap();
            let error = graph.open_image(name, options(), OpenFlags::default()).await.unwrap_err();
            let text = error.to_string();
            assert!(
                text.starts_with("Could not open backing file: ") && text.len() < 400,
                "{text}"
            );
            assert!(text.contains("0000") && !text.contains('\n'), "{text}");
            assert_eq!(error.kind(), ErrorKind::NotFound);
            assert!(graph.nodes().is_empty());
            // With this change, the backing chain forms a loop.
            std::fs::copy(dir.path().join("0199"), dir.path().join("0000")).unwrap();
            let error = graph.open_image(name, options(), OpenFlags::default()).await.unwrap_err();
            let text = error.to_string();
            assert!(text.ends_with("creates an infinite loop."), "{text}");
        });
    });
}
