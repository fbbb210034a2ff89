//! Persistent bitmaps. Bitmaps record writes while an image is opened many times. After a power cut at any moment, each bitmap
//! is correct or marked as inconsistent. The tests fail if a bitmap is marked as consistent and misses a write.

use std::collections::BTreeMap;
use std::sync::Arc;

use oxblk_core::bitmap::DirtyBitmap;
use oxblk_core::check::{Finding, Fix};
use oxblk_core::{
    Backend, DriverTable, Graph, OpenFlags, Options, Perm, Permissions, Preallocation, Result,
    WriteFlags, ZeroFlags,
};
use oxblk_formats::qcow2::QCOW2;
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_ring::{IoBuf, IoBufMut};
use oxblk_tests::program::Program;
use oxblk_tests::random::Random;
use oxblk_tests::sim_disk::{self, Pace, SimFactory};

static DRIVERS: DriverTable = &[QCOW2, &SimFactory];

const MIB: u64 = 1 << 20;

/// Creates an image on a simulated disk.
fn image(seed: u64, options: &str, size: u64) -> Disk {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-o", options];
    Program::new("qemu-img").args(create).arg(&path).arg(size.to_string()).succeed();
    Disk::from_bytes(seed, &std::fs::read(&path).unwrap())
}

async fn open_as(disk: &Disk, flags: OpenFlags) -> Result<Backend> {
    let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
    graph.keep_open(sim_disk::add(&graph, "disk", disk, flags.read_only, Pace::AtOnce)?).unwrap();
    let options = Options::from_dotted("driver=qcow2,file=disk", None)?;
    let mut taken = Perm::CONSISTENT_READ;
    if !flags.read_only {
        taken |= Perm::WRITE | Perm::RESIZE;
    }
    let node = graph.open(options, flags).await?;
    Backend::new(&graph, "", Arc::clone(&node), Permissions::sharing_all(taken))
}

async fn open(disk: &Disk) -> Backend {
    let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
    open_as(disk, flags).await.unwrap()
}

async fn contents(disk: &Backend) -> Vec<u8> {
    let len = usize::try_from(disk.size()).unwrap();
    disk.read(0, IoBufMut::new(len)).await.unwrap().to_vec()
}

async fn write(disk: &Backend, offset: u64, len: u64, byte: u8) {
    let data = IoBuf::from(vec![byte; usize::try_from(len).unwrap()]);
    disk.write(offset, data, WriteFlags::empty()).await.unwrap();
}

async fn add(disk: &Backend, name: &str, granularity: u64) -> Arc<DirtyBitmap> {
    let node = disk.node().unwrap();
    let graph = disk.graph().clone();
    graph.add_persistent_bitmap(&node, name, Some(granularity)).await.unwrap()
}

async fn remove(disk: &Backend, name: &str) {
    let node = disk.node().unwrap();
    let bitmap = node.bitmaps().find(name).unwrap();
    disk.graph().clone().delete_bitmap(&node, &bitmap).await.unwrap();
}

fn all(disk: &Backend) -> Vec<Arc<DirtyBitmap>> {
    disk.node().unwrap().bitmaps().snapshot().to_vec()
}

fn dirty(bitmap: &DirtyBitmap) -> Vec<bool> {
    let map = bitmap.map();
    (0..map.granules()).map(|granule| map.get(granule * map.granularity())).collect()
}

/// Asserts that the driver's check finds no corruption, and no leaks unless `leaks` is set. Returns the number of leaks.
async fn assert_sound(disk: &Disk, leaks: bool, what: &str) {
    let flags = OpenFlags { check: true, read_only: true, ..OpenFlags::default() };
    let backend = open_as(disk, flags).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    let node = backend.node().unwrap();
    let report_finding = |finding: Finding| eprintln!("{finding}");
    let report = node.driver().check().unwrap().check(Fix::Nothing, &report_finding).await.unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}");
    assert!(leaks || report.leaks == 0, "{what}: {} leaks", report.leaks);
    drop(node);
    backend.close().await.unwrap();
}

