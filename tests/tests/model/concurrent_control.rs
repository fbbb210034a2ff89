//! Concurrent control operations and writes on one image; some of the control operations are cancelled.

use std::future::Future;
use std::pin::Pin;

use futures_util::future::{join, join_all, join3};
use oxblk_core::amend::AmendRequest;
use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, Errno, Error, OpenFlags, Options, Preallocation, Result, WriteFlags};
use oxblk_ring::{IoBuf, sim};
use oxblk_tests::model::chain::{self, Image, Tolerance};

use crate::cancelled_requests::{at_every_step, cancel, image, read};

const KIB: u64 = 1024;
/// The number of bytes that are written before all other operations. Every snapshot contains these bytes.
const EARLY: usize = 200 << 10;
/// A number of polls that is enough for every operation.
const ALL: usize = 100_000;

type Operation<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

async fn take(disk: &Backend, name: &str) -> Result<()> {
    disk.create_snapshot(&SnapshotInfo { name: name.to_owned(), ..SnapshotInfo::default() }).await
}

/// Deletes the first snapshot. Without a snapshot, or if another task deletes the snapshot first, does nothing.
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

/// The bitmaps that the image stores before the operations begin. The operations remove the first two.
const BITMAPS: [&str; 4] = ["one", "two", "idle", "kept"];

async fn add_bitmap(disk: &Backend, name: &str) -> Result<()> {
    disk.graph().add_persistent_bitmap(&disk.node()?, name, Some(4096)).await.map(drop)
}

async fn remove_bitmap(disk: &Backend, name: &str) -> Result<()> {
    let node = disk.node()?;
    let bitmap = node.bitmaps().find(name)?;
    disk.graph().delete_bitmap(&node, &bitmap).await
}

async fn reuse_bitmap(disk: &Backend, name: &str) -> Result<()> {
    let (graph, node) = (disk.graph(), disk.node()?);
    let old = graph.clear_bitmap(&node, name).await?;
    graph.enable_bitmap(&node, name, false).await?;
    drop(graph.freeze_bitmap(&node, name).await?);
    match graph.merge_bitmap(&node, name, old).await {
        // Another task has resized the disk after the bitmap was cleared.
        Err(error) if error.raw_errno() == Errno::INVAL => Ok(()),
        outcome => outcome,
    }
}

/// Creates an image that stores bitmaps.
async fn image_with_bitmaps() -> Image {
    let image = image().await;
    let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
    for name in BITMAPS {
        add_bitmap(&disk, name).await.expect("a bitmap");
    }
    chain::close(disk).await.expect("it closes");
    image
}

/// Returns the operations that run concurrently. Each write has its own range.
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
        Box::pin(remove_bitmap(disk, "one")),
        Box::pin(take(disk, "d")),
        Box::pin(add_bitmap(disk, "new")),
        Box::pin(reuse_bitmap(disk, "idle")),
        Box::pin(remove_bitmap(disk, "two")),
    ]
}

async fn holds(disk: &Backend, offset: u64, len: usize, byte: u8) -> bool {
    read(disk, offset, len).await.iter().all(|found| *found == byte)
}

async fn run(seed: u64, cancel_after: impl Fn(usize) -> usize) {
    let image = image_with_bitmaps().await;
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
        cancel(cancel_after(index), operation)
    });
    let done = join_all(under_way).await;
    drop(disk.quiesce().await);
    assert!(holds(&disk, 0, EARLY, 2).await);
    let all_done = done.iter().all(|done| *done);
    if all_done {
        for (place, byte) in [(300, 3), (400, 4), (500, 5)] {
            assert!(holds(&disk, place * KIB, 20 << 10, byte).await, "seed {seed}: at {place} KiB");
        }
    }
    // `close` also waits for cancelled operations that continue in the background.
    chain::close(disk).await.expect("it closes");
    chain::check(&image, Tolerance::Clean).await.expect("it is clean");
    let disk = chain::open(&[image]).await.expect("it opens");
    assert_bitmaps(&disk, all_done);
    for snapshot in disk.snapshots().await.expect("a list") {
        disk.apply_snapshot(&snapshot.id).await.expect("it is applied");
        let byte = if snapshot.name == "first" { 1 } else { 2 };
        assert!(holds(&disk, 0, EARLY, byte).await, "seed {seed}: snapshot {}", snapshot.name);
    }
    chain::close(disk).await.expect("it closes");
}

