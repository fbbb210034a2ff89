//! Concurrent control operations and writes on one image; some of the control operations are cancelled.

use std::future::Future;
use std::pin::Pin;

use futures_util::future::join_all;
use oxblk_core::amend::AmendRequest;
use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, Errno, Options, Preallocation, Result, WriteFlags};
use oxblk_ring::{IoBuf, sim};
use oxblk_tests::model::chain::{self, Tolerance};

use crate::given_up::{at_every_step, give_up, image, read};

const KIB: u64 = 1024;
/// The number of bytes that are written before all other operations. Every snapshot has them.
const EARLY: usize = 200 << 10;
/// A number of polls that is enough for every operation.
const ALL: usize = 100_000;

type Operation<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

async fn take(disk: &Backend, name: &str) -> Result<()> {
    disk.create_snapshot(&SnapshotInfo { name: name.to_owned(), ..SnapshotInfo::default() }).await
}

/// Deletes the first snapshot, unless there is none or another task deletes it first.
async fn remove_first(disk: &Backend) -> Result<()> {
    let Some(first) = disk.snapshots().await?.into_iter().next() else { return Ok(()) };
    match disk.delete_snapshot(&first.id).await {
        Err(error) if error.raw_errno() == Errno::NOENT => Ok(()),
        outcome => outcome,
    }
}

async fn amend(disk: &Backend, lazy: bool) -> Result<()> {
    let mut options = Options::new();
    options.insert("lazy_refcounts", lazy);
    disk.amend(AmendRequest { options, force: false, progress: Box::new(|_, _| ()) }).await
}

async fn reopen(disk: &Backend) -> Result<()> {
    let mut options = Options::new();
    options.insert("overlap-check", "all");
    disk.reopen(options).await
}

/// The concurrent operations. Each write has its own range.
fn operations(disk: &Backend) -> Vec<Operation<'_>> {
    let write = |place: u64, byte: u8| {
        let data = IoBuf::from(vec![byte; 20 << 10]);
        disk.write(place * KIB, data, WriteFlags::empty())
    };
    vec![
        Box::pin(take(disk, "a")),
        Box::pin(write(300, 3)),
        Box::pin(remove_first(disk)),
        Box::pin(disk.resize(1200 * KIB, Preallocation::Off)),
        Box::pin(async { disk.compact(64 * KIB, &|_, _| true).await.map(drop) }),
        Box::pin(take(disk, "b")),
        Box::pin(write(400, 4)),
        Box::pin(amend(disk, true)),
        Box::pin(disk.save_vm_state(0, IoBuf::from(vec![5; 9000]))),
        Box::pin(disk.change_backing_file(None, None)),
        Box::pin(reopen(disk)),
        Box::pin(take(disk, "c")),
        Box::pin(remove_first(disk)),
        Box::pin(write(500, 5)),
        Box::pin(amend(disk, false)),
        Box::pin(disk.resize(1300 * KIB, Preallocation::Off)),
    ]
}

async fn holds(disk: &Backend, offset: u64, len: usize, byte: u8) -> bool {
    read(disk, offset, len).await.iter().all(|found| *found == byte)
}

async fn run(seed: u64, give_up_after: impl Fn(usize) -> usize) {
    let image = image().await;
    let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
    let data = IoBuf::from(vec![1; EARLY]);
    disk.write(0, data, WriteFlags::empty()).await.expect("a write");
    take(&disk, "first").await.expect("a snapshot");
    let data = IoBuf::from(vec![2; EARLY]);
    disk.write(0, data, WriteFlags::empty()).await.expect("a write");
    let mut waiting = operations(&disk);
    // The seed chooses which operation begins first.
    let first = usize::try_from(seed).unwrap() * 5 % waiting.len();
    waiting.rotate_left(first);
    let under_way = waiting.into_iter().enumerate().map(|(index, operation)| {
        let operation = async move { operation.await.expect("it succeeds") };
        give_up(give_up_after(index), operation)
    });
    let done = join_all(under_way).await;
    drop(disk.quiesce().await);
    assert!(holds(&disk, 0, EARLY, 2).await);
    if done.iter().all(|done| *done) {
        for (place, byte) in [(300, 3), (400, 4), (500, 5)] {
            assert!(holds(&disk, place * KIB, 20 << 10, byte).await, "seed {seed}: at {place} KiB");
        }
    }
    // `close` also waits for cancelled operations that continue in the background.
    chain::close(disk).await.expect("it closes");
    chain::check(&image, Tolerance::Clean).await.expect("it is clean");
    let disk = chain::open(&[image]).await.expect("it opens");
    for snapshot in disk.snapshots().await.expect("a list") {
        disk.apply_snapshot(&snapshot.id).await.expect("it is applied");
        let byte = if snapshot.name == "first" { 1 } else { 2 };
        assert!(holds(&disk, 0, EARLY, byte).await, "seed {seed}: snapshot {}", snapshot.name);
    }
    chain::close(disk).await.expect("it closes");
}

#[test]
fn control_operations_on_one_image_run_one_at_a_time() {
    for seed in 0..16 {
        sim::run(seed, run(seed, |_| ALL));
    }
}

#[test]
fn cancelled_control_operations_run_to_completion() {
    for seed in 0..48 {
        let polls = |index: usize| 1 + (usize::try_from(seed).unwrap() + 7 * index) % 40;
        sim::run(seed, run(seed, polls));
    }
}

#[test]
fn a_cancelled_close_runs_to_completion() {
    at_every_step(60, |polls| async move {
        let image = image().await;
        let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
        let data = IoBuf::from(vec![1; EARLY]);
        disk.write(0, data, WriteFlags::empty()).await.expect("a write");
        let done = give_up(polls, async { disk.close().await.expect("it closes") }).await;
        // `close` waits for the cancelled close.
        chain::close(disk).await.expect("it closes");
        chain::check(&image, Tolerance::Clean).await.expect("it is clean");
        let disk = chain::open(&[image]).await.expect("it opens");
        assert!(holds(&disk, 0, EARLY, 1).await);
        chain::close(disk).await.expect("it closes");
        done
    });
}
