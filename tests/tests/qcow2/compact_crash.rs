//! Power cuts at every write boundary of a compaction, and failing operations of the disk. In all cases, the image opens, has
//! at worst leaks, and keeps its contents, including bitmaps and snapshots.

use std::collections::BTreeMap;
use std::sync::Arc;

use oxblk_core::amend::AmendRequest;
use oxblk_core::{
    Backend, DriverTable, Graph, OpenFlags, Options, Perm, Permissions, Secrets, WriteFlags,
    ZeroFlags,
};
use oxblk_crypto::secret::Secret;
use oxblk_formats::qcow2::QCOW2;
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_ring::{IoBuf, IoBufMut, spawn};
use oxblk_tests::host_clusters;
use oxblk_tests::sim_disk::{self, Pace, SimFactory};
use oxblk_tests::sim_image::check_sound;

use super::compact_against_qemu::{
    Image as Made, encrypted, luks_header, put_luks_header_at_the_end,
};

static DRIVERS: DriverTable = &[QCOW2, &SimFactory];

const KIB: u64 = 1 << 10;

/// The secrets that open encrypted images.
fn secrets() -> Secrets {
    let secrets = Secrets::default();
    for (id, password) in [("key", "abc"), ("new", "def")] {
        secrets.add(id, Secret::from_slice(password.as_bytes())).unwrap();
    }
    secrets
}

/// An image on simulated disks.
#[derive(Clone)]
struct Image {
    disk: Disk,
    data: Option<Disk>,
    /// The options that open the image.
    options: &'static str,
}

impl Image {
    /// Copies an image of QEMU's tools to simulated disks.
    fn of(made: &Made, options: &'static str) -> Self {
        let bytes = std::fs::read(made.path()).unwrap();
        let data = std::fs::read(made.directory.path().join("image.data")).ok();
        let data = data.map(|bytes| Disk::from_bytes(2, &bytes));
        Self { disk: Disk::from_bytes(1, &bytes), data, options }
    }

    /// Returns the same image on another disk, for example one after a power cut.
    fn left(&self, disk: Disk) -> Self {
        let data = self.data.as_ref().map(|data| Disk::from_bytes(3, &data.bytes()));
        Self { disk, data, options: self.options }
    }

    async fn open_as(&self, flags: OpenFlags) -> Backend {
        let graph = Graph::with_secrets(DRIVERS, oxblk_core::Gate::Anything, secrets());
        let read_only = flags.read_only;
        graph
            .keep_open(sim_disk::add(&graph, "disk", &self.disk, read_only, Pace::AtOnce).unwrap())
            .unwrap();
        let mut options = format!("driver=qcow2,file=disk{}", self.options);
        if let Some(data) = &self.data {
            graph
                .keep_open(sim_disk::add(&graph, "data", data, read_only, Pace::AtOnce).unwrap())
                .unwrap();
            options.push_str(",data-file=data");
        }
        let options = Options::from_dotted(&options, None).unwrap();
        let node = graph.open(options, flags).await.unwrap();
        let mut taken = Perm::CONSISTENT_READ;
        if !read_only {
            taken |= Perm::WRITE | Perm::RESIZE;
        }
        Backend::new(&graph, "", Arc::clone(&node), Permissions::sharing_all(taken)).unwrap()
    }

    async fn open(&self) -> Backend {
        self.open_as(OpenFlags { unmap: true, ..OpenFlags::default() }).await
    }

    async fn assert_sound(&self, leaks: bool, what: &str) {
        let backend = self.open_as(OpenFlags { check: true, ..OpenFlags::default() }).await;
        check_sound(&backend, leaks, what).await;
        backend.close().await.unwrap();
    }

