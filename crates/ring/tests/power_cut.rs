//! Tests of the simulated disk. The same seed gives the same run. Faults happen as configured. After a power cut, the
//! disk has all flushed data and any subset of the sectors that were written later.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::collections::BTreeSet;
use std::time::Duration;

use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_ring::{Falloc, File, IoBufMut, now, sleep, spawn, timeout};

fn fast() -> Faults {
    Faults { delay: Duration::ZERO..Duration::from_micros(100), ..Faults::default() }
}

async fn write(file: &File, sector: u64, sectors: usize, byte: u8) {
    file.write_all_at(IoBufMut::filled(sectors * 512, byte).freeze(), sector * 512, false)
        .await
        .unwrap();
}

#[test]
fn a_run_is_the_same_for_the_same_seed_and_differs_for_others() {
    let run = |seed| {
        let disk = Disk::new(seed, 1 << 20);
        sim::run(seed, async {
            let file = File::sim(&disk);
            let tasks: Vec<_> = (0..20u8)
                .map(|i| {
                    let file = file.clone();
                    spawn(async move { write(&file, 0, 4, i).await })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            (now(), disk.bytes()[0])
        })
    };
    assert_eq!(run(1), run(1));
    let winners: BTreeSet<u8> = (0..40).map(|seed| run(seed).1).collect();
    assert!(winners.len() > 5, "the order must vary with the seed");
}

#[test]
fn virtual_time_passes_without_waiting() {
    let started = std::time::Instant::now();
    sim::run(1, async {
        sleep(Duration::from_secs(100_000)).await;
        assert_eq!(now(), Duration::from_secs(100_000));
        assert!(timeout(Duration::from_secs(5), std::future::pending::<()>()).await.is_err());
        assert_eq!(now(), Duration::from_secs(100_005));
    });
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn faults_happen_as_configured() {
    let disk = Disk::new(1, 1 << 20);
    let no_space =
        FailRule { op: FaultOp::Write, nth: Some(3), range: None, errno: libc::ENOSPC, once: true };
    let bad_spot = FailRule {
        op: FaultOp::Read,
        nth: None,
        range: Some(8192..8193),
        errno: libc::EIO,
        once: false,
    };
    disk.set_faults(Faults { fail: vec![no_space, bad_spot], ..fast() });
    sim::run(1, async {
        let file = File::sim(&disk);
        write(&file, 0, 1, 1).await;
        write(&file, 1, 1, 1).await;
        let full =
            file.write_all_at(IoBufMut::filled(512, 2).freeze(), 0, false).await.unwrap_err();
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
        assert_eq!(disk.bytes()[0], 1, "a failed write must change nothing");
        write(&file, 2, 1, 1).await;
        for _ in 0..2 {
            let bad = file.read_full_at(IoBufMut::new(4096), 8000).await.unwrap_err();
            assert_eq!(bad.raw_os_error(), Some(libc::EIO));
        }
        file.read_full_at(IoBufMut::new(4096), 0).await.unwrap();
    });
}

#[test]
fn flushed_data_survives_every_power_cut_and_any_subset_of_other_sectors_may() {
    let disk = Disk::new(1, 0);
    disk.set_faults(fast());
    sim::run(1, async {
        let file = File::sim(&disk);
        write(&file, 0, 8, 1).await;
        file.sync(false).await.unwrap();
        write(&file, 0, 8, 2).await;
        write(&file, 4, 8, 3).await;
    });
    let none = disk.after_power_loss_none().bytes();
    assert_eq!(none, vec![1; 8 * 512]);
    assert_eq!(disk.after_power_loss_all().bytes(), disk.bytes());
    let (mut seen, mut lengths, mut mixed) = (vec![BTreeSet::new(); 12], BTreeSet::new(), false);
    for seed in 0..200 {
        let bytes = disk.after_power_loss(seed).bytes();
        lengths.insert(bytes.len());
        for (sector, content) in bytes.chunks(512).enumerate() {
            assert!(content.iter().all(|&b| b == content[0]), "a sector must never be torn");
            seen[sector].insert(content[0]);
        }
        mixed |= bytes[0] != bytes[512];
    }
    assert!(mixed, "some write must be torn between its sectors");
    assert_eq!(lengths, BTreeSet::from([4096, 6144]));
    assert_eq!(seen[0], BTreeSet::from([1, 2]));
    assert_eq!(seen[5], BTreeSet::from([1, 2, 3]), "each version since the flush must occur");
    assert_eq!(seen[11], BTreeSet::from([0, 3]));
}

#[test]
fn a_fua_write_is_durable_when_it_completes() {
    let disk = Disk::new(1, 4096);
    disk.set_faults(fast());
    sim::run(1, async {
        let file = File::sim(&disk);
        write(&file, 0, 2, 1).await;
        file.write_all_at(IoBufMut::filled(512, 2).freeze(), 512, true).await.unwrap();
    });
    assert_eq!(disk.after_power_loss_none().bytes()[..1024], [[0; 512], [2; 512]].concat());
    for seed in 0..50 {
        assert_eq!(
            disk.after_power_loss(seed).bytes()[512],
            2,
            "an older version must not reappear"
        );
    }
}

#[test]
fn a_flush_covers_only_writes_that_were_complete_when_it_began() {
    let mut lost = 0;
    for seed in 0..100 {
        let disk = Disk::new(seed, 4096);
        sim::run(seed, async {
            let file = File::sim(&disk);
            let late = file.write_at(IoBufMut::filled(512, 9).freeze(), 0, false);
            file.sync(false).await.unwrap();
            late.await.unwrap();
        });
        lost += u32::from(disk.after_power_loss_none().bytes()[0] == 0);
    }
    assert_eq!(lost, 100);
}

#[test]
fn truncation_punching_and_zeroing_are_volatile_until_a_flush() {
    let disk = Disk::from_bytes(1, &[5; 8192]);
    disk.set_faults(fast());
    let cut = sim::run(1, async {
        let file = File::sim(&disk);
        file.fallocate(Falloc::PunchHole, 0, 1024).await.unwrap();
        file.fallocate(Falloc::ZeroRange, 2000, 100).await.unwrap();
        file.set_len(5000).await.unwrap();
        let before = disk.after_power_loss_none().bytes();
        assert_eq!(before, vec![5; 8192]);
        file.sync(true).await.unwrap();
        disk.after_power_loss_none().bytes()
    });
    let mut expected = vec![5; 5000];
    expected[..1024].fill(0);
    expected[2000..2100].fill(0);
    assert_eq!(cut, expected);
    let grown = Disk::from_bytes(1, &cut);
    sim::run(2, async { File::sim(&grown).set_len(6000).await.unwrap() });
    assert!(grown.bytes()[5000..].iter().all(|&b| b == 0), "truncated data must not reappear");
}

#[test]
fn the_power_can_be_cut_at_every_write_boundary() {
    // Count the write boundaries (completed writes and flushes, see `Disk::cut_after`) of a run without a cut. Then cut the
    // power at each boundary.
    let script = |disk: Disk| async move {
        let file = File::sim(&disk);
        for i in 0..10u8 {
            let buf = IoBufMut::filled(1024, i + 1).freeze();
            if file.write_all_at(buf, u64::from(i) * 1024, false).await.is_err() {
                return i;
            }
            if file.sync(false).await.is_err() {
                return i;
            }
        }
        10
    };
    let whole = Disk::new(3, 0);
    assert_eq!(sim::run(3, script(whole.clone())), 10);
    assert_eq!(whole.write_boundaries(), 20);
    for cut in 0..20 {
        let disk = Disk::new(3, 0);
        disk.cut_after(cut);
        let acknowledged = sim::run(3, script(disk.clone()));
        assert!(disk.is_cut());
        for seed in 0..5 {
            let bytes = disk.after_power_loss(seed).bytes();
            for i in 0..acknowledged {
                let at = usize::from(i) * 1024;
                assert!(
                    bytes[at..at + 1024].iter().all(|&b| b == i + 1),
                    "a flushed write must survive"
                );
            }
        }
    }
}

#[test]
fn a_write_in_flight_at_the_cut_may_survive_in_part() {
    let mut outcomes = BTreeSet::new();
    for seed in 0..100 {
        let disk = Disk::new(seed, 2048);
        disk.cut_after(1);
        sim::run(seed, async {
            let file = File::sim(&disk);
            let through = file.write_at(IoBufMut::filled(1024, 7).freeze(), 0, true);
            let other = file.write_at(IoBufMut::filled(512, 8).freeze(), 1536, true);
            let _ = (through.await, other.await);
        });
        let bytes = disk.after_power_loss(seed).bytes();
        outcomes.insert((bytes[0], bytes[512], bytes[1536]));
    }
    for torn in [(7, 0, 8), (0, 7, 8), (0, 0, 8), (7, 7, 0), (7, 7, 8)] {
        assert!(outcomes.contains(&torn), "{torn:?} is not among {outcomes:?}");
    }
}

#[test]
fn a_kept_copy_equals_the_disk_after_a_cut_at_its_boundary() {
    let run = |cut: Option<u64>| {
        let disk = Disk::new(3, 1 << 20);
        disk.set_faults(fast());
        match cut {
            Some(boundary) => disk.cut_after(boundary),
            None => disk.keep_moments(1, 12),
        }
        sim::run(3, async {
            let file = File::sim(&disk);
            let tasks: Vec<_> = (0..30u8)
                .map(|i| {
                    let file = file.clone();
                    spawn(async move {
                        let data = IoBufMut::filled(2048, i + 1).freeze();
                        drop(file.write_all_at(data, u64::from(i) * 1024, i % 8 == 7).await);
                        if i % 5 == 4 {
                            drop(file.sync(true).await);
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
        });
        disk
    };
    let moments = run(None).moments();
    assert_eq!(moments.len(), 12);
    assert!(moments.is_sorted_by_key(|(boundary, _)| *boundary));
    let last = moments.last().unwrap().0;
    assert!(last > 12, "later boundaries must replace earlier ones");
    for (boundary, moment) in moments {
        let cut = run(Some(boundary));
        assert_eq!(cut.write_boundaries(), boundary);
        let left = |disk: &Disk| {
            [disk.after_power_loss_all(), disk.after_power_loss_none(), disk.after_power_loss(9)]
                .map(|disk| disk.bytes())
        };
        assert!(left(&moment) == left(&cut), "at boundary {boundary}");
    }
}

#[test]
fn every_change_in_flight_at_the_cut_may_survive() {
    // Each outcome: the size, whether sector 0 was punched, and whether sector 1 was zeroed.
    let mut outcomes = BTreeSet::new();
    for seed in 0..100 {
        let disk = Disk::from_bytes(seed, &[5; 2048]);
        disk.keep_moments(seed, 3);
        sim::run(seed, async {
            let file = File::sim(&disk);
            let punch = file.fallocate(Falloc::PunchHole, 0, 512);
            let zero = file.fallocate(Falloc::ZeroRange, 512, 512);
            let shrink = file.set_len(1536);
            let (punch, zero, shrink) = futures_util::future::join3(punch, zero, shrink).await;
            punch.and(zero).and(shrink).unwrap();
        });
        // At the first boundary all three operations are in flight.
        let (boundary, started) = disk.moments().remove(0);
        assert_eq!(boundary, 0);
        assert_eq!(started.after_power_loss_none().bytes(), [5; 2048]);
        let bytes = started.after_power_loss(seed).bytes();
        outcomes.insert((bytes.len(), bytes[0], bytes[512]));
    }
    for outcome in [(2048, 5, 5), (1536, 5, 5), (2048, 0, 5), (2048, 5, 0), (1536, 0, 0)] {
        assert!(outcomes.contains(&outcome), "{outcome:?} is not among {outcomes:?}");
    }
}

#[test]
fn a_fua_write_makes_only_the_changes_of_the_size_durable_that_its_data_needs() {
    let size_after = |changes: &[u64], offset: u64| {
        let disk = Disk::new(1, 4096);
        sim::run(1, async {
            let file = File::sim(&disk);
            for len in changes {
                file.set_len(*len).await.unwrap();
            }
            let data = IoBufMut::filled(512, 7).freeze();
            file.write_all_at(data, offset, true).await.unwrap();
        });
        let sizes: BTreeSet<u64> = (0..50).map(|seed| disk.after_power_loss(seed).len()).collect();
        sizes.into_iter().collect::<Vec<_>>()
    };
    // The write extends the disk.
    assert_eq!(size_after(&[], 4096), [4608]);
    assert_eq!(size_after(&[1024], 4096), [4608]);
    // The write does not need the new size.
    assert_eq!(size_after(&[2048], 0), [2048, 4096]);
    assert_eq!(size_after(&[8192], 0), [4096, 8192]);
    // An earlier change of the size has extended the disk to the end of the write or further.
    assert_eq!(size_after(&[8192], 4096), [8192]);
    assert_eq!(size_after(&[8192, 6144], 4096), [6144, 8192]);
    assert_eq!(size_after(&[1024, 6144], 2048), [6144]);
}

#[test]
fn every_operation_fails_after_the_cut() {
    let disk = Disk::from_bytes(1, &[5; 2048]);
    disk.cut_after(0);
    sim::run(1, async {
        let file = File::sim(&disk);
        let errors = [
            file.len().await.map(drop),
            file.seek_extent(0).await.map(drop),
            file.seek_extents(0, 1).await.map(drop),
            file.read_at(IoBufMut::new(512), 0).await.0.map(drop),
            file.set_len(0).await,
            file.sync(true).await,
            file.clone().close().await,
        ];
        for error in errors {
            assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::EIO));
        }
    });
    assert_eq!(disk.len(), 2048, "a test can still look at the disk");
}
