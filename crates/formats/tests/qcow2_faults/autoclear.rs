//! Repairs of images with an unknown autoclear bit: the repair does not update the data of the unknown feature, so the bit is
//! cleared first.

use oxblk_core::check::Fix;
use oxblk_core::{Graph, OpenFlags};
use oxblk_ring::sim::{self, Disk};

use crate::{DRIVERS, create, file, open, options, word, write};

/// The offset of the autoclear bits in the header.
const AUTOCLEAR: u64 = 88;
const UNKNOWN: u64 = 1 << 63;

/// The offset of the refcount block.
fn block(bytes: &[u8]) -> usize {
    word(bytes, word(bytes, 48)).try_into().unwrap()
}

/// An image with an unknown autoclear bit, in which the refcount of the header is too low.
async fn broken_image(is_dirty: bool) -> Disk {
    let disk = Disk::new(1, 0);
    create(&disk).await;
    let image = open(&disk).await;
    write(&image, 0, 1).await;
    image.close().await.unwrap();
    let mut bytes = disk.bytes();
    bytes[88] |= 0x80;
    bytes[79] |= u8::from(is_dirty);
    let block = block(&bytes);
    bytes[block..block + 2].fill(0);
    Disk::from_bytes(1, &bytes)
}

/// Asserts that the repair has cleared the bit before its first change of a refcount.
fn assert_cleared_first(disk: &Disk, what: &str) {
    let is_repaired = |bytes: &[u8]| bytes[block(bytes)..][..2] != [0, 0];
    assert!(is_repaired(&disk.bytes()), "{what}: nothing was repaired");
    for (boundary, moment) in disk.moments() {
        let any = (0..8).map(|seed| moment.after_power_loss(seed));
        for left in any.chain([moment.after_power_loss_none(), moment.after_power_loss_all()]) {
            let bytes = left.bytes();
            let is_unknown = word(&bytes, AUTOCLEAR) & UNKNOWN != 0;
            assert!(!is_unknown || !is_repaired(&bytes), "{what}: power cut at {boundary}");
        }
    }
}

#[test]
fn a_repair_clears_unknown_autoclear_bits_first() {
    sim::run(1, async {
        let disk = broken_image(false).await;
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let _file = file(&graph, &disk);
        let flags = OpenFlags { check: true, ..OpenFlags::default() };
        let options = options("driver=qcow2,file=file");
        let image = graph.open_backend(None, options, flags).await.unwrap();
        disk.keep_moments(1, usize::MAX);
        let node = image.node().unwrap();
        node.driver().check().unwrap().check(Fix::All, &|_| ()).await.unwrap();
        assert_cleared_first(&disk, "check");
        drop(node);
        image.close().await.unwrap();
    });
}

#[test]
fn the_repair_of_a_dirty_image_clears_unknown_autoclear_bits_first() {
    sim::run(1, async {
        let disk = broken_image(true).await;
        disk.keep_moments(1, usize::MAX);
        let image = open(&disk).await;
        assert_cleared_first(&disk, "open");
        image.close().await.unwrap();
    });
}