    /// Returns a field of the header.
    fn word(&self, at: usize) -> u64 {
        word(&self.disk.bytes(), at)
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The contents of an image.
#[derive(PartialEq)]
struct Held {
    active: Vec<u8>,
    snapshots: Vec<Vec<u8>>,
    /// The offsets of the dirty granules of each bitmap.
    bitmaps: BTreeMap<String, Vec<u64>>,
}

async fn contents(disk: &Backend) -> Vec<u8> {
    let len = usize::try_from(disk.size()).unwrap();
    disk.read(0, IoBufMut::new(len)).await.unwrap().to_vec()
}

impl Held {
    /// Examines a copy of the image. The in-use marks of bitmaps are removed first.
    async fn by(image: &Image) -> Self {
        let copy = image.left(Disk::from_bytes(4, &without_marks(image.disk.bytes())));
        let backend = copy.open().await;
        let active = contents(&backend).await;
        let mut bitmaps = BTreeMap::new();
        for bitmap in backend.node().unwrap().bitmaps().snapshot().iter() {
            assert!(!bitmap.is_inconsistent(), "bitmap {}", bitmap.name());
            let map = bitmap.map();
            let granules = (0..map.granules()).map(|granule| granule * map.granularity());
            let dirty = granules.filter(|offset| map.get(*offset)).collect();
            bitmaps.insert(bitmap.name().to_owned(), dirty);
        }
        let mut snapshots = Vec::new();
        if image.data.is_none() {
            for snapshot in backend.snapshots().await.unwrap() {
                backend.apply_snapshot(&snapshot.id).await.unwrap();
                snapshots.push(contents(&backend).await);
            }
        }
        backend.close().await.unwrap();
        Self { active, snapshots, bitmaps }
    }
}

/// Returns the offset of the bitmap directory and the number of bitmaps in the header.
fn directory(bytes: &[u8]) -> Option<(usize, u64)> {
    let mut places = (104..512).step_by(8);
    let at = places.find(|at| word(bytes, *at) == 0x2385_2875_0000_0018)?;
    Some((usize::try_from(word(bytes, at + 24)).unwrap(), word(bytes, at + 8) >> 32))
}

/// Returns the offset of each bitmap's table.
fn bitmap_tables(bytes: &[u8]) -> Vec<u64> {
    let mut tables = Vec::new();
    let mut bytes = bytes.to_vec();
    for_each_bitmap(&mut bytes, |entry| tables.push(word(entry, 0)));
    tables
}

fn for_each_bitmap(bytes: &mut [u8], mut each: impl FnMut(&mut [u8])) {
    let Some((mut at, count)) = directory(bytes) else { return };
    for _ in 0..count {
        each(&mut bytes[at..]);
        let name = usize::from(u16::from_be_bytes([bytes[at + 18], bytes[at + 19]]));
        at += (24 + name).next_multiple_of(8);
    }
}

fn without_marks(mut bytes: Vec<u8>) -> Vec<u8> {
    for_each_bitmap(&mut bytes, |entry| entry[15] &= !1);
    bytes
}

/// Returns the offsets of the compressed data of the active disk state.
fn compressed(bytes: &[u8]) -> Vec<u64> {
    let bits = u32::from_be_bytes(bytes[20..24].try_into().unwrap());
    let entries = usize::try_from(u32::from_be_bytes(bytes[36..40].try_into().unwrap())).unwrap();
    let offset = |word: u64| usize::try_from(word & 0x00ff_ffff_ffff_fe00).unwrap();
    let l1 = offset(word(bytes, 40));
    let tables = (0..entries).map(|index| offset(word(bytes, l1 + index * 8)));
    let words = tables.filter(|table| *table != 0).flat_map(|table| {
        (0..(1_usize << bits) / 8).map(move |index| word(bytes, table + index * 8))
    });
    let words = words.filter(|word| word & (1 << 62) != 0);
    words.map(|word| word & ((1 << (62 - (bits - 8))) - 1)).collect()
}

/// Compacts an image, and examines the disks that a power cut may leave at every write boundary of the compaction. Returns the
/// compacted image.
async fn cut_at_every_boundary(image: &Image, what: &str) -> Image {
    let held = Held::by(image).await;
    let done = image.left(Disk::from_bytes(5, &image.disk.bytes()));
    let before = done.disk.write_boundaries();
    done.disk.keep_moments(1, usize::MAX);
    let backend = done.open().await;
    let outcome = backend.compact(64 << 10, &|_, _| true).await.unwrap();
    assert_eq!(outcome.obstacle, None, "{what}");
    assert!(outcome.moved > 0, "{what}");
    backend.close().await.unwrap();
    assert_eq!(outcome.length.1, done.disk.len(), "{what}: the length after closing");
    let moments = done.disk.moments();
    assert_eq!(moments.len() as u64, done.disk.write_boundaries() - before);
    assert!(moments.len() > 10, "{what}: {}", moments.len());
    assert!(Held::by(&done).await == held, "{what}");
    done.assert_sound(false, what).await;
    for (boundary, moment) in moments {
        let disks = [
            moment.after_power_loss_none(),
            moment.after_power_loss_all(),
            moment.after_power_loss(boundary),
        ];
        for (number, disk) in disks.into_iter().enumerate() {
            let what = format!("{what}: cut at {boundary}, disk {number}");
            let left = image.left(disk);
            left.assert_sound(true, &what).await;
            assert!(Held::by(&left).await == held, "{what}");
            if (boundary + number as u64).is_multiple_of(16) {
                let backend = left.open().await;
                backend.compact(1 << 20, &|_, _| true).await.unwrap();
                backend.close().await.unwrap();
                left.assert_sound(true, &what).await;
                assert!(contents(&left.open().await).await == held.active, "{what}");
            }
        }
    }
    done
}

#[test]
fn moved_bitmaps_keep_their_bits() {
    let made = Made::new("cluster_size=512", "4M");
    made.io(&["write -P 7 0 256k"]);
    for (name, granularity) in [("one", "512"), ("two", "4096"), ("three", "512")] {
        made.img(&["bitmap", "--add", "-g", granularity, "image", name]);
        made.io(&["write -P 8 1M 20k", "write -P 9 3M 3k"]);
        made.img(&["bitmap", "--disable", "image", name]);
    }
    made.img(&["bitmap", "--enable", "image", "three"]);
    made.io(&["write -P 10 2M 3k"]);
    let image = Image::of(&made, "");
    sim::run(1, async {
        // Unchanged bitmaps of a compacted image are not rewritten. Free clusters in front of the bitmaps, so that the next
        // compaction moves the bitmaps.
        let backend = image.open().await;
        backend.compact(64 << 10, &|_, _| true).await.unwrap();
        backend.write_zeroes(0, 256 * KIB, ZeroFlags::MAY_UNMAP).await.unwrap();
        backend.write(0, IoBuf::from(vec![1; 512]), WriteFlags::empty()).await.unwrap();
        backend.close().await.unwrap();
        let before = bitmap_tables(&image.disk.bytes());
        let done = cut_at_every_boundary(&image, "bitmaps").await;
        let after = bitmap_tables(&done.disk.bytes());
        let moved = before.iter().zip(&after).filter(|(before, after)| after < before).count();
        assert!(moved >= 2 && before.len() == 3, "{before:?} -> {after:?}");
    });
}

#[test]
fn the_refcount_table_moves() {
    let made = Made::new("cluster_size=4k", "1M");
    made.io(&["write -P 7 0 200k", "write -P 8 512k 20k", "discard 0 200k"]);
    let mut bytes = std::fs::read(made.path()).unwrap();
    host_clusters::put_at_the_end(&mut bytes, 48, 4 << 10);
    std::fs::write(made.path(), bytes).unwrap();
    let image = Image::of(&made, "");
    sim::run(1, async {
        let done = cut_at_every_boundary(&image, "a refcount table").await;
        let (before, after) = (image.word(48), done.word(48));
        assert!(after < before && before > 200 << 10, "{before:#x} -> {after:#x}");
    });
}

/// Creates an image whose front is free and whose end has compressed data.
fn with_compressed_data(options: &str) -> Made {
    let made = Made::new(options, "1M");
    made.io(&["write -P 7 0 300k"]);
    made.img(&["snapshot", "-c", "zero", "image"]);
    made.io(&["discard 0 300k"]);
    made.write_mixed("write -c", 1, 512 * KIB, 256 * KIB);
    made
}

fn assert_compressed_data_moved(before: &Image, after: &Image, what: &str) {
    let hosts = [before, after].map(|image| compressed(&image.disk.bytes()));
    assert!(!hosts[0].is_empty() && hosts[0].len() == hosts[1].len(), "{what}");
    let moved = hosts[0].iter().zip(&hosts[1]).filter(|(before, after)| after < before).count();
    assert!(moved * 2 > hosts[0].len(), "{what}: {moved} of {}", hosts[0].len());
}

#[test]
fn compressed_data_moves() {
    for cluster in ["4k", "64k"] {
        let made = with_compressed_data(&format!("cluster_size={cluster}"));
        made.img(&["snapshot", "-d", "zero", "image"]);
        let image = Image::of(&made, "");
        let what = format!("compressed data, clusters of {cluster}");
        sim::run(1, async {
            let done = cut_at_every_boundary(&image, &what).await;
            assert_compressed_data_moved(&image, &done, &what);
        });
    }
}

#[test]
fn compressed_data_that_snapshots_share_moves() {
    let made = with_compressed_data("cluster_size=4k");
    made.img(&["snapshot", "-c", "one", "image"]);
    made.io(&["discard 600k 40k", "discard 700k 20k"]);
    made.write_mixed("write -c", 2, 600 * KIB, 40 * KIB);
    made.img(&["snapshot", "-c", "two", "image"]);
    made.io(&["discard 620k 40k"]);
    made.write_mixed("write -c", 3, 620 * KIB, 40 * KIB);
    made.io(&["write -P 9 560k 8k"]);
    made.img(&["snapshot", "-d", "zero", "image"]);
    let image = Image::of(&made, "");
    sim::run(1, async {
        let done = cut_at_every_boundary(&image, "snapshots").await;
        assert_compressed_data_moved(&image, &done, "snapshots");
    });
}

#[test]
fn the_metadata_of_an_image_with_a_data_file_moves() {
    let made = Made::new("cluster_size=512,data_file=image.data", "4M");
    made.img(&["bitmap", "--add", "-g", "512", "image", "big"]);
    made.io(&["write -P 7 0 1k", "write -P 8 1M 300k", "write -P 9 3M 100k"]);
    made.img(&["bitmap", "--remove", "image", "big"]);
    let image = Image::of(&made, "");
    sim::run(1, async {
        let done = cut_at_every_boundary(&image, "a data file").await;
        assert!(done.disk.len() < image.disk.len());
    });
}

#[test]
fn an_image_with_lazy_refcounts_is_compacted() {
    for (create, options) in [
        (",lazy_refcounts=on", ""),
        ("", ",lazy-refcounts=on"),
        (",lazy_refcounts=on", ",lazy-refcounts=off"),
    ] {
        let what = format!("lazy refcounts: {create} {options}");
        let made = with_compressed_data(&format!("cluster_size=4k{create}"));
        made.io(&["write -P 8 800k 64k"]);
        made.img(&["snapshot", "-d", "zero", "image"]);
        let image = Image::of(&made, options);
        sim::run(1, async {
            let done = cut_at_every_boundary(&image, &what).await;
            assert_compressed_data_moved(&image, &done, &what);
        });
    }
}

const WITH_KEY: &str = ",encrypt.key-secret=key";

fn with_luks_header_at_the_end() -> Image {
    let made = encrypted("cluster_size=4k", "1M");
    made.io(&["write -P 8 512k 64k"]);
    put_luks_header_at_the_end(&made);
    Image::of(&made, WITH_KEY)
}

#[test]
fn the_luks_header_moves() {
    let image = with_luks_header_at_the_end();
    sim::run(1, async {
        let done = cut_at_every_boundary(&image, "LUKS").await;
        let [before, after] = [&image, &done].map(|image| luks_header(&image.disk.bytes()));
        assert!(after.1 < before.1 && after.2 == before.2, "{before:?} -> {after:?}");
    });
}

#[test]
fn a_password_that_is_added_while_the_luks_header_moves_is_not_lost() {
    let image = with_luks_header_at_the_end();
    for seed in 0..4 {
        let image = image.left(Disk::from_bytes(seed, &image.disk.bytes()));
        sim::run(seed, async {
            let backend = image.open().await;
            let user = backend.clone();
            let adding = spawn(async move {
                let add = "encrypt.state=active,encrypt.new-secret=new,encrypt.iter-time=1";
                let options = Options::from_dotted(add, None).unwrap();
                let request = AmendRequest { options, force: false, progress: Box::new(|_, _| ()) };
                user.amend(request).await.unwrap();
            });
            backend.compact(64 << 10, &|_, _| true).await.unwrap();
            adding.await;
            backend.close().await.unwrap();
        });
        for options in [WITH_KEY, ",encrypt.key-secret=new"] {
            let image = Image { options, ..image.clone() };
            sim::run(seed, async {
                let backend = image.open().await;
                assert!(contents(&backend).await[512 << 10..576 << 10].iter().all(|b| *b == 8));
                backend.close().await.unwrap();
                image.assert_sound(false, "with another password").await;
            });
        }
    }
}

/// Repeats a compaction; each time another operation fails, once. After the failure, the image still works, or refuses all
/// requests.
async fn fail_each_operation(image: &Image, what: &str) {
    let held = Held::by(image).await;
    for op in [FaultOp::Write, FaultOp::Sync, FaultOp::Read, FaultOp::Truncate] {
        let mut fine = 0;
        for nth in 1.. {
            let what = format!("{what}: {op:?} {nth} fails");
            let tried = image.left(Disk::from_bytes(6, &image.disk.bytes()));
            let backend = tried.open().await;
            let rule = FailRule { op, nth: Some(nth), range: None, errno: 5, once: true };
            tried.disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
            let failed = backend.compact(64 << 10, &|_, _| true).await.is_err();
            tried.disk.set_faults(Faults::default());
            let read = backend.read(0, IoBufMut::new(held.active.len())).await;
            assert!(read.map_or(failed, |read| read[..] == held.active[..]), "{what}");
            let written = backend.write(0, IoBuf::from(vec![3; 512]), WriteFlags::empty()).await;
            let again = backend.compact(64 << 10, &|_, _| true).await;
            assert!(failed || written.is_ok() && again.is_ok(), "{what}");
            backend.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
            tried.assert_sound(true, &what).await;
            let mut now = Held::by(&tried).await;
            if written.is_ok() {
                assert_eq!(now.active[..512], [3; 512], "{what}");
                now.active[..512].copy_from_slice(&held.active[..512]);
            }
            assert!(now == held, "{what}");
            // If a read of many tables fails, the driver reads each table separately.
            fine = if failed { 0 } else { fine + 1 };
            if fine == 4 {
                assert!(nth > fine, "{what}: no {op:?} fails");
                break;
            }
        }
    }
}

#[test]
fn a_failed_operation_causes_at_worst_leaks() {
    let made = with_compressed_data("cluster_size=4k");
    made.img(&["snapshot", "-c", "one", "image"]);
    made.io(&["write -P 9 560k 8k"]);
    made.img(&["snapshot", "-d", "zero", "image"]);
    made.img(&["bitmap", "--add", "-g", "512", "image", "one"]);
    made.io(&["write -P 9 900k 4k"]);
    made.img(&["bitmap", "--disable", "image", "one"]);
    let mut bytes = std::fs::read(made.path()).unwrap();
    host_clusters::put_at_the_end(&mut bytes, 48, 4 << 10);
    std::fs::write(made.path(), bytes).unwrap();
    let image = Image::of(&made, "");
    sim::run(1, fail_each_operation(&image, "a mixture"));
}

#[test]
fn an_operation_that_fails_while_the_luks_header_moves_leaves_an_image_that_opens() {
    let image = with_luks_header_at_the_end();
    sim::run(1, fail_each_operation(&image, "LUKS"));
}

#[test]
fn a_failed_move_of_the_luks_header_leaves_no_copy_of_the_keys() {
    let image = with_luks_header_at_the_end();
    let place = |image: &Image| luks_header(&image.disk.bytes()).1;
    let copies = |bytes: &[u8]| -> Vec<usize> {
        let found = bytes.windows(6).enumerate();
        found.filter(|(_, bytes)| *bytes == b"LUKS\xba\xbe").map(|(at, _)| at).collect()
    };
    // `put_luks_header_at_the_end` has left the keys in the old clusters.
    let mut bytes = image.disk.bytes();
    let len = luks_header(&bytes).2;
    for at in copies(&bytes).into_iter().filter(|at| *at != place(&image)) {
        bytes[at..at + len].fill(0);
    }
    let image = image.left(Disk::from_bytes(5, &bytes));
    let mut failures = 0;
    for op in [FaultOp::Write, FaultOp::Sync, FaultOp::Read] {
        let mut fine = 0;
        for nth in 1.. {
            let tried = image.left(Disk::from_bytes(6, &image.disk.bytes()));
            let failed = sim::run(nth, async {
                let backend = tried.open().await;
                let rule = FailRule { op, nth: Some(nth), range: None, errno: 5, once: true };
                tried.disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
                let failed = backend.compact(64 << 10, &|_, _| true).await.is_err();
                tried.disk.set_faults(Faults::default());
                backend.close().await.unwrap();
                failed
            });
            if failed && place(&tried) == place(&image) {
                failures += 1;
                let left = copies(&tried.disk.bytes());
                assert_eq!(left, [place(&image)], "{op:?} {nth} fails");
            }
            fine = if failed { 0 } else { fine + 1 };
            if fine == 4 {
                break;
            }
        }
    }
    assert!(failures > 8, "only {failures} operations failed before the header had moved");
}
