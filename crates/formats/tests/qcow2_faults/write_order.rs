//! Tests of the write order: a reference reaches the disk only after the cluster that it refers to and the refcount of the
//! cluster. This also holds after a failure.

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Errno, WriteFlags};
use oxblk_ring::IoBufMut;
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};

use crate::{CLUSTER, assert_sound, byte, create, create_with, fails, open, word, write};

/// For each recorded point between two writes, checks disks that a power cut at this point can leave.
async fn assert_sound_after_cuts(disk: &Disk, context: &str) {
    for (boundary, moment) in disk.moments() {
        for seed in 0..4 {
            let what = format!("{context}, cut at {boundary}, {seed}");
            assert_sound(&moment.after_power_loss(seed), true, &what).await;
        }
        let what = format!("{context}, cut at {boundary}");
        assert_sound(&moment.after_power_loss_none(), true, &what).await;
        assert_sound(&moment.after_power_loss_all(), true, &what).await;
    }
}

#[test]
fn an_l1_entry_that_changes_during_a_write_back_waits_for_the_next_one() {
    for seed in 0..3 {
        let disk = Disk::new(seed, 0);
        sim::run(seed, async {
            create(&disk).await;
            let image = open(&disk).await;
            for cluster in 1024..1100 {
                write(&image, cluster, 1).await;
            }
            write(&image, 0, 1).await;
            image.discard(1024 * CLUSTER as u64, 76 * CLUSTER as u64).await.unwrap();
            image.flush().await.unwrap();
            image.flush().await.unwrap();
            image.create_snapshot(&SnapshotInfo::default()).await.unwrap();
            // A compaction moves the L2 table that the snapshot shares, but the write of the active L1 entry fails.
            let l1 = word(&disk.bytes(), 40);
            let fail = vec![fails(FaultOp::Write, 1, Some(l1..l1 + 8))];
            disk.set_faults(Faults { fail, ..Faults::default() });
            image.compact(1 << 20, &|_, _| true).await.unwrap_err();
            disk.set_faults(Faults::default());
            // The snapshot shares the moved table too, so the next write copies the table and changes the dirty L1 entry.
            disk.keep_moments(seed, usize::MAX);
            let flushing = image.clone();
            let writing = image.clone();
            let flush = oxblk_ring::spawn(async move { flushing.flush().await });
            let write = oxblk_ring::spawn(async move {
                for cluster in 1..8 {
                    write(&writing, cluster, 3).await;
                }
            });
            flush.await.unwrap();
            write.await;
            image.flush().await.unwrap();
            assert_sound_after_cuts(&disk, &format!("seed {seed}")).await;
            image.close().await.unwrap();
        });
    }
}

#[test]
fn raised_refcounts_are_durable_before_the_l1_table_is_overwritten() {
    for seed in 0..3 {
        let disk = Disk::new(seed, 0);
        sim::run(seed, async {
            // Version 2 has no dirty bit, so a power cut is not followed by a repair.
            create_with(&disk, "compat=0.10").await;
            let image = open(&disk).await;
            for cluster in 0..8 {
                write(&image, cluster, 1).await;
            }
            image.create_snapshot(&SnapshotInfo::default()).await.unwrap();
            for cluster in 0..8 {
                write(&image, cluster, 2).await;
            }
            image.flush().await.unwrap();
            let full = FailRule {
                op: FaultOp::Write,
                nth: None,
                range: Some(disk.len()..u64::MAX),
                errno: Errno::NOSPC,
                once: false,
            };
            disk.set_faults(Faults { fail: vec![full], ..Faults::default() });
            disk.keep_moments(seed, usize::MAX);
            image.apply_snapshot("1").await.unwrap();
            disk.set_faults(Faults::default());
            assert_eq!(byte(&image, 0).await, 1);
            assert_sound_after_cuts(&disk, &format!("seed {seed}")).await;
            image.close().await.unwrap();
            assert_sound(&disk, false, "closed").await;
        });
    }
}

#[test]
fn refcounts_are_not_written_after_a_corruption_was_found() {
    let disk = Disk::new(1, 0);
    sim::run(1, async {
        create(&disk).await;
        let image = open(&disk).await;
        for cluster in 0..4 {
            write(&image, cluster, 1).await;
        }
        image.close().await.unwrap();
    });
    let mut bytes = disk.bytes();
    // The entry of guest cluster 3 contains an offset that is not aligned.
    let table = word(&bytes, word(&bytes, 40)) & 0x00ff_ffff_ffff_fe00;
    let at = usize::try_from(table).unwrap() + 24;
    bytes[at..at + 8].copy_from_slice(&(1 << 63 | 0x1200_u64).to_be_bytes());
    let block = usize::try_from(word(&bytes, word(&bytes, 48))).unwrap();
    let damaged = Disk::from_bytes(2, &bytes);
    sim::run(2, async {
        let image = open(&damaged).await;
        image.discard(0, CLUSTER as u64).await.unwrap();
        // The flush writes the entry, and lowers the refcount in memory.
        image.flush().await.unwrap();
        image.read(3 * CLUSTER as u64, IoBufMut::new(CLUSTER)).await.unwrap_err();
        let data = vec![1; 512].into();
        image.write(0, data, WriteFlags::empty()).await.unwrap_err();
        let before = damaged.bytes()[block..block + CLUSTER].to_vec();
        drop(image.flush().await);
        assert!(damaged.bytes()[block..block + CLUSTER] == before, "refcounts were written");
        drop(image.close().await);
        assert!(damaged.bytes()[block..block + CLUSTER] == before, "refcounts were written");
    });
}

#[test]
fn a_power_cut_during_a_creation_leaves_no_header_or_a_valid_image() {
    for options in ["preallocation=off", "preallocation=metadata"] {
        let disk = Disk::from_bytes(1, &vec![0xaa; 1 << 20]);
        sim::run(1, async {
            disk.keep_moments(1, usize::MAX);
            create_with(&disk, options).await;
            let mut images = 0;
            for (boundary, moment) in disk.moments() {
                let cuts = (0..8).map(|seed| moment.after_power_loss(seed));
                for left in cuts.chain([moment.after_power_loss_all()]) {
                    if left.bytes().starts_with(b"QFI") {
                        images += 1;
                        let what = format!("{options}, cut at {boundary}");
                        assert_sound(&left, true, &what).await;
                    }
                }
            }
            assert!(images > 0, "{options}: no power cut left a header");
        });
    }
}
