//! Image-wide changes in which operations of the disk fail or the power is cut. After the failure, the image must be the old or
//! the new image, the state in memory must equal the state on disk, flushed data must be kept, and only a power cut may leak
//! clusters.

pub(super) mod set;
mod trial;

use oxblk_core::amend::AmendRequest;
use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, Errno, Options, Preallocation, Result, WriteFlags};
use oxblk_ring::sim::{self, FailRule, FaultOp, Faults};

use set::{Held, Kind, OLD};
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

/// The disk size after growth, in bytes. The disk ends within a cluster.
const LARGE: u64 = (1 << 20) + 512;
/// The disk size after shrinking, in bytes. The disk ends within a cluster.
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
fn growth_that_fails_leaves_the_old_size_and_its_retry_adds_zeroes() {
    [PLAIN, SMALL, OLD_VERSION, OLD_BACKED].iter().for_each(grow);
}

#[test]
fn growth_never_reveals_data_of_a_longer_backing_file() {
    [BACKED, SUBCLUSTERS].iter().for_each(grow);
}

#[test]
fn growth_with_snapshots_bitmaps_and_encryption_may_fail_at_any_operation() {
    [SHARED, BITMAPS, LUKS].iter().for_each(grow);
}

#[test]
fn growth_with_a_data_file_may_fail_at_any_operation() {
    [DATA_FILE, RAW_DATA].iter().for_each(grow);
}