fn assert_qemu_finds(disk: &Disk, leaks: bool, what: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), disk.bytes()).unwrap();
    let reply = Program::new("qemu-img").arg("check").arg(file.path()).run();
    let fine = reply.code() == 0 || leaks && reply.code() == 3;
    assert!(fine, "{what}: {}{}", reply.out(), reply.err());
}

/// The expected bitmaps of an image.
#[derive(Clone, Default)]
struct Model {
    size: u64,
    /// For each bitmap: the granularity, whether the bitmap is recording, and the sectors that must be dirty.
    bitmaps: BTreeMap<String, (u64, bool, Vec<bool>)>,
}

impl Model {
    fn mark(&mut self, offset: u64, len: u64) {
        for (_, records, sectors) in self.bitmaps.values_mut() {
            let range = offset / 512..(offset + len).div_ceil(512);
            if *records {
                let range =
                    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                sectors[range].fill(true);
            }
        }
    }

    fn resize(&mut self, size: u64) {
        self.size = size;
        for (_, _, sectors) in self.bitmaps.values_mut() {
            sectors.resize(usize::try_from(size / 512).unwrap(), false);
        }
    }

    /// Asserts that the bitmaps of the disk are exactly those of the model.
    fn assert_is(&self, disk: &Backend, what: &str) {
        let found = all(disk);
        let names: Vec<_> = found.iter().map(|bitmap| bitmap.name().to_owned()).collect();
        assert_eq!(found.len(), self.bitmaps.len(), "{what}: {names:?}");
        for bitmap in found {
            let (granularity, records, sectors) = &self.bitmaps[bitmap.name()];
            let what = format!("{what}: bitmap {}", bitmap.name());
            assert!(bitmap.is_persistent() && !bitmap.is_inconsistent(), "{what}");
            assert_eq!(bitmap.map().granularity(), *granularity, "{what}");
            assert_eq!(bitmap.is_recording(), *records, "{what}");
            let chunk = usize::try_from(granularity / 512).unwrap();
            let wanted: Vec<bool> =
                sectors.chunks(chunk).map(|granule| granule.contains(&true)).collect();
            assert!(dirty(&bitmap) == wanted, "{what}");
        }
    }

    async fn step(&mut self, disk: &Backend, random: &mut Random) {
        let offset = random.below(self.size / 512) * 512;
        let len = (512 * (1 + random.below(300))).min(self.size - offset);
        match random.below(14) {
            0..=4 => {
                write(disk, offset, len, 7).await;
                self.mark(offset, len);
            }
            5 => {
                disk.write_zeroes(offset, len, ZeroFlags::MAY_UNMAP).await.unwrap();
                self.mark(offset, len);
            }
            6 if self.bitmaps.len() < 6 => {
                let name = format!("bitmap {}", random.below(100));
                if !self.bitmaps.contains_key(&name) {
                    let granularity = 512 << random.below(9);
                    add(disk, &name, granularity).await;
                    let sectors = vec![false; usize::try_from(self.size / 512).unwrap()];
                    self.bitmaps.insert(name, (granularity, true, sectors));
                }
            }
            7 => {
                let size = (self.size / 512 + random.below(64)).saturating_sub(random.below(64));
                let size = size.max(1500) * 512;
                disk.resize(size, Preallocation::Off).await.unwrap();
                self.resize(size);
            }
            8 => disk.flush().await.unwrap(),
            choice if !self.bitmaps.is_empty() => {
                let at = usize::try_from(random.below(self.bitmaps.len() as u64)).unwrap();
                let name = self.bitmaps.keys().nth(at).unwrap().clone();
                let (node, graph) = (disk.node().unwrap(), disk.graph());
                let (_, records, sectors) = self.bitmaps.get_mut(&name).unwrap();
                match choice {
                    9 => {
                        remove(disk, &name).await;
                        self.bitmaps.remove(&name);
                    }
                    10 => {
                        graph.clear_bitmap(&node, &name).await.unwrap();
                        sectors.fill(false);
                    }
                    _ => {
                        *records = !*records;
                        graph.enable_bitmap(&node, &name, *records).await.unwrap();
                    }
                }
            }
            _ => {}
        }
    }
}

