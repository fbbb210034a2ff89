//! Tests of the dirty bit of the header: writes of the bit that report an error although the bit has reached the disk, and
//! other changes that fail.

use oxblk_core::amend::AmendRequest;
use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, WriteFlags};
use oxblk_ring::IoBufMut;
use oxblk_ring::sim::{self, Disk, FaultOp, Faults};

use crate::{CLUSTER, assert_sound, byte, create, fails, open, open_with, options, word, write};

/// The bytes of the header that contain the incompatible features.
const FEATURES: std::ops::Range<u64> = 72..80;

fn is_dirty(disk: &Disk) -> bool {
    word(&disk.bytes(), FEATURES.start) & 1 == 1
}

/// Runs `clear` on an image with lazy refcounts. `clear` clears the dirty bit: the write of the bit reaches the disk but
/// reports an error. Then writes and flushes, and cuts the power.
async fn try_clearing(what: &str, clear: impl AsyncFn(&Backend)) {
    let disk = Disk::new(1, 0);
    create(&disk).await;
    let image = open_with(&disk, "lazy-refcounts=on").await;
    write(&image, 0, 1).await;
    image.flush().await.unwrap();
    assert!(is_dirty(&disk), "{what}: refcounts are not lazy");
    let fail_late = vec![fails(FaultOp::Write, 1, Some(FEATURES))];
    disk.set_faults(Faults { fail_late, ..Faults::default() });
    clear(&image).await;
    assert!(!is_dirty(&disk), "{what}: the bit was not cleared");
    disk.set_faults(Faults::default());
    for cluster in 1..40 {
        write(&image, cluster, 2).await;
    }
    image.flush().await.unwrap();
    let left = disk.after_power_loss_none();
    assert!(is_dirty(&left), "{what}: refcounts are too low in an image that counts as clean");
    let found = open(&left).await;
    assert_eq!((byte(&found, 0).await, byte(&found, 39).await), (1, 2), "{what}");
    found.close().await.unwrap();
    assert_sound(&left, false, what).await;
    image.close().await.unwrap();
    assert!(!is_dirty(&disk), "{what}: dirty after the close");
    assert_sound(&disk, false, what).await;
}

#[test]
fn the_dirty_bit_is_set_again_if_the_failed_write_that_clears_it_reached_the_disk() {
    sim::run(1, async {
        try_clearing("compaction", async |image| {
            let node = image.node().unwrap();
            node.driver().compact().unwrap().step(1 << 20).await.unwrap_err();
        })
        .await;
    });
}

#[test]
fn a_failed_write_that_sets_the_dirty_bit_leaves_an_image_that_can_be_closed_cleanly() {
    sim::run(1, async {
        let disk = Disk::new(1, 0);
        create(&disk).await;
        let image = open_with(&disk, "lazy-refcounts=on").await;
        write(&image, 0, 1).await;
        let fail_late = vec![fails(FaultOp::Write, 1, Some(FEATURES))];
        disk.set_faults(Faults { fail_late, ..Faults::default() });
        image.flush().await.unwrap_err();
        assert!(is_dirty(&disk));
        disk.set_faults(Faults::default());
        image.close().await.unwrap();
        assert!(!is_dirty(&disk), "the image stays dirty");
        assert_sound(&disk, false, "closed").await;
    });
}

#[test]
fn a_change_of_snapshots_whose_end_fails_leaves_an_image_that_is_repaired() {
    sim::run(1, async {
        let disk = Disk::new(1, 0);
        create(&disk).await;
        let image = open_with(&disk, "lazy-refcounts=on").await;
        write(&image, 0, 1).await;
        image.flush().await.unwrap();
        // The change sets the bit first. The second write of the bit clears it.
        let fail_late = vec![fails(FaultOp::Write, 2, Some(FEATURES))];
        disk.set_faults(Faults { fail_late, ..Faults::default() });
        image.create_snapshot(&SnapshotInfo::default()).await.unwrap();
        disk.set_faults(Faults::default());
        for cluster in 0..40 {
            write(&image, cluster, 2).await;
        }
        image.flush().await.unwrap();
        let left = disk.after_power_loss_none();
        let found = open(&left).await;
        assert_eq!(byte(&found, 0).await, 2);
        found.close().await.unwrap();
        assert_sound(&left, false, "after a power cut").await;
        image.close().await.unwrap();
    });
}

