//! Incremental backups with dirty bitmaps: a backup never misses a write, also after failures and crashes.

use std::path::{Path, PathBuf};

use oxblk::{Create, Disk, ErrorKind, Format};
use oxblk_tests::scratch::in_memory;

use crate::examples::assert_same;
use crate::programs::bitmap_backup;

const MIB: u64 = 1 << 20;

fn image(folder: &Path) -> PathBuf {
    let path = folder.join("disk.qcow2");
    Create::new(&path, Format::Qcow2, 4 * MIB).run().wait().unwrap();
    path
}

fn write(disk: &Disk, mib: u64, byte: u8) {
    disk.write(mib * MIB, vec![byte; 1 << 20]).wait().unwrap();
}

/// Simulates a crash: replaces the image by a copy in which the bitmap is marked as in use.
fn crash(disk: Disk, path: &Path) {
    disk.flush().wait().unwrap();
    let left = path.with_extension("left");
    std::fs::copy(path, &left).unwrap();
    disk.close().wait().unwrap();
    std::fs::rename(left, path).unwrap();
}

#[test]
fn a_bitmap_has_no_dirty_ranges_after_a_crash() {
    let folder = in_memory();
    let path = image(folder.path());
    let disk = Disk::open(&path).wait().unwrap();
    disk.add_bitmap("b", true).wait().unwrap();
    disk.close().wait().unwrap();
    let disk = Disk::open(&path).wait().unwrap();
    write(&disk, 1, 5);
    crash(disk, &path);
    let disk = Disk::open(&path).wait().unwrap();
    assert!(disk.bitmaps().unwrap()[0].inconsistent);
    for error in [
        disk.dirty_ranges("b").unwrap_err(),
        disk.take_dirty_ranges("b").wait().map(drop).unwrap_err(),
    ] {
        assert_eq!(error.to_string(), "Bitmap 'b' is inconsistent and cannot be used");
    }
    disk.remove_bitmap("b").wait().unwrap();
    disk.close().wait().unwrap();
}

#[test]
fn taken_ranges_that_are_not_finished_stay_in_the_bitmap() {
    let folder = in_memory();
    let path = image(folder.path());
    let disk = Disk::open(&path).wait().unwrap();
    disk.add_bitmap("b", true).wait().unwrap();
    write(&disk, 0, 1);
    let taken = disk.take_dirty_ranges("b").wait().unwrap();
    assert_eq!(taken.ranges(), std::slice::from_ref(&(0..MIB)));
    write(&disk, 2, 2);
    for refused in [
        disk.dirty_ranges("b").map(drop).unwrap_err(),
        disk.take_dirty_ranges("b").wait().map(drop).unwrap_err(),
        disk.remove_bitmap("b").wait().unwrap_err(),
    ] {
        assert_eq!(refused.kind(), ErrorKind::Busy);
    }
    taken.restore();
    assert_eq!(disk.dirty_ranges("b").unwrap(), [0..MIB, 2 * MIB..3 * MIB]);
    let taken = disk.take_dirty_ranges("b").wait().unwrap();
    write(&disk, 3, 3);
    // The image stores all ranges if it is closed before the backup has finished.
    disk.close().wait().unwrap();
    drop(taken);
    let disk = Disk::open(&path).wait().unwrap();
    assert_eq!(disk.dirty_ranges("b").unwrap(), [0..MIB, 2 * MIB..4 * MIB]);
    let taken = disk.take_dirty_ranges("b").wait().unwrap();
    write(&disk, 1, 4);
    taken.finish();
    let second = MIB..2 * MIB;
    assert_eq!(disk.dirty_ranges("b").unwrap(), std::slice::from_ref(&second));
    disk.close().wait().unwrap();
    let disk = Disk::open_read_only(&path).wait().unwrap();
    assert_eq!(disk.dirty_ranges("b").unwrap(), std::slice::from_ref(&second));
    let refused = disk.take_dirty_ranges("b").wait().map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Denied);
    disk.close().wait().unwrap();
}

#[test]
fn the_backup_example_copies_everything_after_a_failed_backup_and_after_a_crash() {
    let folder = in_memory();
    let (path, backup) = (image(folder.path()), folder.path().join("backup.raw"));
    let missing = folder.path().join("no folder").join("backup.raw");
    let change = |byte| {
        let disk = Disk::open(&path).wait().unwrap();
        write(&disk, 1, byte);
        disk
    };
    change(1).close().wait().unwrap();
    bitmap_backup::run(&path, &missing).unwrap_err();
    bitmap_backup::run(&path, &backup).unwrap();
    assert_same(&path, &backup);
    change(2).close().wait().unwrap();
    bitmap_backup::run(&path, &missing).unwrap_err();
    bitmap_backup::run(&path, &backup).unwrap();
    assert_same(&path, &backup);
    crash(change(3), &path);
    bitmap_backup::run(&path, &backup).unwrap();
    assert_same(&path, &backup);
}
