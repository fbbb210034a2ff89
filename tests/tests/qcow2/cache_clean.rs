//! Requests while the caches drop slices that were not used for some time.

use oxblk_core::{Backend, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut, sim, sleep, spawn};
use oxblk_tests::crash::change::{assert_sound, contents, image, open};
use oxblk_tests::random::Random;
use std::time::Duration;

/// The number of tasks.
const TASKS: u64 = 4;
/// The length of the range of each task, in bytes.
const SHARE: usize = 1 << 20;

/// Sends random requests to the range of one task, with pauses of up to two seconds. Returns the contents of the range at the
/// end.
async fn work(disk: Backend, task: u64) -> Vec<u8> {
    let mut random = Random::new(task);
    let mut model = vec![0; SHARE];
    let start = task * SHARE as u64;
    for step in 1..=200_u8 {
        let len = random.within(1, 20_000);
        let at = random.below(SHARE as u64 - len);
        let range = usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
        match random.below(5) {
            0 => {
                disk.discard(start + at, len).await.unwrap();
                // A discard may zero a cluster or leave it unchanged.
                let now = disk.read(start + at, IoBufMut::new(range.len())).await.unwrap();
                assert!(
                    now.iter().zip(&model[range.clone()]).all(|(now, old)| now == old || *now == 0)
                );
                model[range].copy_from_slice(&now);
            }
            1 | 2 => {
                disk.write(start + at, IoBuf::from(vec![step; range.len()]), WriteFlags::empty())
                    .await
                    .unwrap();
                model[range].fill(step);
            }
            3 => disk.flush().await.unwrap(),
            _ => {
                let now = disk.read(start + at, IoBufMut::new(range.len())).await.unwrap();
                assert!(now[..] == model[range], "task {task}, step {step}");
            }
        }
        sleep(Duration::from_millis(random.below(2_000))).await;
    }
    model
}

#[test]
fn the_contents_stay_the_same_while_unused_slices_are_dropped() {
    for (seed, options) in
        (1..).zip(["cluster_size=512", "cluster_size=4k", "extended_l2=on,cluster_size=16k"])
    {
        let disk = image(seed, &["-o", options, "image", "4M"], &[]);
        sim::run(seed, async {
            let backend = open(&disk, ",cache-clean-interval=1", false).await.unwrap();
            let tasks: Vec<_> = (0..TASKS).map(|task| spawn(work(backend.clone(), task))).collect();
            let mut model = Vec::new();
            for task in tasks {
                model.extend(task.await);
            }
            assert!(contents(&backend).await == model, "{options}");
            backend.close().await.unwrap();
            assert_sound(&disk, false, options).await;
            let again = open(&disk, "", false).await.unwrap();
            assert!(contents(&again).await == model, "{options}: opened again");
            again.close().await.unwrap();
        });
    }
}