#[test]
fn refcounts_stay_lazy_after_an_amend_that_fails() {
    sim::run(1, async {
        let disk = Disk::new(1, 0);
        create(&disk).await;
        let image = open_with(&disk, "lazy-refcounts=on").await;
        write(&image, 0, 1).await;
        image.create_snapshot(&SnapshotInfo::default()).await.unwrap();
        // A shared cluster has a refcount of 2. One bit cannot store this refcount.
        let options = options("refcount_bits=1");
        let request = AmendRequest { options, force: false, progress: Box::new(|_, _| ()) };
        image.amend(request).await.unwrap_err();
        assert!(!is_dirty(&disk));
        write(&image, 1, 1).await;
        image.flush().await.unwrap();
        assert!(is_dirty(&disk), "the refcounts are no longer lazy");
        image.close().await.unwrap();
        assert_sound(&disk, false, "closed").await;
    });
}

#[test]
fn refcounts_are_lazy_as_the_header_says_after_an_amend_whose_later_step_fails() {
    sim::run(1, async {
        let mut changed = 0;
        for nth in 1..20 {
            let disk = Disk::new(nth, 0);
            create(&disk).await;
            let image = open(&disk).await;
            let fail = vec![fails(FaultOp::Write, nth, None)];
            disk.set_faults(Faults { fail, ..Faults::default() });
            let options = options("lazy_refcounts=on,refcount_bits=64");
            let request = AmendRequest { options, force: false, progress: Box::new(|_, _| ()) };
            let outcome = image.amend(request).await;
            disk.set_faults(Faults::default());
            if outcome.is_ok() {
                image.close().await.unwrap();
                break;
            }
            let data = IoBufMut::filled(CLUSTER, 1).freeze();
            // After some of the failures, the image refuses writes.
            if image.write(0, data, WriteFlags::empty()).await.is_ok() {
                image.flush().await.unwrap();
                let is_lazy = disk.bytes()[87] & 1 == 1;
                assert_eq!(is_dirty(&disk), is_lazy, "write {nth}");
                changed += u32::from(is_lazy);
            }
            image.close().await.unwrap();
        }
        assert!(changed > 0, "no amend failed after the header had changed");
    });
}

#[test]
fn refcounts_are_lazy_again_after_a_reopen_repaired_an_unfinished_change() {
    sim::run(1, async {
        let mut repaired = 0;
        for nth in 1..12 {
            let disk = Disk::new(nth, 0);
            create(&disk).await;
            let lazy = "lazy-refcounts=on,cache-clean-interval=0";
            let image = open_with(&disk, lazy).await;
            write(&image, 0, 1).await;
            image.create_snapshot(&SnapshotInfo::default()).await.unwrap();
            write(&image, 0, 2).await;
            image.flush().await.unwrap();
            let fail = vec![fails(FaultOp::Write, nth, None)];
            disk.set_faults(Faults { fail, ..Faults::default() });
            let deleted = image.delete_snapshot("1").await;
            disk.set_faults(Faults::default());
            let read_only = options(&format!("read-only=on,{lazy}"));
            let reopened = async {
                image.reopen(read_only).await?;
                repaired += u32::from(is_dirty(&disk));
                image.reopen(options(&format!("read-only=off,{lazy}"))).await
            };
            // After some of the failures, the image refuses writes.
            if let Err(error) = reopened.await {
                assert!(deleted.is_err(), "write {nth}: {error}");
                let _ = image.close().await;
                continue;
            }
            for cluster in 1..40 {
                write(&image, cluster, 2).await;
            }
            image.flush().await.unwrap();
            let left = disk.after_power_loss_none();
            assert!(is_dirty(&left), "write {nth}: refcounts are too low in a clean image");
            let found = open(&left).await;
            assert_eq!((byte(&found, 0).await, byte(&found, 39).await), (2, 2), "write {nth}");
            found.close().await.unwrap();
            assert_sound(&left, false, "after the power cut").await;
            image.close().await.unwrap();
            assert_sound(&disk, false, "closed").await;
        }
        assert!(repaired > 0, "no reopen found the dirty bit");
    });
}
