//! Images whose footers are wrong: messages, and power cuts while blocks are allocated in an image whose copy of the footer at
//! the beginning is damaged.

use oxblk::core::{OpenFlags, WriteFlags};
use oxblk::ring::IoBufMut;
use oxblk::ring::sim::{self, Disk};
use oxblk_tests::program::Program;
use oxblk_tests::sim_image::open_as;

const BLOCK: usize = 2 << 20;
const SEED: u64 = 1;

/// An image of 16 MiB. The first block of the disk contains bytes of the value 1. The first sector of the file, which should
/// contain the copy of the footer, contains zeroes.
fn image_without_copy() -> Disk {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let path = scratch.path().join("image");
    let create = ["create", "-q", "-f", "vpc", "-o", "force_size=on"];
    Program::new("qemu-img").args(create).arg(&path).arg("16M").succeed();
    Program::new("qemu-io").args(["-f", "vpc", "-c", "write -P 1 0 2M"]).arg(&path).succeed();
    let mut bytes = std::fs::read(&path).expect("the image");
    bytes[..512].fill(0);
    Disk::from_bytes(SEED, &bytes)
}

async fn read_after_cut(left: &Disk, what: &str) {
    let image = open_as("vpc", left, OpenFlags::default()).await;
    let image = image.unwrap_or_else(|error| panic!("{what}: {error}"));
    let bytes = image.read(0, IoBufMut::new(BLOCK)).await.expect("a read");
    assert!(bytes.iter().all(|byte| *byte == 1), "{what}: a block is lost");
    image.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
}

#[test]
fn a_power_cut_during_an_allocation_leaves_a_footer() {
    let disk = image_without_copy();
    disk.keep_moments(SEED, 64);
    sim::run(SEED, async {
        let image = open_as("vpc", &disk, OpenFlags::default()).await.expect("the image");
        for offset in [4 << 20, 8 << 20] {
            let data = vec![2; 64 << 10];
            image.write(offset, data.into(), WriteFlags::empty()).await.expect("a write");
        }
        image.close().await.expect("it closes");
    });
    let moments = disk.moments();
    assert!(moments.len() > 6, "too few writes");
    for (boundary, moment) in moments {
        let any = (0..8).map(|seed| moment.after_power_loss(seed));
        let ends = [moment.after_power_loss_none(), moment.after_power_loss_all()];
        for (number, left) in any.chain(ends).enumerate() {
            let what = format!("cut at {boundary}, disk {number}");
            sim::run(SEED, read_after_cut(&left, &what));
        }
    }
}

#[test]
fn the_fault_of_two_wrong_footers_is_the_one_that_qemu_reports() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let path = scratch.path().join("image");
    for subformat in ["subformat=dynamic", "subformat=fixed"] {
        let create = ["create", "-q", "-f", "vpc", "-o", subformat];
        Program::new("qemu-img").args(create).arg(&path).arg("16M").succeed();
        let good = std::fs::read(&path).expect("the image");
        // The offset of a byte of the cookie and of the checksum.
        for (first, last) in [(0, 0), (0, 64), (64, 0), (64, 64)] {
            let mut bytes = good.clone();
            let end = bytes.len() - 512;
            bytes[first] ^= 1;
            bytes[end + last] ^= 1;
            std::fs::write(&path, &bytes).expect("the image");
            let info = |program: Program| program.args(["info", "-f", "vpc"]).arg(&path).run();
            let ours = info(Program::oxblk().arg("img")).err();
            let theirs = info(Program::new("qemu-img")).err();
            let reason = |text: &str| text.rsplit_once(": ").map(|(_, reason)| reason.to_owned());
            assert_eq!(reason(&ours), reason(&theirs), "{subformat}: {first}, {last}");
        }
    }
}
