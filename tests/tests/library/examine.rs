//! Checks of images, and the size that a new image would need.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use oxblk::check::{CheckObserver, CheckReport, Finding, FindingKind, Fix};
use oxblk::core::Errno;
use oxblk::{Create, Disk, Format};
use oxblk_tests::scratch::in_memory;

const CLUSTER: u64 = 64 << 10;

fn image(folder: &Path, format: Format) -> PathBuf {
    let path = folder.join(format!("disk.{format}"));
    Create::new(&path, format, 4 << 20).run().wait().unwrap();
    path
}

/// Sets the refcount of an unused cluster of a qcow2 image to 1.
fn leak(path: &Path, cluster: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    file.set_len((cluster + 1) * CLUSTER).unwrap();
    let block = read_u64(&file, read_u64(&file, 48));
    file.write_all_at(&1_u16.to_be_bytes(), block + 2 * cluster).unwrap();
}

fn read_u64(file: &File, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

/// The events of a check, in order.
#[derive(Default)]
struct Events(Mutex<Vec<Event>>);

#[derive(Debug, PartialEq)]
enum Event {
    Found(FindingKind, Option<u64>),
    Repaired(u64),
}

impl CheckObserver for Events {
    fn finding(&self, finding: &Finding) {
        self.0.lock().unwrap().push(Event::Found(finding.kind, finding.offset));
    }

    fn repaired(&self, report: &CheckReport) {
        self.0.lock().unwrap().push(Event::Repaired(report.leaks_fixed));
    }
}

#[test]
fn a_leak_is_found_and_repaired_while_the_disk_is_open() {
    let folder = in_memory();
    let path = image(folder.path(), Format::Qcow2);
    leak(&path, 10);
    let disk = Disk::open(&path).wait().unwrap();
    let events = Arc::new(Events::default());
    let report = disk.check_with(Fix::Nothing, events.clone()).wait().unwrap();
    assert_eq!((report.leaks, report.leaks_fixed, report.corruptions), (1, 0, 0));
    assert_eq!(*events.0.lock().unwrap(), [Event::Found(FindingKind::Leak, Some(10 * CLUSTER))]);

    // The disk can be used after a check without repairs.
    disk.write(0, vec![5; 512]).wait().unwrap();
    let events = Arc::new(Events::default());
    let report = disk.check_with(Fix::Leaks, events.clone()).wait().unwrap();
    assert_eq!((report.leaks, report.leaks_fixed), (0, 1));
    assert_eq!(events.0.lock().unwrap().last(), Some(&Event::Repaired(1)));
    assert_eq!(disk.check(Fix::Nothing).wait().unwrap().leaks, 0);
    let refused = disk.write(0, vec![6; 512]).wait().unwrap_err();
    assert_eq!(refused.raw_errno(), Errno::IO);
    let text = refused.to_string();
    assert!(text.contains("repair") && text.contains("opened again"), "{text}");
    disk.close().wait().unwrap();
    let disk = Disk::open(&path).wait().unwrap();
    assert_eq!(disk.read(0, 512).wait().unwrap()[..], [5; 512]);
    disk.write(0, vec![6; 512]).wait().unwrap();
    disk.close().wait().unwrap();
    let checked = Command::new("qemu-img").arg("check").arg(&path).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn a_disk_that_is_read_only_is_checked_and_not_repaired() {
    let folder = in_memory();
    let path = image(folder.path(), Format::Qcow2);
    let disk = Disk::open_read_only(&path).wait().unwrap();
    let report = disk.check(Fix::Nothing).wait().unwrap();
    assert_eq!((report.leaks, report.corruptions, report.check_errors), (0, 0, 0));
    let refused = disk.check(Fix::All).wait().unwrap_err();
    assert_eq!(refused.raw_errno(), Errno::PERM);
    disk.close().wait().unwrap();
}

#[test]
fn a_raw_image_cannot_be_checked() {
    let folder = in_memory();
    let path = image(folder.path(), Format::Raw);
    let disk = Disk::options().format(Format::Raw).open(&path).wait().unwrap();
    let refused = disk.check(Fix::Nothing).wait().unwrap_err();
    assert_eq!(refused.raw_errno(), Errno::OPNOTSUPP);
    disk.close().wait().unwrap();
}

#[test]
fn a_measured_size_is_that_of_qemu_img() {
    let folder = in_memory();
    let path = image(folder.path(), Format::Raw);
    let disk = Disk::options().format(Format::Raw).open(&path).wait().unwrap();
    disk.write(0, vec![5; 1 << 20]).wait().unwrap();
    let copy = disk.measure(Format::Qcow2).wait().unwrap();
    let refused = disk.measure(Format::Parallels).wait().unwrap_err();
    assert_eq!(refused.to_string(), "Block driver 'parallels' does not support size measurement");
    disk.close().wait().unwrap();
    let source = ["-f", "raw", path.to_str().unwrap()];
    assert_eq!((copy.required, copy.fully_allocated), qemu_measures(&source));

    let empty = Create::new(folder.path().join("new"), Format::Qcow2, 4 << 20).measure();
    let empty = empty.wait().unwrap();
    assert_eq!((empty.required, empty.fully_allocated), qemu_measures(&["--size", "4M"]));
    assert!(!folder.path().join("new").exists());
}

/// The required and the fully allocated size of a qcow2 image, according to `qemu-img measure`.
fn qemu_measures(arguments: &[&str]) -> (u64, u64) {
    let measure = ["measure", "-O", "qcow2", "--output", "json"];
    let output = Command::new("qemu-img").args(measure).args(arguments).output().unwrap();
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |key: &str| value[key].as_u64().unwrap();
    (number("required"), number("fully-allocated"))
}
