//! Internal snapshots keep the contents of the disk from the moment at which they were taken, during all later operations. A
//! power cut during a change leaves the old or the new state.

use std::collections::BTreeMap;
use std::time::Duration;

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, Preallocation, WriteFlags, ZeroFlags};
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_ring::{IoBuf, IoBufMut};
use oxblk_tests::program::Program;
use oxblk_tests::random::Random;
use oxblk_tests::sim_image::{self, assert_sound, open};

const MIB: u64 = 1 << 20;

async fn contents(disk: &Backend) -> Vec<u8> {
    let len = usize::try_from(disk.size()).unwrap();
    disk.read(0, IoBufMut::new(len)).await.unwrap().to_vec()
}

fn named(name: &str) -> SnapshotInfo {
    SnapshotInfo { name: name.to_owned(), ..SnapshotInfo::default() }
}

/// The contents of the disk, and of each snapshot by its id.
#[derive(Clone, Default)]
struct Model {
    now: Vec<u8>,
    kept: BTreeMap<String, Vec<u8>>,
}

impl Model {
    async fn step(&mut self, disk: &Backend, random: &mut Random, resizes: bool) {
        let size = self.now.len() as u64;
        let offset = random.below(size);
        let len = (1 + random.below(size / 4)).min(size - offset);
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
        let pick = |random: &mut Random, model: &Self| {
            let at = usize::try_from(random.below(model.kept.len() as u64)).unwrap();
            model.kept.keys().nth(at).unwrap().clone()
        };
        match random.below(12) {
            0..=4 => {
                let byte = u8::try_from(1 + random.below(255)).unwrap();
                let data = IoBuf::from(vec![byte; range.len()]);
                disk.write(offset, data, WriteFlags::empty()).await.unwrap();
                self.now[range].fill(byte);
            }
            5 => {
                disk.write_zeroes(offset, len, ZeroFlags::MAY_UNMAP).await.unwrap();
                self.now[range].fill(0);
            }
            6 => disk.flush().await.unwrap(),
            7 if self.kept.len() < 5 => {
                disk.create_snapshot(&named("some")).await.unwrap();
                let id = disk.snapshots().await.unwrap().last().unwrap().id.clone();
                assert!(self.kept.insert(id, self.now.clone()).is_none());
            }
            8 if resizes => {
                let size = (size / 512 + random.below(64)).saturating_sub(random.below(64)).max(64);
                disk.resize(size * 512, Preallocation::Off).await.unwrap();
                self.now.resize(usize::try_from(size * 512).unwrap(), 0);
            }
            9 | 10 if !self.kept.is_empty() => {
                let id = pick(random, self);
                disk.apply_snapshot(&id).await.unwrap();
                self.now = self.kept[&id].clone();
            }
            11 if !self.kept.is_empty() => {
                let id = pick(random, self);
                disk.delete_snapshot(&id).await.unwrap();
                self.kept.remove(&id);
            }
            _ => assert!(contents(disk).await == self.now),
        }
    }

    /// Asserts the contents of the disk and of all snapshots. Applies the snapshots, so the active disk state changes.
    async fn assert_holds(&self, disk: &Backend, what: &str) {
        assert!(contents(disk).await == self.now, "{what}: the active state");
        let ids: Vec<_> = disk.snapshots().await.unwrap().into_iter().map(|one| one.id).collect();
        let kept: Vec<_> = self.kept.keys().cloned().collect();
        let mut sorted = ids.clone();
        sorted.sort();
        assert_eq!(sorted, kept, "{what}");
        for id in ids {
            disk.apply_snapshot(&id).await.unwrap();
            assert!(contents(disk).await == self.kept[&id], "{what}: snapshot {id}");
        }
    }
}

const OPTIONS: &[(&str, bool)] = &[
    ("cluster_size=512", true),
    ("cluster_size=4k,refcount_bits=8", true),
    ("cluster_size=64k", true),
    ("compat=0.10,cluster_size=4k", false),
];

