//! Tests of the damage of a simulated disk: silent corruption, misdirected requests and latent errors.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::io;

use oxblk_ring::sim::{self, Damage, DamageRule, Disk, Faults};
use oxblk_ring::{Falloc, File, IoBufMut};

const SECTORS: usize = 16;

/// A disk in which each byte of a sector is the number of the sector plus 1.
fn disk(seed: u64) -> Disk {
    let bytes: Vec<u8> = (1..=16).flat_map(|number| [number; 512]).collect();
    Disk::from_bytes(seed, &bytes)
}

fn once(damage: Damage) -> Faults {
    Faults {
        damage: vec![DamageRule { once: true, ..DamageRule::always(damage) }],
        ..Faults::default()
    }
}

async fn write(file: &File, offset: u64, len: usize, byte: u8, fua: bool) -> io::Result<()> {
    file.write_all_at(IoBufMut::filled(len, byte).freeze(), offset, fua).await
}

async fn read(file: &File, sector: u64) -> io::Result<Vec<u8>> {
    let (bytes, _) = file.read_full_at(IoBufMut::new(512), sector * 512).await?;
    Ok(bytes.to_vec())
}

/// The sectors that differ.
fn differing(disk: &Disk, expected: &[u8]) -> Vec<usize> {
    let bytes = disk.bytes();
    assert_eq!(bytes.len(), expected.len());
    let same = |sector: &usize| bytes[sector * 512..][..512] != expected[sector * 512..][..512];
    (0..bytes.len() / 512).filter(same).collect()
}

fn with(number: usize, byte: u8) -> Vec<u8> {
    let mut bytes = disk(0).bytes();
    bytes[number * 512..][..512].fill(byte);
    bytes
}

#[test]
fn a_corrupted_write_succeeds_and_the_next_write_repairs_it() {
    for (seed, fua) in (0..20).zip([false, true].into_iter().cycle()) {
        let disk = disk(seed);
        disk.set_faults(once(Damage::Corruption));
        sim::run(seed, async {
            let file = File::sim(&disk);
            let mut expected = with(2, 9);
            expected[3 * 512..6 * 512].fill(9);
            write(&file, 2 * 512, 4 * 512, 9, fua).await.unwrap();
            let wrong = differing(&disk, &expected);
            assert!(wrong.len() == 1 && (2..6).contains(&wrong[0]), "{wrong:?}");
            assert_eq!(disk.damaged(), 1);
            let sector = wrong[0] as u64;
            assert_eq!(read(&file, sector).await.unwrap(), disk.bytes()[wrong[0] * 512..][..512]);
            // A power cut keeps the corruption together with the write.
            let kept = if fua { disk.after_power_loss_none() } else { disk.after_power_loss_all() };
            assert_eq!(kept.bytes(), disk.bytes());
            write(&file, sector * 512, 512, 9, false).await.unwrap();
            assert_eq!(disk.bytes(), expected);
        });
    }
}

#[test]
fn a_power_cut_that_loses_a_write_loses_its_damage_too() {
    let rules = [Damage::Corruption, Damage::LatentError, Damage::MisdirectedWrite { to: None }];
    for damage in rules {
        let disk = disk(1);
        disk.set_faults(once(damage));
        sim::run(1, async {
            let file = File::sim(&disk);
            write(&file, 512, 512, 9, false).await.unwrap();
            let left = disk.after_power_loss_none();
            assert_eq!(left.bytes(), self::disk(1).bytes());
            read(&File::sim(&left), 1).await.unwrap();
        });
    }
}

#[test]
fn a_misdirected_write_changes_another_place_and_not_its_own() {
    for seed in 0..20 {
        let disk = disk(seed);
        disk.set_faults(once(Damage::MisdirectedWrite { to: None }));
        sim::run(seed, async {
            write(&File::sim(&disk), 2 * 512 + 100, 300, 99, false).await.unwrap();
            let wrong = differing(&disk, &self::disk(seed).bytes());
            assert!(wrong.len() == 1 && wrong[0] != 2, "{wrong:?}");
            assert_eq!(disk.bytes()[wrong[0] * 512 + 100..][..300], [99; 300]);
        });
    }
    let disk = disk(0);
    disk.set_faults(once(Damage::MisdirectedWrite { to: Some(5 * 512) }));
    sim::run(0, write(&File::sim(&disk), 0, 512, 99, true)).unwrap();
    assert_eq!(disk.bytes(), with(5, 99));
    assert_eq!(disk.after_power_loss_none().bytes(), with(5, 99));
}