/// Asserts that no bitmap was lost and that the bitmaps have recorded all writes.
fn assert_bitmaps(disk: &Backend, all_done: bool) {
    let bitmaps = disk.node().unwrap().bitmaps().snapshot();
    for bitmap in bitmaps.iter() {
        assert!(!bitmap.is_inconsistent(), "bitmap '{}' was lost", bitmap.name());
    }
    let kept = bitmaps.iter().find(|bitmap| bitmap.name() == "kept").expect("a bitmap").map();
    assert_eq!(kept.next_zero(0, EARLY as u64), None);
    if all_done {
        let mut names: Vec<_> = bitmaps.iter().map(|bitmap| bitmap.name()).collect();
        names.sort_unstable();
        assert_eq!(names, ["idle", "kept", "new"]);
        for place in [300, 400, 500] {
            assert_eq!(kept.next_zero(place * KIB, 20 << 10), None);
        }
    }
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
fn a_bitmap_is_removed_before_or_after_a_reopen_but_not_during_it() {
    for seed in 0..24 {
        sim::run(seed, async move {
            let image = image_with_bitmaps().await;
            let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
            let reopen = async {
                // The seed chooses how long the removal runs before the reopen begins.
                oxblk_ring::sleep(std::time::Duration::from_micros(200 * seed)).await;
                let mut options = Options::new();
                options.insert("read-only", true);
                disk.reopen(options).await
            };
            let (removed, reopened) = join(remove_bitmap(&disk, "one"), reopen).await;
            reopened.expect("a reopen");
            let is_there = disk.node().unwrap().bitmaps().find("one").is_ok();
            assert_eq!(removed.is_err(), is_there, "{removed:?}");
            let mut options = Options::new();
            options.insert("read-only", false);
            disk.reopen(options).await.expect("a reopen");
            disk.write(0, IoBuf::from(vec![1; EARLY]), WriteFlags::empty()).await.expect("a write");
            chain::close(disk).await.expect("it closes");
            chain::check(&image, Tolerance::Clean).await.expect("it is clean");
        });
    }
}

#[test]
fn a_resize_through_a_raw_node_waits_for_other_operations_on_its_image() {
    for seed in 0..16 {
        sim::run(seed, async move {
            let image = image().await;
            let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
            let raw = open_raw(&disk).await.expect("a raw node");
            let operations: Vec<Operation<'_>> = vec![
                Box::pin(take(&disk, "a")),
                Box::pin(raw.resize(1200 * KIB, Preallocation::Off)),
                Box::pin(disk.write(0, IoBuf::from(vec![1; EARLY]), WriteFlags::empty())),
                Box::pin(take(&disk, "b")),
                Box::pin(raw.resize(1300 * KIB, Preallocation::Off)),
                Box::pin(async { disk.compact(64 * KIB, &|_, _| true).await.map(drop) }),
                Box::pin(raw.resize(1400 * KIB, Preallocation::Off)),
            ];
            for outcome in join_all(operations).await {
                outcome.expect("it succeeds");
            }
            assert_eq!((disk.size(), raw.size()), (1400 * KIB, 1400 * KIB));
            raw.close().await.expect("it closes");
            chain::close(disk).await.expect("it closes");
            chain::check(&image, Tolerance::Clean).await.expect("it is clean");
        });
    }
}

async fn open_raw(disk: &Backend) -> Result<Backend> {
    let mut options = Options::new();
    options.insert("driver", "raw");
    options.insert("file", "image0");
    disk.graph().open_backend(None, options, OpenFlags::default()).await
}

