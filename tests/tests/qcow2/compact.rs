//! Compaction keeps the contents, makes the file as short as its allocated clusters allow, and releases the remainder to the
//! host. The tests include power cuts at any moment, and requests during the compaction.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, WriteFlags, ZeroFlags};
use oxblk_ring::sim::{self, Disk};
use oxblk_ring::{IoBuf, IoBufMut, spawn};
use oxblk_tests::differential::check_clean;
use oxblk_tests::program::Program;
use oxblk_tests::random::Random;
use oxblk_tests::sim_image::{self, assert_sound};

const MIB: usize = 1 << 20;

fn image(seed: u64, options: &str) -> Disk {
    sim_image::new(seed, options, 1 << 20)
}

async fn open(disk: &Disk) -> Backend {
    sim_image::open(disk, false).await.unwrap()
}

async fn contents(disk: &Backend) -> Vec<u8> {
    disk.read(0, IoBufMut::new(MIB)).await.unwrap().to_vec()
}

fn named(name: &str) -> SnapshotInfo {
    SnapshotInfo { name: name.to_owned(), ..SnapshotInfo::default() }
}

/// Writes to the disk in random order, takes snapshots, and frees most clusters at the beginning. Returns the contents of the
/// disk and of the snapshots.
async fn fill(disk: &Backend, random: &mut Random, snapshots: usize) -> Vec<Vec<u8>> {
    let mut now = vec![0; MIB];
    let mut kept = Vec::new();
    for round in 0..=snapshots {
        for _ in 0..24 {
            let offset = usize::try_from(random.below(MIB as u64 / 512)).unwrap() * 512;
            let len = usize::try_from(random.within(1, 128)).unwrap() * 512;
            let range = offset..(offset + len).min(MIB);
            let byte = u8::try_from(random.within(1, 255)).unwrap();
            let data = IoBuf::from(vec![byte; range.len()]);
            disk.write(range.start as u64, data, WriteFlags::empty()).await.unwrap();
            now[range].fill(byte);
        }
        for _ in 0..3 {
            let offset = usize::try_from(random.below(16)).unwrap() * 65536;
            let mut data = vec![0; 65536];
            for sector in data.chunks_mut(512) {
                let noise = usize::try_from(random.below(400)).unwrap();
                random.fill(&mut sector[..noise]);
            }
            now[offset..offset + 65536].copy_from_slice(&data);
            disk.write(offset as u64, IoBuf::from(data), WriteFlags::COMPRESSED).await.unwrap();
        }
        if round < snapshots {
            disk.create_snapshot(&named("some")).await.unwrap();
            kept.push(now.clone());
        }
    }
    for _ in 0..6 {
        let offset = usize::try_from(random.below(12)).unwrap() * 65536;
        disk.write_zeroes(offset as u64, 65536 * 3, ZeroFlags::MAY_UNMAP).await.unwrap();
        now[offset..offset + 3 * 65536].fill(0);
    }
    disk.flush().await.unwrap();
    kept.push(now);
    kept
}

async fn assert_holds(disk: &Backend, kept: &[Vec<u8>], what: &str) {
    let (now, snapshots) = kept.split_last().unwrap();
    assert!(contents(disk).await == *now, "{what}: the active state");
    let list = disk.snapshots().await.unwrap();
    assert_eq!(list.len(), snapshots.len());
    for (snapshot, content) in list.iter().zip(snapshots) {
        disk.apply_snapshot(&snapshot.id).await.unwrap();
        assert!(contents(disk).await == *content, "{what}: snapshot {}", snapshot.id);
    }
}

const OPTIONS: &[&str] = &[
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=64k",
    "compat=0.10,cluster_size=4k",
];