const OPTIONS: &[&str] =
    &["cluster_size=512", "cluster_size=4k,refcount_bits=8", "cluster_size=64k", "cluster_size=2M"];

#[test]
fn bitmaps_record_writes_while_an_image_is_opened_many_times() {
    for options in OPTIONS {
        for seed in 0..5 {
            let what = format!("{options}, seed {seed}");
            let disk = image(seed, options, 2 * MIB);
            sim::run(seed, async {
                let mut random = Random::new(seed);
                let mut model = Model { size: 2 * MIB, ..Model::default() };
                for _ in 0..5 {
                    let backend = open(&disk).await;
                    model.assert_is(&backend, &what);
                    for _ in 0..25 {
                        model.step(&backend, &mut random).await;
                    }
                    model.assert_is(&backend, &what);
                    backend.close().await.unwrap();
                    assert_sound(&disk, false, &what).await;
                    let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
                    let backend = open_as(&disk, flags).await.unwrap();
                    model.assert_is(&backend, &what);
                    backend.close().await.unwrap();
                }
            });
            assert_qemu_finds(&disk, false, &what);
        }
    }
}

/// Asserts that the disk after a power cut is allowed: each bitmap is inconsistent, or it covers every range that has changed
/// since the bitmap was created. When the bitmap was created, all bytes of the disk were zero.
async fn assert_no_lie(left: &Disk, what: &str) {
    let backend = open(left).await;
    let bytes = contents(&backend).await;
    for bitmap in all(&backend) {
        let what = format!("{what}: bitmap {}", bitmap.name());
        if bitmap.is_inconsistent() {
            continue;
        }
        let granularity = usize::try_from(bitmap.map().granularity()).unwrap();
        let dirty = dirty(&bitmap);
        match bitmap.name() {
            "frozen" => {
                let is_as_frozen = dirty.iter().enumerate().all(|(at, dirty)| *dirty == (at == 3));
                assert!(is_as_frozen && !bitmap.is_recording(), "{what}");
            }
            _ => {
                assert!(bitmap.is_recording(), "{what}");
                let granules = bytes.chunks(granularity).zip(&dirty).enumerate();
                for (at, (bytes, dirty)) in granules {
                    let changed = bytes.iter().any(|byte| *byte != 0);
                    assert!(*dirty || !changed, "{what}: granule {at} was written, and is clean");
                }
            }
        }
    }
    // Bitmaps can be removed and the disk can be written, for every state of the bitmaps.
    for bitmap in all(&backend) {
        if bitmap.is_inconsistent() {
            remove(&backend, bitmap.name()).await;
        }
    }
    write(&backend, 5 * 4096, 4096, 9).await;
    backend.close().await.unwrap();
    assert_sound(left, true, what).await;
    let backend = open(left).await;
    assert!(all(&backend).iter().all(|bitmap| !bitmap.is_inconsistent()), "{what}");
    backend.close().await.unwrap();
}

