//! Images that were not closed cleanly: an opening for writing repairs them without removing snapshots, data of snapshots, or
//! bitmaps.

use std::path::Path;

use oxblk_tests::hostile::image::Image;
use oxblk_tests::program::{Program, Reply};

/// Offset of the byte of the header that contains the dirty bit.
const DIRTY: usize = 79;
/// Data in the first two clusters of the disk.
const WRITE: [&str; 2] = ["-c", "write -P 5 0 128k"];
const READ: [&str; 2] = ["-c", "read -P 5 0 128k"];

fn offset(image: &Image, at: usize) -> usize {
    usize::try_from(image.get64(at)).unwrap()
}

/// Returns the offset of the bitmap directory. The bitmaps extension is the first extension with this size.
fn directory_of(image: &Image) -> usize {
    let mut at = 112;
    while image.get64(at) != 0x2385_2875_0000_0018 {
        at += 8;
    }
    offset(image, at + 24)
}

/// Creates a dirty image with a snapshot and two bitmaps. The refcount of its first data cluster is too low.
fn dirty_image(path: &Path) -> Image {
    let img = |args: &[&str]| Program::new("qemu-img").args(args).arg(path);
    img(&["create", "-q", "-f", "qcow2"]).arg("8M").succeed();
    Program::new("qemu-io").args(WRITE).arg(path).succeed();
    img(&["snapshot", "-c", "s"]).succeed();
    for name in ["b0", "b1"] {
        img(&["bitmap", "--add"]).arg(name).succeed();
    }
    let mut image = Image::new(std::fs::read(path).unwrap());
    image.put(DIRTY, &[1]);
    let host = |entry| entry & 0x00ff_ffff_ffff_fe00;
    let l2 = usize::try_from(host(image.get64(offset(&image, 40)))).unwrap();
    let cluster = usize::try_from(host(image.get64(l2)) >> 16).unwrap();
    let block = offset(&image, offset(&image, 48));
    image.put(block + 2 * cluster, &[0, 1]);
    image
}

/// Opens an image for writing, and reads its data.
fn open(path: &Path) -> Reply {
    Program::oxblk().arg("io").args(READ).arg(path).run()
}

/// Lengthens the extra data of the snapshot to 2000 bytes.
fn lengthen_extra(image: &mut Image) {
    let table = offset(image, 64);
    let entry = image.bytes()[table..table + 100].to_vec();
    let extra = usize::try_from(image.get64(table + 32) & 0xffff_ffff).unwrap();
    image.put(table + 36, &2000_u32.to_be_bytes());
    image.put(table + 40 + 2000, &entry[40 + extra..]);
}

/// A message, and the fault of an image that the message describes.
type Fault = (&'static str, fn(&mut Image));

#[test]
fn an_opening_of_a_dirty_image_does_not_repair_what_would_be_lost() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let good = dirty_image(&path);
    let faults: [Fault; 3] = [
        ("Too much extra metadata in snapshot table entry 0", lengthen_extra),
        ("Snapshot table too large", |image| image.put32(60, 65_537)),
        ("Broken bitmap directory", |image| image.put(directory_of(image) + 18, &[0xff, 0xff])),
    ];
    for (message, fault) in faults {
        let mut image = good.clone();
        fault(&mut image);
        std::fs::write(&path, image.bytes()).unwrap();
        let theirs = Program::new("qemu-io").args(READ).arg(&path).run();
        let ours = open(&path);
        for reply in [&theirs, &ours] {
            assert_eq!(reply.code(), 1, "{message}: {}", reply.out());
            assert!(reply.err().contains(message), "{message}: {}", reply.err());
        }
        assert!(ours.err().contains("check -r all"), "{message}: {}", ours.err());
        assert!(std::fs::read(&path).unwrap() == image.bytes(), "{message}: the image changed");
    }
}

#[test]
fn broken_bitmaps_stay_in_a_dirty_image_that_is_opened_or_reopened_for_writing() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let good = dirty_image(&path);
    let faults: [Fault; 4] = [
        ("a table that is not aligned", |image| image.put64(directory_of(image), 0x10001)),
        ("a table past the end", |image| image.put64(directory_of(image), 1 << 40)),
        ("data past the end", |image| {
            let table = offset(image, directory_of(image));
            image.put64(table, 1 << 40);
        }),
        ("a table in the cluster of the directory", |image| {
            let directory = directory_of(image);
            image.put64(directory, directory as u64);
        }),
    ];
    let reopen = ["-r", "-c", "reopen -w", "-c", "read -P 5 0 128k"];
    for (what, fault) in faults {
        for args in [&READ[..], &reopen] {
            let mut image = good.clone();
            fault(&mut image);
            std::fs::write(&path, image.bytes()).unwrap();
            let reply = Program::oxblk().arg("io").args(args).arg(&path).succeed();
            assert!(!reply.out().contains("failed"), "{what}: {}", reply.out());
            assert!(reply.err().contains("have been repaired"), "{what}: {}", reply.err());
            assert_eq!(std::fs::read(&path).unwrap()[DIRTY], 0, "{what}");
            let info = Program::oxblk().args(["img", "info"]).arg(&path).succeed().out();
            assert!(info.contains("name: b0") && info.contains("name: b1"), "{what}: {info}");
            let check = Program::oxblk().args(["img", "check"]).arg(&path).run();
            assert!(!check.err().contains("refcount=1 reference=2"), "{what}: {}", check.err());
            // The user can still remove the broken bitmap.
            Program::oxblk().args(["img", "check", "-r", "all"]).arg(&path).run();
            Program::new("qemu-img").arg("check").arg(&path).succeed();
            let info = Program::oxblk().args(["img", "info"]).arg(&path).succeed().out();
            assert!(!info.contains("name: b0") && info.contains("name: b1"), "{what}: {info}");
        }
    }
}