#[test]
fn compaction_shortens_the_file_and_keeps_the_contents() {
    for options in OPTIONS {
        for snapshots in 0..3 {
            let what = format!("{options}, {snapshots} snapshots");
            let disk = image(1, options);
            let kept = sim::run(1, async {
                let backend = open(&disk).await;
                let mut random = Random::new(snapshots as u64);
                let kept = fill(&backend, &mut random, snapshots).await;
                let before = disk.len();
                let done = backend.compact(64 << 10, &|_, _| true).await.unwrap();
                eprintln!(
                    "GAPS {what}: {} {done:?}",
                    oxblk_tests::host_clusters::gaps(&disk.bytes())
                );
                let obstacle = done.obstacle.unwrap_or("no room");
                assert!(obstacle.contains("no room"), "{what}: {obstacle}");
                assert_eq!(done.length, (before, disk.len()), "{what}");
                assert!(done.moved > 0 && disk.len() < before, "{what}: {done:?}");
                backend.write(0, IoBuf::from(vec![1; 512]), WriteFlags::empty()).await.unwrap();
                backend.close().await.unwrap();
                kept
            });
            sim::run(2, assert_sound(&disk, false, &what));
            let path = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(path.path(), disk.bytes()).unwrap();
            check_clean(path.path());
            sim::run(3, async {
                let backend = open(&disk).await;
                let mut kept = kept.clone();
                kept.last_mut().unwrap()[..512].fill(1);
                assert_holds(&backend, &kept, &what).await;
                backend.close().await.unwrap();
                assert_sound(&disk, false, &what).await;
            });
        }
    }
}

#[test]
fn a_power_cut_during_compaction_loses_nothing_and_leaves_leaks_at_worst() {
    for (options, snapshots) in
        [("cluster_size=4k", 0), ("cluster_size=4k", 2), ("cluster_size=512", 1)]
    {
        let disk = image(1, options);
        let kept = sim::run(1, async {
            let backend = open(&disk).await;
            let kept = fill(&backend, &mut Random::new(7), snapshots).await;
            backend.close().await.unwrap();
            disk.keep_moments(1, 20);
            let backend = open(&disk).await;
            backend.compact(64 << 10, &|_, _| true).await.unwrap();
            backend.close().await.unwrap();
            kept
        });
        let moments = disk.moments();
        assert!(moments.len() > 10);
        for (boundary, moment) in moments {
            let any = (0..2).map(|seed| moment.after_power_loss(seed));
            let ends = [moment.after_power_loss_none(), moment.after_power_loss_all()];
            for (number, left) in any.chain(ends).enumerate() {
                let what = format!("{options}: cut at {boundary}, disk {number}");
                sim::run(boundary, async {
                    assert_sound(&left, true, &what).await;
                    let backend = open(&left).await;
                    assert_holds(&backend, &kept, &what).await;
                    backend.compact(1 << 20, &|_, _| true).await.unwrap();
                    backend.close().await.unwrap();
                    assert_sound(&left, true, &what).await;
                });
            }
        }
    }
}

#[test]
fn the_disk_can_be_used_while_it_is_compacted() {
    for seed in 0..4 {
        let disk = image(seed, "cluster_size=4k");
        sim::run(seed, async {
            let backend = open(&disk).await;
            let kept = fill(&backend, &mut Random::new(seed), 1).await;
            let mut now = kept.last().unwrap().clone();
            let user = backend.clone();
            let writer = spawn(async move {
                let mut random = Random::new(seed ^ 0x5a);
                for _ in 0..200 {
                    let offset = usize::try_from(random.below(MIB as u64 / 512)).unwrap() * 512;
                    let len = usize::try_from(random.within(1, 32)).unwrap() * 512;
                    let range = offset..(offset + len).min(MIB);
                    let byte = u8::try_from(random.within(1, 255)).unwrap();
                    let data = IoBuf::from(vec![byte; range.len()]);
                    user.write(range.start as u64, data, WriteFlags::empty()).await.unwrap();
                    now[range.clone()].fill(byte);
                    let read = user.read(range.start as u64, IoBufMut::new(range.len())).await;
                    assert!(read.unwrap()[..] == now[range]);
                }
                now
            });
            backend.compact(16 << 10, &|_, _| true).await.unwrap();
            let now = writer.await;
            backend.compact(16 << 10, &|_, _| true).await.unwrap();
            assert!(contents(&backend).await == now, "seed {seed}");
            backend.close().await.unwrap();
            assert_sound(&disk, false, &format!("seed {seed}")).await;
        });
    }
}