/// Opens an image five times, and adds, removes and uses bitmaps each time.
async fn five_openings(disk: &Disk, seed: u64) {
    let mut random = Random::new(seed);
    let backend = open(disk).await;
    add(&backend, "first", 4096).await;
    let frozen = add(&backend, "frozen", 65536).await;
    frozen.map().set(3 * 65536, 1);
    frozen.set_enabled(false);
    backend.close().await.unwrap();
    for opening in 0..4 {
        let backend = open(disk).await;
        for _ in 0..6 {
            let offset = random.below(2 * MIB / 512 - 64) * 512;
            write(&backend, offset, 512 * (1 + random.below(63)), 1 + opening).await;
            if random.one_in(3) {
                backend.flush().await.unwrap();
            }
        }
        match opening {
            // No bitmap is added after the first writes: `assert_no_lie` requires that all bytes of the disk are zero when a
            // bitmap is created.
            1 => remove(&backend, "first").await,
            2 => remove(&backend, "frozen").await,
            _ => {}
        }
        backend.close().await.unwrap();
    }
}

#[test]
fn after_a_power_cut_a_bitmap_is_correct_or_inconsistent() {
    for (options, seed) in [
        ("cluster_size=512", 1),
        ("cluster_size=4k", 2),
        ("cluster_size=64k,lazy_refcounts=off", 3),
    ] {
        let disk = image(seed, options, 2 * MIB);
        sim::run(seed, async {
            disk.keep_moments(seed, 50);
            five_openings(&disk, seed).await;
        });
        let moments = disk.moments();
        assert!(moments.len() > 40, "{}", moments.len());
        for (number, (boundary, moment)) in moments.iter().enumerate() {
            let some = [*boundary, !*boundary].map(|seed| moment.after_power_loss(seed));
            let ends = [moment.after_power_loss_none(), moment.after_power_loss_all()];
            for (kind, left) in some.into_iter().chain(ends).enumerate() {
                let what = format!("{options}: cut at {boundary}, disk {kind}");
                sim::run(seed, async {
                    assert_sound(&left, true, &what).await;
                    if (number + kind).is_multiple_of(25) {
                        assert_qemu_finds(&left, true, &what);
                    }
                    assert_no_lie(&left, &what).await;
                });
            }
        }
    }
}

#[test]
fn a_crash_while_bitmaps_are_tracked_makes_them_inconsistent_and_they_can_be_removed() {
    let disk = image(1, "cluster_size=4k", MIB);
    sim::run(1, async {
        let backend = open(&disk).await;
        add(&backend, "b", 4096).await;
        backend.close().await.unwrap();
        let backend = open(&disk).await;
        write(&backend, 0, 4096, 1).await;
        // The image is not closed.
        let left = disk.after_power_loss_all();
        let again = open(&left).await;
        let bitmap = again.node().unwrap().bitmaps().find("b").unwrap();
        assert!(bitmap.is_inconsistent() && !bitmap.is_recording());
        let refused = again.resize(2 * MIB, Preallocation::Off).await.unwrap_err();
        assert_eq!(refused.to_string(), "Bitmap 'b' is inconsistent and cannot be used");
        remove(&again, "b").await;
        again.resize(2 * MIB, Preallocation::Off).await.unwrap();
        again.close().await.unwrap();
        assert_sound(&left, false, "removed").await;
        backend.close().await.unwrap();
    });
}

#[test]
fn reopening_between_writable_and_read_only_keeps_bitmaps_correct() {
    let disk = image(1, "cluster_size=4k", MIB);
    sim::run(1, async {
        let backend = open(&disk).await;
        add(&backend, "b", 4096).await;
        for round in 0..4_u64 {
            write(&backend, round * 8192, 4096, 1).await;
            let in_use = disk.after_power_loss_all();
            reopen(&backend, true).await;
            // The image on disk is complete at this moment, although it has not been closed.
            let other = open(&disk.after_power_loss_none()).await;
            let bitmap = other.node().unwrap().bitmaps().find("b").unwrap();
            assert_eq!(bitmap.map().dirty_granules(), round + 1);
            other.close().await.unwrap();
            let bitmap = backend.node().unwrap().bitmaps().find("b").unwrap();
            assert!(bitmap.is_read_only());
            reopen(&backend, false).await;
            assert!(!bitmap.is_read_only());
            for left in [in_use, disk.after_power_loss_none()] {
                let other = open(&left).await;
                // The first of these writes has not reached the disk yet.
                let mut bitmaps = all(&other).into_iter();
                assert!(bitmaps.all(|bitmap| bitmap.is_inconsistent()));
                other.close().await.unwrap();
            }
        }
        backend.close().await.unwrap();
        assert_sound(&disk, false, "at the end").await;
    });
}