#[test]
fn a_misdirected_read_returns_the_bytes_of_another_place_once() {
    for seed in 0..20 {
        let disk = disk(seed);
        disk.set_faults(once(Damage::MisdirectedRead { from: None }));
        sim::run(seed, async {
            let file = File::sim(&disk);
            let other = read(&file, 3).await.unwrap();
            assert!(other[0] != 4 && other == vec![other[0]; 512], "{}", other[0]);
            assert_eq!(read(&file, 3).await.unwrap(), vec![4; 512]);
        });
    }
}

#[test]
fn an_operation_that_leaves_the_disk_is_not_misdirected() {
    for to in [Some(u64::MAX - 100), Some(SECTORS as u64 * 512 - 511), Some(0), None] {
        let disk = Disk::new(1, if to.is_some() { SECTORS as u64 * 512 } else { 512 });
        let rule = DamageRule::always(Damage::MisdirectedWrite { to });
        disk.set_faults(Faults { damage: vec![rule], ..Faults::default() });
        sim::run(1, write(&File::sim(&disk), 0, 512, 7, false)).unwrap();
        assert_eq!(disk.bytes()[..512], [7; 512]);
        assert_eq!(disk.damaged(), 0);
    }
}

#[test]
fn a_sector_with_a_latent_error_is_unreadable_until_it_is_written_again() {
    let disk = disk(3);
    let rule = DamageRule {
        range: Some(4 * 512..5 * 512),
        once: true,
        ..DamageRule::always(Damage::LatentError)
    };
    disk.set_faults(Faults { damage: vec![rule], ..Faults::default() });
    sim::run(3, async {
        let file = File::sim(&disk);
        write(&file, 3 * 512, 3 * 512, 9, false).await.unwrap();
        file.sync(true).await.unwrap();
        let after_cut = File::sim(&disk.after_power_loss_none());
        for file in [&file, &after_cut] {
            let eio = |error: io::Error| assert_eq!(error.raw_os_error(), Some(libc::EIO));
            eio(read(file, 4).await.unwrap_err());
            eio(file.read_full_at(IoBufMut::new(4096), 0).await.unwrap_err());
            assert_eq!(read(file, 3).await.unwrap(), vec![9; 512]);
            assert_eq!(read(file, 5).await.unwrap(), vec![9; 512]);
            // The disk would have to read the other part of the sector.
            eio(write(file, 4 * 512 + 100, 512, 7, false).await.unwrap_err());
            eio(file.fallocate(Falloc::ZeroRange, 3 * 512, 600).await.unwrap_err());
            assert_eq!(read(file, 5).await.unwrap(), vec![9; 512]);
            assert_eq!(read(file, 3).await.unwrap(), vec![9; 512]);
        }
        write(&file, 4 * 512, 512, 7, false).await.unwrap();
        assert_eq!(read(&file, 4).await.unwrap(), vec![7; 512]);
        after_cut.fallocate(Falloc::PunchHole, 3 * 512, 3 * 512).await.unwrap();
        assert_eq!(read(&after_cut, 4).await.unwrap(), vec![0; 512]);
    });
}

#[test]
fn data_at_rest_is_damaged_in_every_version() {
    let disk = disk(4);
    sim::run(4, async {
        let file = File::sim(&disk);
        write(&file, 2 * 512, 512, 9, false).await.unwrap();
        disk.corrupt(2 * 512..2 * 512 + 1);
        disk.make_unreadable(7 * 512..8 * 512 + 1);
        for left in [disk.clone(), disk.after_power_loss_none(), disk.after_power_loss_all()] {
            let file = File::sim(&left);
            let bytes = read(&file, 2).await.unwrap();
            assert!(bytes != vec![9; 512] && bytes != vec![3; 512]);
            for (sector, is_readable) in [(6, true), (7, false), (8, false), (9, true)] {
                assert_eq!(read(&file, sector).await.is_ok(), is_readable, "{sector}");
            }
        }
    });
}

#[test]
fn the_seed_determines_the_damage() {
    let run = |seed| {
        let disk = disk(seed);
        let rule = |damage| DamageRule { chance: 0.1, ..DamageRule::always(damage) };
        let kinds = [Damage::Corruption, Damage::MisdirectedWrite { to: None }];
        let damage = kinds.into_iter().map(rule).collect();
        disk.set_faults(Faults { damage, ..Faults::default() });
        sim::run(seed, async {
            let file = File::sim(&disk);
            for byte in 0..100 {
                write(&file, u64::from(byte) % 16 * 512, 512, byte, false).await.unwrap();
            }
        });
        (disk.damaged(), disk.bytes())
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1).1, run(2).1);
    let total: u64 = (0..20).map(|seed| run(seed).0).sum();
    assert!((200..600).contains(&total), "{total} of 2000 writes are damaged");
}
