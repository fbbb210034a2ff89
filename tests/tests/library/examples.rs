//! Runs every example of the library and checks its result.

use std::path::Path;
use std::process::Command;

use oxblk::{Create, Disk, Format};
use oxblk_tests::scratch::in_memory;
use tempfile::TempDir;

use crate::programs;

/// Creates a qcow2 disk of 4 MiB whose second MiB is filled with `byte`.
fn disk(folder: &TempDir, byte: u8) -> std::path::PathBuf {
    let path = folder.path().join("disk.qcow2");
    Create::new(&path, Format::Qcow2, 4 << 20).run().wait().unwrap();
    let disk = Disk::open(&path).wait().unwrap();
    disk.write(1 << 20, vec![byte; 1 << 20]).wait().unwrap();
    disk.close().wait().unwrap();
    path
}

pub(crate) fn assert_same(one: &Path, other: &Path) {
    let compared = Command::new("qemu-img").arg("compare").args([one, other]).output().unwrap();
    assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
}

#[test]
fn the_read_example_finds_the_stored_data() {
    let folder = in_memory();
    programs::read::run(&disk(&folder, 1)).unwrap();
}

#[test]
fn the_tokio_example_reads_in_tokio_tasks() {
    let folder = in_memory();
    programs::tokio::run(&disk(&folder, 1)).unwrap();
}

#[test]
fn the_convert_example_makes_an_image_that_qemu_reads() {
    let folder = in_memory();
    let (source, target) = (disk(&folder, 1), folder.path().join("copy.qcow2"));
    programs::convert::run(&source, &target).unwrap();
    assert_same(&source, &target);
}

#[test]
fn the_progress_example_copies_completely_or_leaves_no_target() {
    let folder = in_memory();
    let (source, target) = (disk(&folder, 1), folder.path().join("copy.qcow2"));
    programs::progress::run(&source, &target, |_| ()).unwrap();
    assert_same(&source, &target);
    let stopped = folder.path().join("stopped.qcow2");
    programs::progress::run(&source, &stopped, |stop| stop.stop()).unwrap();
    assert!(!stopped.exists());
}

#[test]
fn the_snapshot_example_restores_the_old_contents() {
    let folder = in_memory();
    let path = disk(&folder, 1);
    let before = folder.path().join("before.raw");
    programs::convert::run(&path, &before).unwrap();
    programs::snapshot::run(&path).unwrap();
    assert_same(&path, &before);
}

#[test]
fn the_bitmap_backup_example_copies_new_writes() {
    let folder = in_memory();
    let (path, backup) = (disk(&folder, 1), folder.path().join("backup.raw"));
    programs::bitmap_backup::run(&path, &backup).unwrap();
    assert_same(&path, &backup);
    let disk = Disk::open(&path).wait().unwrap();
    disk.write(3 << 20, vec![9; 1 << 20]).wait().unwrap();
    disk.close().wait().unwrap();
    programs::bitmap_backup::run(&path, &backup).unwrap();
    assert_same(&path, &backup);
}

#[test]
fn the_serve_nbd_example_serves_until_it_is_stopped() {
    let folder = in_memory();
    let (path, socket) = (disk(&folder, 7), folder.path().join("socket"));
    programs::serve_nbd::run(&path, &socket, || {
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let read =
            Command::new("qemu-io").args(["-f", "raw", "-c", "read -P 7 1M 1M", &uri]).output();
        let read = String::from_utf8_lossy(&read.unwrap().stdout).into_owned();
        assert!(read.contains("read 1048576/1048576"), "{read}");
    })
    .unwrap();
    assert!(!socket.exists());
}

#[test]
fn the_custom_driver_example_stores_written_data() {
    programs::custom_driver::run().unwrap();
}
