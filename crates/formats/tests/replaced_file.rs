//! Images whose file is replaced by a file that cannot grow, or that has other data behind the end of the image.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use oxblk_core::{
    Backend, ChildIdx, DriverTable, Gate, Graph, Node, OpenFlags, Options, Perm, Permissions,
    WriteFlags,
};
use oxblk_formats::{parallels::PARALLELS, qcow2::QCOW2, qed::QED, raw::RAW, vdi::VDI, vpc::VPC};
use oxblk_protocols::file::FILE;
use oxblk_ring::{IoBufMut, block_on};

static DRIVERS: DriverTable = &[&RAW, QCOW2, VDI, PARALLELS, VPC, QED, &FILE];

const MIB: u64 = 1 << 20;

async fn open(graph: &Graph, dotted: &str) -> Arc<Node> {
    let options = Options::from_dotted(dotted, None).unwrap();
    graph.open(options, OpenFlags::default()).await.unwrap()
}

/// Opens an image of `format`, replaces its file by a longer file with `storage` (options of raw) and other data behind the end of
/// the image, and writes to new blocks.
async fn write_after_replacement(dir: &Path, format: &str, storage: &str) {
    let path = |name: &str| dir.join(format!("{format}-{name}")).to_str().unwrap().to_owned();
    let (first, second) = (path("first"), path("second"));
    let made =
        Command::new("qemu-img").args(["create", "-q", "-f", format, &first, "16M"]).status();
    assert!(made.expect("qemu-img is installed").success());
    let graph = Graph::new(DRIVERS, Gate::Anything);
    let dotted = format!("driver={format},file.driver=file,file.filename={first}");
    let image = open(&graph, &dotted).await;
    let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    let taken = Permissions::sharing_all(taken);
    let disk = Backend::new(&graph, "", Arc::clone(&image), taken).unwrap();
    disk.write(0, vec![1; 512].into(), WriteFlags::empty()).await.unwrap();
    disk.flush().await.unwrap();
    fs::copy(&first, &second).unwrap();
    let mut file = fs::OpenOptions::new().append(true).open(&second).unwrap();
    // The last cluster of the image may end behind the end of the file.
    file.set_len(file.metadata().unwrap().len().next_multiple_of(64 << 10)).unwrap();
    file.write_all(&vec![0xaa; 16 << 20]).unwrap();
    let len = file.metadata().unwrap().len();
    let size = storage.replace("SIZE", &len.to_string());
    let new = format!("driver=raw,file.driver=file,file.filename={second}{size}");
    let new = open(&graph, &new).await;
    let mut change = graph.change();
    change.replace_child(&image, ChildIdx::FILE, Some(&new));
    change.run().await.unwrap();
    for at in [3 * MIB + 4096, 7 * MIB, 12 * MIB - 512] {
        disk.write(at, vec![2; 512].into(), WriteFlags::empty()).await.unwrap();
    }
    let content = disk.read(0, IoBufMut::new(16 << 20)).await.unwrap();
    let mut expected = vec![0; 16 << 20];
    expected[..512].fill(1);
    for at in [3 * MIB + 4096, 7 * MIB, 12 * MIB - 512] {
        let at = usize::try_from(at).unwrap();
        expected[at..at + 512].fill(2);
    }
    let wrong = content.iter().zip(&expected).position(|(is, wanted)| is != wanted);
    assert_eq!(wrong, None, "{format} over a file with the options '{size}'");
    disk.close().await.unwrap();
}

#[test]
fn new_blocks_of_an_image_show_no_old_data_of_a_file_that_replaced_its_file() {
    let dir = tempfile::tempdir().unwrap();
    for format in ["vdi", "parallels", "vpc", "qed", "qcow2"] {
        for storage in ["", ",size=SIZE"] {
            block_on(write_after_replacement(dir.path(), format, storage));
        }
    }
}