#[test]
fn snapshots_keep_their_contents_during_all_later_operations() {
    for (options, resizes) in OPTIONS {
        for seed in 0..6 {
            let what = format!("{options}, seed {seed}");
            let disk = sim_image::new(seed, options, MIB);
            let model = sim::run(seed, async {
                let mut random = Random::new(seed);
                let mut model = Model { now: vec![0; 1 << 20], ..Model::default() };
                for _ in 0..4 {
                    let backend = open(&disk, false).await.unwrap();
                    for _ in 0..30 {
                        model.step(&backend, &mut random, *resizes).await;
                    }
                    backend.close().await.unwrap();
                    assert_sound(&disk, false, &what).await;
                }
                model
            });
            let path = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(path.path(), disk.bytes()).unwrap();
            Program::new("qemu-img").arg("check").arg(path.path()).succeed();
            sim::run(seed, async {
                let backend = open(&disk, false).await.unwrap();
                model.assert_holds(&backend, &what).await;
                backend.close().await.unwrap();
                assert_sound(&disk, false, &what).await;
            });
        }
    }
}

/// Creates an image with two snapshots and returns its model.
async fn prepared(disk: &Disk) -> Model {
    let backend = open(disk, false).await.unwrap();
    let mut model = Model { now: vec![0; 1 << 20], ..Model::default() };
    for (id, byte, range) in [("1", 1, 0..300_000), ("2", 2, 200_000..700_000)] {
        let data = IoBuf::from(vec![byte; range.len()]);
        backend.write(range.start as u64, data, WriteFlags::empty()).await.unwrap();
        model.now[range].fill(byte);
        backend.create_snapshot(&named("one")).await.unwrap();
        model.kept.insert(id.to_owned(), model.now.clone());
    }
    backend.write(100_000, IoBuf::from(vec![3; 400_000]), WriteFlags::empty()).await.unwrap();
    model.now[100_000..500_000].fill(3);
    backend.close().await.unwrap();
    model
}

#[test]
fn a_power_cut_leaves_the_old_state_or_the_new() {
    for (options, seed) in [("cluster_size=4k", 1), ("cluster_size=512", 2), ("", 3)] {
        let options = if options.is_empty() { "cluster_size=64k" } else { options };
        for change in ["create", "apply", "delete"] {
            let disk = sim_image::new(seed, options, MIB);
            let (before, mut after) = sim::run(seed, async {
                let before = prepared(&disk).await;
                disk.keep_moments(seed, 30);
                let backend = open(&disk, false).await.unwrap();
                let mut after = before.clone();
                match change {
                    "create" => {
                        backend.create_snapshot(&named("new")).await.unwrap();
                        after.kept.insert("3".to_owned(), after.now.clone());
                    }
                    "apply" => {
                        backend.apply_snapshot("1").await.unwrap();
                        after.now = after.kept["1"].clone();
                    }
                    _ => {
                        backend.delete_snapshot("1").await.unwrap();
                        after.kept.remove("1");
                    }
                }
                backend.close().await.unwrap();
                (before, after)
            });
            let moments = disk.moments();
            assert!(moments.len() > 5);
            for (boundary, moment) in moments {
                let any = (0..3).map(|seed| moment.after_power_loss(seed));
                let ends = [moment.after_power_loss_none(), moment.after_power_loss_all()];
                for (number, left) in any.chain(ends).enumerate() {
                    let what = format!("{options}: {change}, cut at {boundary}, disk {number}");
                    sim::run(seed, async {
                        let backend =
                            open(&left, false).await.unwrap_or_else(|e| panic!("{what}: {e}"));
                        let snapshots = backend.snapshots().await.unwrap().len();
                        let now = contents(&backend).await;
                        let is_new =
                            snapshots != before.kept.len() || change == "apply" && now == after.now;
                        let model = if is_new { &mut after } else { &mut before.clone() };
                        backend.close().await.unwrap();
                        assert_sound(&left, true, &what).await;
                        let backend = open(&left, false).await.unwrap();
                        model.assert_holds(&backend, &what).await;
                        backend.close().await.unwrap();
                        assert_sound(&left, true, &what).await;
                    });
                }
            }
        }
    }
}