#[test]
fn a_close_and_a_reopen_of_a_raw_node_wait_for_other_operations_on_its_image() {
    for seed in 0..24 {
        sim::run(seed, async move {
            let image = image().await;
            let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
            let (one, other) = (open_raw(&disk).await.unwrap(), open_raw(&disk).await.unwrap());
            let early = |byte| IoBuf::from(vec![byte; EARLY]);
            disk.write(0, early(1), WriteFlags::empty()).await.expect("a write");
            one.write(0, early(2), WriteFlags::empty()).await.expect("a write");
            other.write(0, early(3), WriteFlags::empty()).await.expect("a write");
            let read_only = |read_only: bool| {
                let mut options = Options::new();
                options.insert("read-only", read_only);
                other.reopen(options)
            };
            let mut operations: Vec<Operation<'_>> = vec![
                Box::pin(take(&disk, "a")),
                Box::pin(one.flush()),
                Box::pin(async { disk.compact(64 * KIB, &|_, _| true).await.map(drop) }),
                Box::pin(one.close()),
                Box::pin(amend(&disk, true)),
                Box::pin(read_only(true)),
                Box::pin(take(&disk, "b")),
                Box::pin(remove_first(&disk)),
                Box::pin(read_only(false)),
                Box::pin(amend(&disk, false)),
            ];
            let first = usize::try_from(seed).unwrap() % operations.len();
            operations.rotate_left(first);
            for outcome in join_all(operations).await {
                match outcome {
                    // The flush came after the close.
                    Err(error) if error.raw_errno() == Errno::NOMEDIUM => {}
                    outcome => outcome.expect("it succeeds"),
                }
            }
            assert!(holds(&disk, 0, EARLY, 3).await);
            other.close().await.expect("it closes");
            chain::close(disk).await.expect("it closes");
            chain::check(&image, Tolerance::Clean).await.expect("it is clean");
        });
    }
}

#[test]
fn a_snapshot_is_deleted_by_its_name_even_if_its_id_is_given_to_another_one() {
    for seed in 0..8 {
        sim::run(seed, async move {
            let image = image().await;
            let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
            take(&disk, "a").await.expect("a snapshot");
            let delete = || {
                disk.delete_snapshot_by(|list| {
                    let found = list.iter().find(|snapshot| snapshot.name == "a");
                    let id = found.map(|snapshot| snapshot.id.clone());
                    id.ok_or_else(|| Error::from_errno(Errno::NOENT))
                })
            };
            // The new snapshot gets the id of the deleted snapshot.
            let (one, taken, other) = join3(delete(), take(&disk, "b"), delete()).await;
            taken.expect("a snapshot");
            one.expect("it is deleted");
            assert_eq!(other.unwrap_err().raw_errno(), Errno::NOENT);
            let left = disk.snapshots().await.expect("a list");
            assert_eq!(left.len(), 1);
            assert_eq!((left[0].id.as_str(), left[0].name.as_str()), ("1", "b"));
            chain::close(disk).await.expect("it closes");
        });
    }
}

#[test]
fn a_reopen_that_waits_for_a_close_is_refused() {
    for read_only in [false, true] {
        sim::run(1, async move {
            let image = image().await;
            let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
            disk.write(0, IoBuf::from(vec![1; EARLY]), WriteFlags::empty()).await.expect("a write");
            let mut options = Options::new();
            options.insert("read-only", read_only);
            let (closed, reopened) = join(disk.close(), disk.reopen(options)).await;
            closed.expect("it closes");
            assert_eq!(reopened.unwrap_err().raw_errno(), Errno::NOMEDIUM);
            chain::close(disk).await.expect("it closes");
            chain::check(&image, Tolerance::Clean).await.expect("it is clean");
        });
    }
}

#[test]
fn a_cancelled_close_runs_to_completion() {
    at_every_step(60, |polls| async move {
        let image = image().await;
        let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
        let data = IoBuf::from(vec![1; EARLY]);
        disk.write(0, data, WriteFlags::empty()).await.expect("a write");
        let done = cancel(polls, async { disk.close().await.expect("it closes") }).await;
        // `close` waits for the cancelled close.
        chain::close(disk).await.expect("it closes");
        chain::check(&image, Tolerance::Clean).await.expect("it is clean");
        let disk = chain::open(&[image]).await.expect("it opens");
        assert!(holds(&disk, 0, EARLY, 1).await);
        chain::close(disk).await.expect("it closes");
        done
    });
}