#[test]
fn bitmaps_are_removed_while_the_image_is_compacted() {
    const BITMAPS: u64 = 6;
    for seed in 0..6 {
        let disk = image(seed, "cluster_size=4k");
        sim::run(seed, async {
            let backend = open(&disk).await;
            let (graph, node) = (backend.graph().clone(), backend.node().unwrap());
            for number in 0..BITMAPS {
                let name = number.to_string();
                graph.add_persistent_bitmap(&node, &name, Some(4096)).await.unwrap();
            }
            drop(node);
            let kept = fill(&backend, &mut Random::new(seed), 1).await;
            backend.close().await.unwrap();
            let backend = open(&disk).await;
            let user = backend.clone();
            let removing = spawn(async move {
                let (graph, node) = (user.graph().clone(), user.node().unwrap());
                for number in 0..BITMAPS {
                    let bitmap = node.bitmaps().find(&number.to_string()).unwrap();
                    graph.delete_bitmap(&node, &bitmap).await.unwrap();
                }
            });
            backend.compact(16 << 10, &|_, _| true).await.unwrap();
            removing.await;
            assert!(contents(&backend).await == *kept.last().unwrap(), "seed {seed}");
            backend.close().await.unwrap();
            assert_sound(&disk, false, &format!("seed {seed}")).await;
            assert_holds(&open(&disk).await, &kept, &format!("seed {seed}")).await;
        });
    }
}

fn stored(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn the_compact_command_reports_the_released_space() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    Program::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("64M").succeed();
    // With these options, freed clusters still use space on the host.
    let image = format!(
        "driver=qcow2,discard=unmap,pass-discard-request=off,file.filename={}",
        path.display()
    );
    let io = |commands: &[&str]| {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        Program::new("qemu-io").arg("--image-opts").args(commands).arg(&image).succeed();
    };
    io(&["write -P 1 0 32M", "write -P 2 40M 8M", "write -z -u 0 16M", "write -z -u 24M 8M"]);
    let before = (std::fs::metadata(&path).unwrap().len(), stored(&path));
    let img = |args: &[&str]| Program::oxblk().arg("img").args(args).arg(&path).succeed().out();
    let said = img(&["compact", "--output=json"]);
    let after = (std::fs::metadata(&path).unwrap().len(), stored(&path));
    assert!(said.contains(&format!("\"given-back\": {}", before.1 - after.1)), "{said}");
    assert!(said.contains(&format!("\"file-length\": {}", after.0)), "{said}");
    assert!(after.0 < 17 << 20, "the file is still {} bytes long", after.0);
    check_clean(&path);
    io(&["read -P 0 0 16M", "read -P 1 16M 8M", "read -P 2 40M 8M"]);
    let said = img(&["compact"]);
    assert!(said.contains("given back: 0 B (0 bytes)\nmoved: 0 B (0 bytes)\n"), "{said}");
    let refused = Program::oxblk().args(["img", "compact", "-f", "raw"]).arg(&path).run();
    assert_eq!(refused.code(), 1);
    assert!(refused.err().contains("Images of format 'raw' cannot be compacted"));
}

#[test]
fn a_refcount_block_that_two_table_entries_name_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"];
    Program::new("qemu-img").args(create).arg(&path).arg("1M").succeed();
    Program::new("qemu-io").args(["-c", "write 0 300k", "-c", "discard 0 9k"]).arg(&path).succeed();
    let mut bytes = std::fs::read(&path).unwrap();
    let table = usize::try_from(u64::from_be_bytes(bytes[48..56].try_into().unwrap())).unwrap();
    bytes.copy_within(table..table + 8, table + 8);
    std::fs::write(&path, &bytes).unwrap();
    let refused = Program::oxblk().args(["img", "compact"]).arg(&path).run();
    assert_eq!(refused.code(), 1);
    assert!(refused.err().contains("refcount block is used twice"), "{}", refused.err());
    assert!(std::fs::read(&path).unwrap() == bytes, "the image has changed");
}