#[test]
fn a_power_cut_during_a_resize_leaves_the_old_size_or_the_new() {
    for (options, seed) in [("cluster_size=512", 1), ("cluster_size=4k", 2)] {
        for (size, state) in [(5 * MIB, true), (300_032, false), (MIB + 512, false)] {
            let disk = sim_image::new(seed, options, MIB);
            let old = sim::run(seed, async {
                let old = prepared(&disk).await;
                let backend = open(&disk, false).await.unwrap();
                if state {
                    backend.save_vm_state(0, IoBuf::from(vec![9; 20_480])).await.unwrap();
                }
                backend.flush().await.unwrap();
                disk.keep_moments(seed, 16);
                backend.resize(size, Preallocation::Off).await.unwrap();
                backend.close().await.unwrap();
                old
            });
            let mut new = old.clone();
            new.now.resize(usize::try_from(size).unwrap(), 0);
            for (boundary, moment) in disk.moments() {
                let any = (0..1).map(|seed| moment.after_power_loss(seed));
                let ends = [moment.after_power_loss_none(), moment.after_power_loss_all()];
                for (number, left) in any.chain(ends).enumerate() {
                    let what = format!("{options}: to {size}, cut at {boundary}, disk {number}");
                    sim::run(seed, async {
                        assert_sound(&left, true, &what).await;
                        let backend =
                            open(&left, false).await.unwrap_or_else(|e| panic!("{what}: {e}"));
                        let model = if backend.size() == MIB { old.clone() } else { new.clone() };
                        model.assert_holds(&backend, &what).await;
                        backend.close().await.unwrap();
                        assert_sound(&left, true, &what).await;
                    });
                }
            }
        }
    }
}

#[test]
fn a_failed_snapshot_leaves_no_write_in_flight() {
    for seed in 0..20 {
        sim::run(seed, async {
            let disk = sim_image::new(seed, "cluster_size=512", MIB);
            let image = open(&disk, false).await.unwrap();
            for at in (0..MIB).step_by(32 << 10) {
                image.write(at, IoBuf::from(vec![7; 512]), WriteFlags::empty()).await.unwrap();
            }
            image.flush().await.unwrap();
            // The L2 table of the 21st L1 entry cannot be read.
            let bytes = disk.bytes();
            let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
            let l1 = usize::try_from(word(40)).unwrap();
            let table = word(l1 + 8 * 20) & 0x00ff_ffff_ffff_fe00;
            let fail = FailRule {
                op: FaultOp::Read,
                nth: None,
                range: Some(table..table + 512),
                errno: 5,
                once: true,
            };
            let delay = Duration::from_micros(1)..Duration::from_millis(20);
            disk.set_faults(Faults { fail: vec![fail], delay, ..Faults::default() });
            assert!(image.create_snapshot(&named("new")).await.is_err());
            image.close().await.unwrap();
            disk.set_faults(Faults::default());
            assert_sound(&disk, false, &format!("seed {seed}")).await;
        });
    }
}

#[test]
fn a_snapshot_is_applied_on_a_full_disk() {
    let disk = sim_image::new(1, "cluster_size=4k", MIB);
    let rule = |op| FailRule { op, nth: None, range: None, errno: 28, once: false };
    let (old, new) = sim::run(1, async {
        let image = open(&disk, false).await.unwrap();
        let data = |byte| IoBuf::from(vec![byte; 200 << 10]);
        image.write(0, data(1), WriteFlags::empty()).await.unwrap();
        let new = contents(&image).await;
        image.create_snapshot(&named("one")).await.unwrap();
        image.write(100 << 10, data(2), WriteFlags::empty()).await.unwrap();
        image.flush().await.unwrap();
        let old = contents(&image).await;
        let range = Some(disk.len()..u64::MAX);
        let full = [FaultOp::Write, FaultOp::Truncate, FaultOp::Fallocate];
        let fail = full.map(|op| FailRule { range: range.clone(), ..rule(op) }).to_vec();
        disk.set_faults(Faults { fail, ..Faults::default() });
        disk.keep_moments(1, usize::MAX);
        image.apply_snapshot("1").await.unwrap();
        assert!(contents(&image).await == new);
        image.close().await.unwrap();
        disk.set_faults(Faults::default());
        assert_sound(&disk, false, "applied").await;
        (old, new)
    });
    for (boundary, moment) in disk.moments() {
        let found = (0..4).map(|seed| moment.after_power_loss(seed));
        for found in found.chain([moment.after_power_loss_all()]) {
            sim::run(1, async {
                let what = format!("cut at {boundary}");
                let image = open(&found, false).await.unwrap();
                let now = contents(&image).await;
                assert!(now == old || now == new, "{what}");
                image.close().await.unwrap();
                assert_sound(&found, true, &what).await;
            });
        }
    }
}
