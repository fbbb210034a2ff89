//! Failing operations of the host while an image is repaired, closed or reopened.

use oxblk_core::check::Fix;
use oxblk_core::{Backend, Errno, OpenFlags, Options, WriteFlags};
use oxblk_formats::vdi::header::Header;
use oxblk_ring::IoBufMut;
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_tests::sim_image::{check_sound, open_as};

const MIB: usize = 1 << 20;
/// Byte offset of the block map in images of this test.
const MAP: usize = 512;
/// Byte offset of the number of allocated blocks in the header.
const ALLOCATED: usize = 0x184;
/// Entry of a block that is not allocated.
const ABSENT: u32 = u32::MAX;

/// Returns a disk with an image that has these map entries. Block `n` of the file has the byte `n + 1` everywhere.
fn disk(entries: &[u32], allocated: u32) -> Disk {
    let blocks = u32::try_from(entries.len()).expect("a small image");
    let header = Header {
        image_type: oxblk_formats::vdi::header::ImageType::Dynamic,
        map_offset: MAP as u64,
        data_offset: 1024,
        size: u64::from(blocks) << 20,
        blocks,
        allocated,
        uuids: [[1; 16], [2; 16]],
    };
    let mut bytes = header.encode();
    bytes.extend(entries.iter().flat_map(|entry| entry.to_le_bytes()));
    bytes.resize(1024, 0);
    for block in 0..allocated {
        let byte = u8::try_from(block + 1).expect("a small image");
        bytes.resize(bytes.len() + MIB, byte);
    }
    Disk::from_bytes(1, &bytes)
}

async fn open(disk: &Disk, flags: OpenFlags) -> Backend {
    open_as("vdi", disk, flags).await.expect("an image")
}

async fn assert_block(image: &Backend, index: usize, byte: u8) {
    let offset = (index * MIB) as u64;
    let read = image.read(offset, IoBufMut::new(MIB)).await.expect("a read");
    assert!(*read == vec![byte; MIB], "block {index} has other data");
}

async fn write_block(image: &Backend, index: usize, byte: u8) {
    let offset = (index * MIB) as u64;
    image.write(offset, vec![byte; MIB].into(), WriteFlags::empty()).await.expect("a write");
}

/// Returns faults: the next operation of this kind that overlaps the range fails.
fn fail(op: FaultOp, range: std::ops::Range<usize>) -> Faults {
    let range = Some(range.start as u64..range.end as u64);
    let rule = FailRule { op, nth: None, range, errno: Errno::IO, once: true };
    Faults { fail: vec![rule], ..Faults::default() }
}

async fn assert_sound(disk: &Disk) {
    let image = open(disk, OpenFlags { check: true, ..OpenFlags::default() }).await;
    check_sound(&image, true, "after the fault").await;
    image.close().await.expect("it closes");
}

/// Closes the image. After the close, the check must find no fault, and the first blocks must have these bytes.
async fn close_and_assert_blocks(disk: &Disk, image: Backend, bytes: &[u8]) {
    image.close().await.expect("it closes");
    assert_sound(disk).await;
    let image = open(disk, OpenFlags::default()).await;
    for (index, byte) in bytes.iter().enumerate() {
        assert_block(&image, index, *byte).await;
    }
    image.close().await.expect("it closes");
}

#[test]
fn a_repair_that_fails_leaves_no_entry_behind_the_count_of_blocks() {
    // Two entries refer to the same block.
    let disk = disk(&[0, 0, ABSENT, ABSENT], 1);
    sim::run(1, async {
        let image = open(&disk, OpenFlags { check: true, ..OpenFlags::default() }).await;
        let node = image.node().expect("a node");
        disk.set_faults(fail(FaultOp::Write, ALLOCATED..ALLOCATED + 4));
        let check = node.driver().check().expect("a check");
        let failed = check.check(Fix::All, &|_| ()).await.expect_err("the count is not written");
        assert_eq!(failed.raw_errno(), Errno::IO);
        drop(node);
        // Closing writes the entries that have changed in memory.
        close_and_assert_blocks(&disk, image, &[1, 1]).await;
    });
}

#[test]
fn an_image_allocates_blocks_after_a_reopen_that_was_aborted() {
    // No entry refers to block 0 of the file. Block 1 cannot be read, so it cannot be moved into the place of block 0.
    let disk = disk(&[1, ABSENT, ABSENT], 2);
    sim::run(1, async {
        let image = open(&disk, OpenFlags::default()).await;
        let node = image.node().expect("a node");
        let reopen = node.driver().reopen().expect("a format that can be reopened");
        disk.set_faults(fail(FaultOp::Read, 1024 + MIB..1024 + 2 * MIB));
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        reopen.prepare(flags, &Options::new()).await.expect("the gap stays");
        reopen.abort().await;
        write_block(&image, 1, 7).await;
        write_block(&image, 2, 8).await;
        drop(node);
        close_and_assert_blocks(&disk, image, &[2, 7, 8]).await;
    });
}

#[test]
fn an_image_whose_last_block_could_not_be_moved_becomes_writable_again() {
    let disk = disk(&[1, ABSENT, ABSENT], 2);
    sim::run(1, async {
        let image = open(&disk, OpenFlags::default()).await;
        // The first write of the entry of the moved block fails, and the second write succeeds.
        disk.set_faults(fail(FaultOp::Write, MAP..MAP + 4));
        let read_only = Options::from_dotted("read-only=on", None).expect("options");
        image.reopen(read_only).await.expect("all metadata is on disk");
        assert_block(&image, 0, 2).await;
        let writable = Options::from_dotted("read-only=off", None).expect("options");
        image.reopen(writable).await.expect("nothing has changed");
        write_block(&image, 1, 7).await;
        write_block(&image, 2, 8).await;
        close_and_assert_blocks(&disk, image, &[2, 7, 8]).await;
    });
}

#[test]
fn the_old_place_of_a_moved_block_is_used_again_only_when_its_entry_is_durable() {
    let disk = disk(&[1, ABSENT, ABSENT], 2);
    disk.keep_moments(1, 32);
    sim::run(1, async {
        let image = open(&disk, OpenFlags::default()).await;
        let node = image.node().expect("a node");
        let reopen = node.driver().reopen().expect("a format that can be reopened");
        // Every write of the map fails until the faults are removed.
        let range = Some(MAP as u64..MAP as u64 + 12);
        let errno = Errno::IO;
        let rule = FailRule { op: FaultOp::Write, nth: None, range, errno, once: false };
        disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        let failed = reopen.prepare(flags, &Options::new()).await.expect_err("not on disk");
        assert_eq!(failed.raw_errno(), Errno::IO);
        reopen.abort().await;
        write_block(&image, 1, 7).await;
        disk.set_faults(Faults::default());
        image.flush().await.expect("a flush");
        write_block(&image, 2, 8).await;
        drop(node);
        image.close().await.expect("it closes");
    });
    for (boundary, moment) in disk.moments() {
        for left in (0..4).map(|seed| moment.after_power_loss(seed)) {
            sim::run(1, async {
                assert_sound(&left).await;
                let image = open(&left, OpenFlags::default()).await;
                let read = image.read(0, IoBufMut::new(MIB)).await.expect("a read");
                assert!(*read == [2; MIB], "cut at {boundary}: data is lost");
                image.close().await.expect("it closes");
            });
        }
    }
}
