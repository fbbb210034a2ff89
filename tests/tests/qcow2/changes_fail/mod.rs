//! Changes of an image as a whole whose operations fail or are cut off: the image is the old one or the new one, memory and
//! disk agree about it, what was flushed stays, and nothing but a crash costs space.

mod set;
mod trial;

use oxblk_core::amend::AmendRequest;
use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, Options, Preallocation, Result};

use set::{Kind, OLD};
use trial::{Left, Trial};

const SNAPSHOT: &[&str] = &["qemu-img", "snapshot", "-c", "one", "image"];
const BITMAP: &[&str] = &["qemu-img", "bitmap", "--add", "-g", "4096", "image", "b"];
const MORE: &[&str] = &["qemu-io", "-c", "write -P 0xa3 40k 30k"];

const PLAIN: Kind = Kind::new("plain", "cluster_size=4k");
const SMALL: Kind = Kind::new("clusters of 512 bytes", "cluster_size=512");
const BACKED: Kind = Kind::new("over a longer backing file", "cluster_size=4k").over_backing();
const SHARED: Kind = Kind::new("a snapshot", "cluster_size=4k").with(&[SNAPSHOT, MORE]);
const SUBCLUSTERS: Kind =
    Kind::new("subclusters", "cluster_size=16k,extended_l2=on").over_backing();
const DATA_FILE: Kind = Kind::new("a data file", "cluster_size=4k,data_file=data");
const RAW_DATA: Kind =
    Kind::new("a raw data file", "cluster_size=4k,data_file=data,data_file_raw=on");
const LUKS: Kind = Kind::new(
    "LUKS",
    "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1",
);
const BITMAPS: Kind = Kind::new("bitmaps", "cluster_size=4k").with(&[BITMAP, MORE]);
const OLD_VERSION: Kind = Kind::new("version 2", "cluster_size=4k,compat=0.10");
const OLD_BACKED: Kind =
    Kind::new("version 2 over a longer backing file", "cluster_size=4k,compat=0.10").over_backing();

/// Bytes of the disk after growth and after shrinking; both end within a cluster.
const LARGE: u64 = (1 << 20) + 512;
const LITTLE: u64 = 196 * 512;

fn grow(kind: &Kind) {
    grow_by(kind, Preallocation::Off);
}

fn grow_by(kind: &Kind, preallocation: Preallocation) {
    let change = async |disk: &Backend| disk.resize(LARGE, preallocation).await;
    let what = format!("growth, {preallocation:?}");
    let trial = Trial {
        kind,
        what: &what,
        change,
        left: Left::Old,
        repairs_on_open: false,
        ends_use: false,
    };
    trial.run();
}

fn shrink(kind: &Kind) {
    let change = async |disk: &Backend| disk.resize(LITTLE, Preallocation::Off).await;
    let end = usize::try_from(LITTLE).unwrap();
    let left = Left::ZeroedFrom(end);
    Trial { kind, what: "shrinking", change, left, repairs_on_open: false, ends_use: false }.run();
}

#[test]
fn growth_that_fails_leaves_the_old_size_and_shows_zeroes_in_the_end() {
    [PLAIN, SMALL, OLD_VERSION, OLD_BACKED].iter().for_each(grow);
}

#[test]
fn growth_over_a_longer_backing_file_never_shows_it() {
    [BACKED, SUBCLUSTERS].iter().for_each(grow);
}

#[test]
fn growth_with_snapshots_bitmaps_and_encryption_may_fail_anywhere() {
    [SHARED, BITMAPS, LUKS].iter().for_each(grow);
}

#[test]
fn growth_with_a_data_file_may_fail_anywhere() {
    [DATA_FILE, RAW_DATA].iter().for_each(grow);
}

#[test]
fn preallocation_that_fails_gives_all_of_it_back() {
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        grow_by(&PLAIN, preallocation);
    }
    grow_by(&BACKED, Preallocation::Metadata);
}