#[test]
fn failed_preallocation_frees_all_its_clusters() {
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
fn shrinking_over_a_backing_file_may_fail_at_any_operation() {
    [BACKED, SUBCLUSTERS].iter().for_each(shrink);
}

#[test]
fn shrinking_with_snapshots_bitmaps_and_encryption_may_fail_at_any_operation() {
    [SHARED, BITMAPS, LUKS].iter().for_each(shrink);
}

#[test]
fn shrinking_with_a_data_file_may_fail_at_any_operation() {
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
fn taking_a_snapshot_may_fail_at_any_operation() {
    let new = SnapshotInfo { name: "new".to_owned(), ..SnapshotInfo::default() };
    for kind in [PLAIN, SHARED, SUBCLUSTERS] {
        change_snapshots(&kind, "a new snapshot", async |disk| disk.create_snapshot(&new).await);
    }
}

#[test]
fn applying_a_snapshot_may_fail_at_any_operation() {
    change_snapshots(&TWO, "a snapshot applied", async |disk| disk.apply_snapshot("1").await);
}

#[test]
fn removing_a_snapshot_may_fail_at_any_operation() {
    change_snapshots(&TWO, "a snapshot removed", async |disk| disk.delete_snapshot("1").await);
}

async fn amend(disk: &Backend, options: &str) -> Result<()> {
    let options = Options::from_dotted(options, None)?;
    disk.amend(AmendRequest { options, force: false, progress: Box::new(|_, _| ()) }).await
}

#[test]
fn amending_the_size_with_bitmaps_may_fail_at_any_operation() {
    let large = format!("size={LARGE}");
    for kind in [BITMAPS, BACKED] {
        let change = async |disk: &Backend| amend(disk, &large).await;
        let (what, left) = ("amended size", Left::Old);
        Trial { kind: &kind, what, change, left, repairs_on_open: false, ends_use: false }.run();
    }
}

#[test]
fn amending_the_size_and_the_refcount_width_keeps_the_bitmaps() {
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
fn an_amend_with_a_refused_refcount_width_leaves_the_size() {
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

#[test]
fn an_amend_to_version_2_on_a_full_disk_leaves_the_size() {
    use oxblk_ring::sim::{FailRule, FaultOp, Faults};
    const ZEROED: Kind = BACKED.with(&[&["qemu-io", "-c", "write -z 0 290k"]]);
    let image = ZEROED.make();
    oxblk_ring::sim::run(1, async {
        let backend = image.open().await.unwrap();
        // The range begins after the metadata, so writes to metadata succeed.
        let range = Some(6 * 4096..u64::MAX);
        let full = FailRule { op: FaultOp::Write, nth: None, range, errno: 28, once: false };
        image.disk.set_faults(Faults { fail: vec![full], ..Faults::default() });
        let refused = amend(&backend, &format!("size={LITTLE},compat=0.10")).await;
        assert!(refused.is_err(), "the amend succeeded on a full disk");
        assert_eq!(backend.size(), OLD);
        image.disk.set_faults(Faults::default());
        backend.close().await.unwrap();
        image.assert_sound(true, "refused").await;
    });
}

/// Makes the n-th operation fail, then continues to use the image and checks it.
async fn amended_with_a_fault(image: &set::Set, nth: u64, op: oxblk_ring::sim::FaultOp) -> bool {
    use oxblk_ring::sim::{FailRule, Faults};
    let what = format!("{op:?} {nth} fails");
    let tried = image.copy();
    let backend = tried.open().await.unwrap();
    let rule = FailRule { op, nth: Some(nth), range: None, errno: 5, once: true };
    tried.disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
    let failed = amend(&backend, &format!("size={LARGE},refcount_bits=8")).await.is_err();
    tried.disk.set_faults(Faults::default());
    if failed {
        for at in (0..OLD / 4096).map(|cluster| cluster * 4096) {
            let data = oxblk_ring::IoBuf::from(vec![9; 4096]);
            let written = backend.write(at, data, oxblk_core::WriteFlags::empty()).await;
            if written.is_err() {
                break;
            }
        }
    }
    drop(backend.close().await);
    tried.assert_sound(true, &what).await;
    failed
}

#[test]
fn amending_the_size_and_the_refcount_width_may_fail_at_any_operation() {
    use oxblk_ring::sim::FaultOp;
    let image = PLAIN.make();
    for op in [FaultOp::Sync, FaultOp::Write] {
        let mut fine = 0;
        for nth in 1.. {
            let failed = oxblk_ring::sim::run(nth, amended_with_a_fault(&image, nth, op));
            fine = if failed { 0 } else { fine + 1 };
            if fine == 12 {
                break;
            }
        }
    }
}

/// Shrinks the disk and changes the refcount width; the n-th operation fails. After a failure, the image is the old image, or
/// has the new size and the error reports this. In both cases the retry makes the new image.
async fn shrunk_with_a_fault(image: &set::Set, (old, new): (&Held, &Held), nth: u64) -> bool {
    let what = format!("operation {nth} fails");
    let options = format!("size={LITTLE},refcount_bits=8");
    let end = usize::try_from(LITTLE).unwrap();
    let tried = image.copy();
    let backend = tried.open().await.unwrap();
    let rule =
        FailRule { op: FaultOp::Any, nth: Some(nth), range: None, errno: Errno::IO, once: true };
    tried.disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
    let outcome = amend(&backend, &options).await;
    tried.disk.set_faults(Faults::default());
    let failed = outcome.is_err();
    let mut has_stopped = false;
    if let Err(error) = outcome {
        let text = error.to_string();
        let has_shrunk = text.starts_with("The disk has its new size");
        match set::contents(&backend).await {
            Ok(now) => {
                assert_eq!(backend.size(), if has_shrunk { LITTLE } else { OLD }, "{what}: {text}");
                assert_eq!(now[..end], old.active[..end], "{what}: {text}");
            }
            Err(stopped) => {
                assert!(stopped.to_string().contains("is unknown"), "{what}: {stopped}");
                has_stopped = true;
            }
        }
        backend.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        tried.assert_sound(true, &what).await;
        let now = Held::by(&tried, &what).await.active;
        assert_eq!(now[..end], old.active[..end], "{what}: {text}");
        let backend = tried.open().await.unwrap();
        amend(&backend, &options).await.unwrap_or_else(|error| panic!("{what}: retry: {error}"));
        backend.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
    } else {
        backend.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
    }
    tried.assert_sound(true, &what).await;
    let now = Held::by(&tried, &what).await;
    assert!(now.active == new.active, "{what}: not the new contents");
    assert_eq!(now.info, new.info, "{what}");
    // An image that refuses all writes cannot store its bitmaps.
    let lost = has_stopped && now.bitmaps.is_empty();
    assert!(
        lost || now.bitmaps == new.bitmaps,
        "{what}: stopped: {has_stopped}; {:?}",
        now.bitmaps
    );
    failed
}

#[test]
fn shrinking_by_an_amend_that_fails_later_leaves_a_valid_image() {
    for kind in [PLAIN, BITMAPS] {
        let image = kind.make();
        let (old, new) = sim::run(1, async {
            let old = Held::by(&image, "before").await;
            let done = image.copy();
            let backend = done.open().await.unwrap();
            amend(&backend, &format!("size={LITTLE},refcount_bits=8")).await.unwrap();
            backend.close().await.unwrap();
            (old, Held::by(&done, "after").await)
        });
        let mut fine = 0;
        for nth in 1.. {
            let failed = sim::run(nth, shrunk_with_a_fault(&image, (&old, &new), nth));
            fine = if failed { 0 } else { fine + 1 };
            if fine == 12 {
                assert!(nth > fine, "nothing fails");
                break;
            }
        }
    }
}

/// Cancels a change of size at a given moment. Other tasks continue to use the image.
async fn cancelled(image: &set::Set, moment: u64, size: u64) -> bool {
    let what = format!("size {size} cancelled at moment {moment}");
    let tried = image.copy();
    let backend = tried.open().await.unwrap();
    let node = backend.node().unwrap();
    let resize = node.driver().resize().unwrap().resize(size, Preallocation::Off);
    let time = std::time::Duration::from_micros(moment * 100);
    // Call the driver directly, because `oxblk_core` runs a cancelled change to completion.
    let finished = oxblk_ring::timeout(time, resize).await.is_ok();
    oxblk_ring::settled().await;
    let mut written = Vec::new();
    for at in (0..16_u64).map(|cluster| cluster * 4096) {
        let data = oxblk_ring::IoBuf::from(vec![9; 4096]);
        match backend.write(at, data, oxblk_core::WriteFlags::empty()).await {
            Ok(()) => written.push(at),
            Err(_) => break,
        }
    }
    let discarded = backend.discard(65536, 65536).await.is_ok();
    let flushed = backend.flush().await.is_ok();
    for at in (32..36_u64).map(|cluster| cluster * 4096) {
        let data = oxblk_ring::IoBuf::from(vec![9; 4096]);
        if discarded
            && flushed
            && backend.write(at - 65536, data, oxblk_core::WriteFlags::empty()).await.is_ok()
        {
            written.push(at - 65536);
        }
    }
    let closed = backend.close().await.is_ok();
    tried.assert_sound(true, &what).await;
    if flushed && closed {
        let again = tried.copy();
        let backend = again.open().await.unwrap();
        let now = contents_of(&backend).await;
        for at in written {
            let at = usize::try_from(at).unwrap();
            assert!(now[at..at + 4096].iter().all(|byte| *byte == 9), "{what}: {at} is lost");
        }
        backend.close().await.unwrap();
    }
    finished
}

async fn contents_of(backend: &Backend) -> Vec<u8> {
    set::contents(backend).await.unwrap()
}

#[test]
fn a_resize_cancelled_at_any_moment_leaves_memory_and_disk_consistent() {
    for kind in [PLAIN, SHARED] {
        let image = kind.make();
        for size in [LARGE + (4 << 20), LITTLE] {
            for moment in 0..4000 {
                if oxblk_ring::sim::run(moment, cancelled(&image, moment, size)) {
                    break;
                }
            }
        }
    }
}

const LAST: u64 = 9 << 20;

/// Creates an image with clusters of 512 bytes whose refcount table is nearly full.
async fn nearly_full() -> set::Set {
    let image = SMALL.make();
    let backend = image.open().await.unwrap();
    backend.resize(LAST, Preallocation::Off).await.unwrap();
    let bytes = 7900 << 10;
    let data = oxblk_ring::IoBuf::from(vec![8; bytes]);
    backend.write(0, data, oxblk_core::WriteFlags::empty()).await.unwrap();
    backend.close().await.unwrap();
    image
}

async fn cancelled_write(image: &set::Set, moment: u64) -> bool {
    let what = format!("write cancelled at moment {moment}");
    let tried = image.copy();
    let backend = tried.open().await.unwrap();
    let node = backend.node().unwrap();
    let flags = oxblk_core::WriteFlags::empty();
    let at = 8000 << 10;
    let write = node.driver().write(at, oxblk_ring::IoBuf::from(vec![7; 160 << 10]), flags);
    let time = std::time::Duration::from_micros(moment * 900);
    let finished = oxblk_ring::timeout(time, write).await.is_ok();
    oxblk_ring::settled().await;
    let mut ok = true;
    for at in (0..30_u64).map(|index| (8000 << 10) + index * 4096) {
        let data = oxblk_ring::IoBuf::from(vec![9; 4096]);
        ok &= backend.write(at, data, flags).await.is_ok();
    }
    ok &= backend.flush().await.is_ok();
    ok &= backend.close().await.is_ok();
    tried.assert_sound(true, &what).await;
    if ok {
        let again = tried.copy();
        let backend = again.open().await.unwrap();
        let now = contents_of(&backend).await;
        assert!(now[8000 << 10..8120 << 10].iter().all(|byte| *byte == 9), "{what}: lost");
        assert!(now[..7900 << 10].iter().all(|byte| *byte == 8), "{what}: overwritten");
        backend.close().await.unwrap();
    }
    finished
}

#[test]
fn a_write_cancelled_at_any_moment_leaves_consistent_refcounts() {
    let image = oxblk_ring::sim::run(1, nearly_full());
    for moment in 0..4000 {
        if oxblk_ring::sim::run(moment, cancelled_write(&image, moment)) {
            break;
        }
    }
}

async fn cancelled_snapshot(image: &set::Set, moment: u64, which: u8) -> bool {
    let what = format!("snapshot change {which} cancelled at moment {moment}");
    let tried = image.copy();
    let backend = tried.open().await.unwrap();
    let node = backend.node().unwrap();
    let new = SnapshotInfo { name: "new".to_owned(), ..SnapshotInfo::default() };
    let snapshots = node.driver().snapshots().unwrap();
    let time = std::time::Duration::from_micros(moment * 100);
    let finished = match which {
        0 => oxblk_ring::timeout(time, snapshots.create(&new)).await.is_ok(),
        1 => oxblk_ring::timeout(time, snapshots.apply("1")).await.is_ok(),
        _ => oxblk_ring::timeout(time, snapshots.delete("1")).await.is_ok(),
    };
    oxblk_ring::settled().await;
    let flags = oxblk_core::WriteFlags::empty();
    let mut ok = true;
    for at in (0..16_u64).map(|index| index * 4096) {
        ok &= backend.write(at, oxblk_ring::IoBuf::from(vec![9; 4096]), flags).await.is_ok();
    }
    ok &= backend.flush().await.is_ok();
    ok &= backend.close().await.is_ok();
    let dirty = tried.disk.bytes()[79] & 1 == 1;
    if !dirty {
        tried.assert_sound(true, &what).await;
    }
    if ok {
        let again = tried.copy();
        let backend = again.open().await.unwrap();
        let now = contents_of(&backend).await;
        assert!(now[..65536].iter().all(|byte| *byte == 9), "{what}: lost");
        backend.close().await.unwrap();
        again.assert_sound(true, &what).await;
    }
    finished
}

#[test]
fn a_snapshot_change_cancelled_at_any_moment_leaves_a_sound_image() {
    let image = TWO.make();
    for which in 0..3 {
        for moment in 0..4000 {
            if oxblk_ring::sim::run(moment, cancelled_snapshot(&image, moment, which)) {
                break;
            }
        }
    }
}

#[test]
fn a_reopen_for_writing_never_overwrites_changes_of_another_program() {
    let image = PLAIN.make();
    oxblk_ring::sim::run(1, async {
        let flags = oxblk_core::WriteFlags::empty();
        let fill = |byte: u8, len: usize| oxblk_ring::IoBuf::from(vec![byte; len]);
        let first = image.open().await.unwrap();
        // These requests free clusters and search for free clusters.
        first.write(200 << 10, fill(1, 4096), flags).await.unwrap();
        first.discard(0, 65536).await.unwrap();
        first.flush().await.unwrap();
        first.reopen(Options::from_dotted("read-only=on", None).unwrap()).await.unwrap();
        let second = image.open().await.unwrap();
        second.write(0, fill(2, 65536), flags).await.unwrap();
        second.close().await.unwrap();
        // The other program has changed only L2 entries and refcounts. The first program reads both again.
        first.reopen(Options::from_dotted("read-only=off", None).unwrap()).await.unwrap();
        first.write(210 << 10, fill(3, 16384), flags).await.unwrap();
        let now = contents_of(&first).await;
        assert!(
            now[..65536].iter().all(|byte| *byte == 2),
            "the data of the other program is overwritten"
        );
        first.close().await.unwrap();
        image.assert_sound(true, "reopened").await;
        assert!(Held::by(&image, "reopened").await.active == now, "the contents are different");
    });
}

/// Changes an image that another program has open read-only. After the change, the other program must refuse to open the image
/// for writing.
async fn refuses_to_write_after(image: &set::Set, what: &str, change: impl AsyncFn(&Backend)) {
    let flags = WriteFlags::empty();
    let first = image.open().await.unwrap();
    first.discard(0, 65536).await.unwrap();
    first.flush().await.unwrap();
    first.reopen(Options::from_dotted("read-only=on", None).unwrap()).await.unwrap();
    let second = image.open().await.unwrap();
    second.write(0, vec![2; 65536].into(), flags).await.unwrap();
    change(&second).await;
    second.close().await.unwrap();
    let bytes = image.disk.bytes();
    let refused = first.reopen(Options::from_dotted("read-only=off", None).unwrap()).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.raw_errno(), Errno::BUSY, "{what}: {refused}");
    let text = refused.to_string();
    assert!(text.contains("Image was changed while it was open read-only"), "{what}: {text}");
    // The image stays read-only. Neither a write nor the close changes the image.
    assert!(first.is_read_only(), "{what}");
    first.write(0, vec![3; 512].into(), flags).await.unwrap_err();
    first.close().await.unwrap();
    assert!(image.disk.bytes() == bytes, "{what}: the image was written");
    image.assert_sound(false, what).await;
    let now = Held::by(image, what).await;
    assert!(now.active[..65536].iter().all(|byte| *byte == 2), "{what}: the data is lost");
}

#[test]
fn a_reopen_for_writing_is_refused_after_another_program_has_replaced_tables() {
    let new = SnapshotInfo { name: "new".to_owned(), ..SnapshotInfo::default() };
    sim::run(1, async {
        let take = async |disk: &Backend| disk.create_snapshot(&new).await.unwrap();
        refuses_to_write_after(&PLAIN.make(), "a snapshot", take).await;
        let grow = async |disk: &Backend| disk.resize(LARGE, Preallocation::Off).await.unwrap();
        refuses_to_write_after(&PLAIN.make(), "growth", grow).await;
        let shrink = async |disk: &Backend| disk.resize(LITTLE, Preallocation::Off).await.unwrap();
        refuses_to_write_after(&SMALL.make(), "shrinking", shrink).await;
    });
}

#[test]
fn an_image_whose_header_cannot_get_its_old_size_back_refuses_writes() {
    let fails = |op, nth, range| FailRule { op, nth, range, errno: Errno::IO, once: true };
    let image = RAW_DATA.make();
    let old = sim::run(1, Held::by(&image, "before"));
    sim::run(1, async {
        let backend = image.open().await.unwrap();
        // The truncation of the data file fails. The second write to the header would restore the old size, and fails too.
        let data = image.data.as_ref().unwrap();
        let faults = |rule| Faults { fail: vec![rule], ..Faults::default() };
        data.set_faults(faults(fails(FaultOp::Truncate, None, None)));
        image.disk.set_faults(faults(fails(FaultOp::Write, Some(2), Some(24..48))));
        backend.resize(LITTLE, Preallocation::Off).await.unwrap_err();
        // The size in memory is the old size, and the size in the header is the new size.
        backend.write(0, vec![7; 512].into(), WriteFlags::empty()).await.unwrap_err();
        drop(backend.close().await);
        image.disks().iter().for_each(|disk| disk.set_faults(Faults::default()));
        image.assert_sound(true, "after").await;
        let now = Held::by(&image, "after").await;
        assert_eq!(now.active, old.active[..usize::try_from(LITTLE).unwrap()]);
    });
}