/// Returns the offset of the bitmap directory in the header.
fn directory_offset(disk: &Disk) -> u64 {
    let bytes = disk.bytes();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let at = (104..512).step_by(8).find(|at| word(*at) == 0x2385_2875_0000_0018).unwrap();
    word(at + 24)
}

#[test]
fn a_bitmap_can_be_removed_on_a_full_disk() {
    let disk = image(1, "cluster_size=4k", MIB);
    sim::run(1, async {
        let backend = open(&disk).await;
        for name in ["one", "two", "three"] {
            add(&backend, name, 4096).await;
        }
        write(&backend, 0, MIB, 1).await;
        backend.close().await.unwrap();
        // The file cannot grow, and no cluster in it is free.
        let end = disk.len();
        let full = [FaultOp::Write, FaultOp::Fallocate].map(|op| {
            let range = Some(end..u64::MAX);
            FailRule { op, nth: None, range, errno: 28, once: false }
        });
        disk.set_faults(Faults { fail: full.to_vec(), ..Faults::default() });
        let backend = open(&disk).await;
        let before = directory_offset(&disk);
        remove(&backend, "two").await;
        assert_eq!(
            directory_offset(&disk),
            before,
            "the directory was written elsewhere, so the disk was not full"
        );
        assert!(backend.node().unwrap().bitmaps().find("two").is_err());
        let closed = backend.close().await;
        disk.set_faults(Faults::default());
        assert_sound(&disk, true, "full").await;
        let backend = open(&disk).await;
        let names: Vec<_> = all(&backend).iter().map(|b| b.name().to_owned()).collect();
        assert_eq!(names, ["three", "one"]);
        // The close stored the bitmaps, or returned an error.
        let kept = all(&backend).iter().all(|bitmap| !bitmap.is_inconsistent());
        assert_eq!(kept, closed.is_ok());
        backend.close().await.unwrap();
        assert_sound(&disk, true, "at the end").await;
    });
}

#[test]
fn bitmaps_that_cannot_be_stored_are_reported_and_no_other_data_is_lost() {
    for nth in 1..60 {
        let disk = image(1, "cluster_size=4k", MIB);
        sim::run(1, async {
            let backend = open(&disk).await;
            add(&backend, "one", 512).await;
            write(&backend, 0, MIB / 2, 1).await;
            backend.flush().await.unwrap();
            let fault =
                FailRule { op: FaultOp::Any, nth: Some(nth), range: None, errno: 5, once: false };
            disk.set_faults(Faults { fail: vec![fault], ..Faults::default() });
            let closed = backend.close().await;
            disk.set_faults(Faults::default());
            let what = format!("from operation {nth} on nothing is written");
            assert_sound(&disk, true, &what).await;
            let backend = open(&disk).await;
            assert!(contents(&backend).await[..512 << 10].iter().all(|byte| *byte == 1), "{what}");
            let found = all(&backend);
            assert!(closed.is_err() || found.len() == 1, "{what}");
            for bitmap in found.iter().filter(|bitmap| !bitmap.is_inconsistent()) {
                assert_eq!(bitmap.map().count(), MIB / 2, "{what}");
            }
            backend.close().await.unwrap();
            assert_sound(&disk, true, &what).await;
        });
    }
}

async fn reopen(disk: &Backend, read_only: bool) {
    let mut options = Options::new();
    options.insert("read-only", read_only);
    disk.reopen(options).await.unwrap();
}

