//! Failing and cancelled operations while an image is written, closed or reopened.

use std::time::Duration;

use oxblk_core::{Backend, Errno, OpenFlags, Options, WriteFlags};
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_tests::program::Program;
use oxblk_tests::sim_image::{check_sound, open_as};

const MIB: u64 = 1 << 20;
/// The bytes of the header field that marks an image as open for writing.
const IN_USE: std::ops::Range<usize> = 44..48;
/// The value of this field while the image is open.
const MARK: [u8; 4] = 0x746f_6e59_u32.to_le_bytes();

/// Returns the bytes of an image of 10 MiB whose first four clusters are allocated.
fn image_bytes() -> Vec<u8> {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let run = |tool: &str, args: &[&str]| {
        Program::new(tool).args(args).directory(scratch.path()).succeed();
    };
    run("qemu-img", &["create", "-q", "-f", "parallels", "image", "10M"]);
    run("qemu-io", &["-f", "parallels", "-c", "write -P 1 0 4M", "image"]);
    std::fs::read(scratch.path().join("image")).expect("the image")
}

async fn open(disk: &Disk, flags: OpenFlags) -> Backend {
    open_as("parallels", disk, flags).await.expect("an image")
}

async fn write(image: &Backend, offset: u64) {
    image.write(offset, vec![7; 512].into(), WriteFlags::empty()).await.expect("a write");
}

#[test]
fn an_image_is_marked_again_after_a_failed_attempt_to_remove_the_mark() {
    let disk = Disk::from_bytes(1, &image_bytes());
    sim::run(1, async {
        let image = open(&disk, OpenFlags::default()).await;
        write(&image, 5 * MIB).await;
        image.flush().await.expect("a flush");
        assert_eq!(disk.bytes()[IN_USE], MARK);
        let node = image.node().expect("a node");
        let reopen = node.driver().reopen().expect("a format that can be reopened");
        let errno = Errno::IO;
        let rule = FailRule { op: FaultOp::Sync, nth: None, range: None, errno, once: true };
        disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        reopen.prepare(flags, &Options::new()).await.expect_err("the flush fails");
        reopen.abort().await;
        assert_eq!(disk.bytes()[IN_USE], [0; 4]);
        write(&image, 7 * MIB).await;
        image.flush().await.expect("a flush");
        assert_eq!(disk.bytes()[IN_USE], MARK);
        drop(node);
        image.close().await.expect("it closes");
        assert_eq!(disk.bytes()[IN_USE], [0; 4]);
    });
}

#[test]
fn an_image_that_was_not_closed_cannot_become_writable_by_a_reopen() {
    let mut bytes = image_bytes();
    bytes[IN_USE].copy_from_slice(&MARK);
    let disk = Disk::from_bytes(1, &bytes);
    sim::run(1, async {
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        let image = open(&disk, flags).await;
        let writable = Options::from_dotted("read-only=off", None).expect("options");
        let refused = image.reopen(writable).await.expect_err("the image needs a repair");
        assert!(refused.to_string().starts_with("Image was not closed correctly"), "{refused}");
        image.close().await.expect("it closes");
    });
}

#[test]
fn clusters_are_freed_although_a_flush_was_cancelled() {
    let slow = Duration::from_micros(10);
    let bytes = image_bytes();
    // The flush makes 7 operations, one after the other.
    for cancelled_after in 0..24 {
        let disk = Disk::from_bytes(cancelled_after, &bytes);
        sim::run(cancelled_after, async {
            let image = open(&disk, OpenFlags::default()).await;
            let size = disk.len();
            image.discard(0, 3 * MIB).await.expect("a discard");
            disk.set_faults(Faults { delay: slow..slow * 2, ..Faults::default() });
            let node = image.node().expect("a node");
            let flush = node.driver().flush().expect("a format with a flush");
            let limit = slow * u32::try_from(cancelled_after).expect("a small number");
            let _ = oxblk_ring::timeout(limit, flush).await;
            oxblk_ring::settled().await;
            disk.set_faults(Faults::default());
            image.flush().await.expect("a flush");
            for index in 5..8 {
                write(&image, index * MIB).await;
            }
            assert_eq!(disk.len(), size, "cancelled after {limit:?}: freed clusters are not used");
            drop(node);
            image.close().await.expect("it closes");
            let checked = open(&disk, OpenFlags { check: true, ..OpenFlags::default() }).await;
            check_sound(&checked, false, "after the cancellation").await;
            checked.close().await.expect("it closes");
        });
    }
}

/// Returns an image of six clusters of 64 KiB. The order of the clusters in the file is 5, 3, 4, 1, 0, 2. The data offset in
/// the header is `shift` sectors too small.
fn old_image(shift: u32) -> Vec<u8> {
    const CLUSTER: usize = 65_536;
    let order = [5_u32, 3, 4, 1, 0, 2];
    let mut bytes = b"WithoutFreeSpace".to_vec();
    bytes.extend(
        [2, 16, 10, 128, 6, 6 * 128, 0, 0, 128 - shift, 0, 0, 0].map(u32::to_le_bytes).concat(),
    );
    bytes.extend(order.map(|place| ((place + 1) * 128).to_le_bytes()).concat());
    bytes.resize(7 * CLUSTER, 0);
    for (guest, place) in (1..).zip(order) {
        let start = (usize::try_from(place).expect("a number") + 1) * CLUSTER;
        bytes[start..start + CLUSTER].fill(guest);
    }
    bytes
}

#[test]
fn a_repair_does_not_write_over_data_that_it_copies_later() {
    for shift in [0, 1, 5] {
        let disk = Disk::from_bytes(1, &old_image(shift));
        sim::run(1, async {
            let image = open(&disk, OpenFlags::default()).await;
            for guest in 0..6 {
                let buf = oxblk_ring::IoBufMut::new(65_536);
                let data = image.read(guest * 65_536, buf).await.expect("a read");
                let wanted = u8::try_from(guest + 1).expect("a small number");
                let right = data.iter().all(|byte| *byte == wanted);
                assert!(right, "cluster {guest}, {shift} sectors");
            }
            check_sound(&image, false, "after the repair").await;
            image.close().await.expect("it closes");
        });
    }
}
