//! Operations that fail or are cancelled after they have raised refcounts: the clusters must not leak, and must not be freed
//! while they may still be used.

use std::time::Duration;

use oxblk_core::WriteFlags;
use oxblk_ring::sim::{self, Disk, FaultOp, Faults};
use oxblk_ring::{IoBuf, IoBufMut, timeout};

use crate::{CLUSTER, assert_sound, create, fails, open, word, write};

/// A cluster whose first half is random bytes, so that its compressed data is about half a cluster long.
fn noise(seed: u64) -> IoBuf {
    let mut data = IoBufMut::zeroed(CLUSTER);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for byte in data.iter_mut().take(CLUSTER / 2) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state.to_be_bytes()[0];
    }
    data.freeze()
}

#[test]
fn a_compressed_write_cancelled_at_any_moment_leaks_nothing() {
    for moment in 0..2000 {
        let disk = Disk::new(moment, 0);
        let finished = sim::run(moment, async {
            create(&disk).await;
            let image = open(&disk).await;
            image.write(0, noise(1), WriteFlags::COMPRESSED).await.unwrap();
            let node = image.node().unwrap();
            let at = 5 * CLUSTER as u64;
            // Call the driver directly, because `oxblk_core` would run the write to completion.
            let driver = node.driver().compress().unwrap();
            let packed = driver.compress(noise(2)).await.unwrap();
            let stored = timeout(Duration::from_micros(moment * 50), driver.store(at, packed));
            let finished = stored.await.is_ok();
            oxblk_ring::settled().await;
            image.write(at * 2, noise(3), WriteFlags::COMPRESSED).await.unwrap();
            let read = image.read(at * 2, IoBufMut::new(CLUSTER)).await.unwrap();
            assert!(read[..] == noise(3)[..]);
            image.close().await.unwrap();
            assert_sound(&disk, false, &format!("cancelled at moment {moment}")).await;
            finished
        });
        if finished {
            assert!(moment > 4, "a write has more than {moment} moments");
            return;
        }
    }
    panic!("the write never finishes");
}

/// Makes the n-th write of refcounts during a step of a compaction fail. Returns whether the step failed.
async fn compact_with_a_fault(compressed: bool, nth: u64) -> bool {
    let disk = Disk::new(1, 0);
    create(&disk).await;
    let image = open(&disk).await;
    for cluster in 0..40 {
        write(&image, cluster, 1).await;
    }
    for cluster in 40..60 {
        let flags = if compressed { WriteFlags::COMPRESSED } else { WriteFlags::empty() };
        let data = noise(cluster);
        image.write(cluster * CLUSTER as u64, data, flags).await.unwrap();
    }
    image.discard(0, 40 * CLUSTER as u64).await.unwrap();
    image.close().await.unwrap();
    let image = open(&disk).await;
    let bytes = disk.bytes();
    let block = word(&bytes, word(&bytes, 48));
    let fail = vec![fails(FaultOp::Write, nth, Some(block..block + CLUSTER as u64))];
    disk.set_faults(Faults { fail, ..Faults::default() });
    let failed = image.compact(1 << 20, &|_, _| true).await.is_err();
    disk.set_faults(Faults::default());
    let what = format!("compressed {compressed}, write {nth} of refcounts failed");
    for cluster in 40..60 {
        let read = image.read(cluster * CLUSTER as u64, IoBufMut::new(CLUSTER)).await.unwrap();
        assert!(read[..] == noise(cluster)[..], "{what}: cluster {cluster}");
    }
    image.close().await.unwrap();
    assert_sound(&disk, false, &what).await;
    failed
}

#[test]
fn copies_of_a_compaction_whose_refcounts_cannot_be_written_do_not_leak() {
    for compressed in [false, true] {
        for nth in 1..100 {
            if !sim::run(nth, compact_with_a_fault(compressed, nth)) {
                assert!(nth > 2, "only {nth} writes of refcounts can fail");
                break;
            }
        }
    }
}