#[test]
fn an_image_whose_bitmaps_another_program_changed_does_not_become_writable() {
    let disk = image(1, "cluster_size=4k", MIB);
    sim::run(1, async {
        let backend = open(&disk).await;
        add(&backend, "b", 4096).await;
        backend.close().await.unwrap();
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        graph
            .keep_open(sim_disk::add(&graph, "disk", &disk, false, Pace::AtOnce).unwrap())
            .unwrap();
        let options = Options::from_dotted("driver=qcow2,file=disk", None).unwrap();
        let node = graph.open(options, flags).await.unwrap();
        let reader = Permissions::sharing_all(Perm::CONSISTENT_READ);
        let reader = Backend::new(&graph, "", node, reader).unwrap();
        let other = open(&disk).await;
        let bitmap = other.node().unwrap().bitmaps().find("b").unwrap();
        bitmap.map().set(0, 1);
        other.close().await.unwrap();
        let mut options = Options::new();
        options.insert("read-only", false);
        let refused = reader.reopen(options).await.unwrap_err();
        assert_eq!(refused.to_string(), "Image was changed while it was open read-only");
        reader.close().await.unwrap();
    });
}

#[test]
fn applying_a_snapshot_marks_the_entire_bitmap_dirty() {
    let disk = image(1, "cluster_size=4k", MIB);
    sim::run(1, async {
        let backend = open(&disk).await;
        let info = oxblk_core::snapshot::SnapshotInfo::default();
        backend.create_snapshot(&info).await.unwrap();
        add(&backend, "b", 4096).await;
        backend.apply_snapshot("1").await.unwrap();
        backend.close().await.unwrap();
        let backend = open(&disk).await;
        let bitmap = backend.node().unwrap().bitmaps().find("b").unwrap();
        assert_eq!(bitmap.map().dirty_granules(), 256);
        backend.close().await.unwrap();
        assert_sound(&disk, false, "after the snapshot").await;
    });
}

#[test]
fn a_repair_that_must_remove_the_bitmap_directory_reports_each_bitmap() {
    let disk = image(1, "cluster_size=4k", MIB);
    sim::run(1, async {
        let backend = open(&disk).await;
        for name in ["broken", "healthy"] {
            add(&backend, name, 4096).await;
        }
        write(&backend, 0, 4096, 1).await;
        backend.close().await.unwrap();
        let directory = directory_offset(&disk);
        let mut bytes = disk.bytes();
        let word = |at: u64| {
            let at = usize::try_from(at).unwrap();
            u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        let l2 = usize::try_from(word(word(40)) & 0x00ff_ffff_ffff_fe00).unwrap();
        // The second guest cluster is the cluster of the directory.
        bytes[l2 + 8..l2 + 16].copy_from_slice(&directory.to_be_bytes());
        // The bitmap is of an unknown type.
        let entry = usize::try_from(directory).unwrap();
        let names = String::from_utf8_lossy(&bytes[entry..entry + 64]).into_owned();
        let broken = if names.find("broken") < names.find("healthy") { entry } else { entry + 32 };
        bytes[broken + 16] = 9;
        let disk = Disk::from_bytes(1, &bytes);
        let flags = OpenFlags { check: true, ..OpenFlags::default() };
        let backend = open_as(&disk, flags).await.unwrap();
        let node = backend.node().unwrap();
        let lines = std::cell::RefCell::new(String::new());
        let say = |finding: Finding| lines.borrow_mut().push_str(&format!("{finding}\n"));
        let check = node.driver().check().unwrap();
        let report = check.check(Fix::All, &say).await.unwrap();
        let lines = lines.into_inner();
        for name in ["broken", "healthy"] {
            let line = format!("Repairing bitmap '{name}' by removing it");
            assert!(lines.contains(&line), "{name}: {lines}");
        }
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{lines}");
        assert_sound(&disk, report.leaks > 0, &lines).await;
        drop(node);
        backend.close().await.unwrap();
    });
}