#[test]
fn shrinking_that_fails_leaves_the_old_size() {
    [PLAIN, SMALL].iter().for_each(shrink);
}

#[test]
fn shrinking_over_a_backing_file_may_fail_anywhere() {
    [BACKED, SUBCLUSTERS].iter().for_each(shrink);
}

#[test]
fn shrinking_with_snapshots_bitmaps_and_encryption_may_fail_anywhere() {
    [SHARED, BITMAPS, LUKS].iter().for_each(shrink);
}

#[test]
fn shrinking_with_a_data_file_may_fail_anywhere() {
    [DATA_FILE, RAW_DATA].iter().for_each(shrink);
}

fn change_snapshots(kind: &Kind, what: &str, change: impl AsyncFn(&Backend) -> Result<()>) {
    let repairs_on_open = true;
    Trial { kind, what, change, left: Left::Old, repairs_on_open, ends_use: false }.run();
}

const TWO: Kind = Kind::new("two snapshots", "cluster_size=4k").with(&[
    SNAPSHOT,
    MORE,
    &["qemu-img", "snapshot", "-c", "two", "image"],
    MORE,
]);

#[test]
fn taking_a_snapshot_may_fail_anywhere() {
    let new = SnapshotInfo { name: "new".to_owned(), ..SnapshotInfo::default() };
    for kind in [PLAIN, SHARED, SUBCLUSTERS] {
        change_snapshots(&kind, "a new snapshot", async |disk| disk.create_snapshot(&new).await);
    }
}

#[test]
fn applying_a_snapshot_may_fail_anywhere() {
    change_snapshots(&TWO, "a snapshot applied", async |disk| disk.apply_snapshot("1").await);
}

#[test]
fn removing_a_snapshot_may_fail_anywhere() {
    change_snapshots(&TWO, "a snapshot removed", async |disk| disk.delete_snapshot("1").await);
}

async fn amend(disk: &Backend, options: &str) -> Result<()> {
    let options = Options::from_dotted(options, None)?;
    disk.amend(AmendRequest { options, force: false, progress: Box::new(|_, _| ()) }).await
}

#[test]
fn amending_the_size_with_bitmaps_may_fail_anywhere() {
    let large = format!("size={LARGE}");
    for kind in [BITMAPS, BACKED] {
        let change = async |disk: &Backend| amend(disk, &large).await;
        let (what, left) = ("amended size", Left::Old);
        Trial { kind: &kind, what, change, left, repairs_on_open: false, ends_use: false }.run();
    }
}

#[test]
fn amending_the_size_with_the_width_of_refcounts_keeps_the_bitmaps() {
    for size in [LARGE, LITTLE] {
        let image = BITMAPS.make();
        oxblk_ring::sim::run(1, async {
            let backend = image.open().await.unwrap();
            let before = set::bitmaps(&backend)["b"].clone();
            amend(&backend, &format!("size={size},refcount_bits=8")).await.unwrap();
            backend.close().await.unwrap();
            image.assert_sound(false, "amended").await;
            let backend = image.open().await.unwrap();
            assert_eq!(backend.size(), size);
            let after = set::bitmaps(&backend)["b"].clone();
            let kept: Vec<u64> = before.into_iter().filter(|at| *at < size).collect();
            assert!(!kept.is_empty());
            assert_eq!(after, kept);
            backend.close().await.unwrap();
        });
    }
}

#[test]
fn an_amend_that_cannot_have_its_refcounts_leaves_the_size() {
    let image = TWO.make();
    oxblk_ring::sim::run(1, async {
        let backend = image.open().await.unwrap();
        let refused = amend(&backend, &format!("size={LITTLE},refcount_bits=1")).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("Cannot decrease refcount entry width"), "{refused}");
        assert_eq!(backend.size(), OLD);
        backend.close().await.unwrap();
        image.assert_sound(false, "refused").await;
    });
}
