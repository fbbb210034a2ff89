//! Tests of Parallels images: creation, check and repair give the same results as QEMU's tools, and oxblk and QEMU use an image
//! alternately.

mod faults;
mod fixed_size;

use std::fs::File;
use std::os::unix::fs::FileExt;

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

/// The byte offset of the header field that marks an image as open for writing.
const IN_USE: u64 = 44;
/// The byte offset of the header field with the start of the clusters.
const DATA_OFF: u64 = 48;
/// The byte offset of the BAT.
const BAT: u64 = 64;
const MIB: u64 = 1 << 20;

#[test]
fn new_images_are_the_same_bytes() {
    let both = Differential::new();
    for size in ["0", "1", "513", "10M", "3500000", "3T"] {
        for cluster in ["1M", "64k", "4000"] {
            if (size, cluster) == ("3T", "4000") {
                continue;
            }
            let options = format!("cluster_size={cluster}");
            both.same(Img, &["create", "-f", "parallels", "-o", &options, "image", size]);
            both.same_bytes("image");
        }
    }
}

#[test]
fn wrong_options_are_refused_as_by_the_qemu_tools() {
    let both = Differential::new();
    for options in ["cluster_size=0", "cluster_size=2G", "preallocation=x", "static=on", "help"] {
        both.same(Img, &["create", "-f", "parallels", "-o", options, "image", "1M"]);
    }
    both.same(Img, &["create", "-f", "parallels", "image", "4P"]);
    both.same(Img, &["create", "-f", "parallels", "-b", "base", "-F", "raw", "image"]);
}

/// Creates an image of 10 MiB in every directory. Clusters 0, 3, 5 and 9 of the disk are clusters 1 to 4 of the file.
fn image() -> Differential {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "parallels", "image", "10M"]);
    let writes = ["write -P 1 0 1M", "write -P 2 3M 1M", "write -P 3 5M 1M", "write -P 4 9M 1M"];
    let writes: Vec<&str> = writes.iter().flat_map(|write| ["-c", write]).collect();
    both.qemu(Io, &[&["-f", "parallels"], &writes[..], &["image"]].concat());
    both
}

fn put(file: &File, offset: u64, value: u32) {
    file.write_all_at(&value.to_le_bytes(), offset).expect("the image");
}

/// Corrupts the image in every directory.
fn spoil(both: &Differential, spoil: &dyn Fn(&File)) {
    both.prepare(|directory| {
        let file = File::options().write(true).open(directory.join("image"));
        spoil(&file.expect("the image"));
    });
}

#[test]
fn faults_are_found_and_repaired_as_by_the_qemu_tools() {
    let cases: [&dyn Fn(&File); 7] = [
        &|_| (),
        &|file| put(file, IN_USE, 0x746f_6e59),
        &|file| put(file, DATA_OFF, 0),
        &|file| put(file, BAT + 16, 1),
        &|file| put(file, BAT + 36, 0),
        &|file| file.set_len(6 * MIB).expect("the image"),
        &|file| file.set_len(5 * MIB + 4096).expect("the image"),
    ];
    for case in cases {
        for fix in ["leaks", "all"] {
            let both = image();
            spoil(&both, case);
            both.same(Img, &["check", "-f", "parallels", "image"]);
            both.same(Img, &["check", "--output=json", "-f", "parallels", "image"]);
            both.same(Img, &["check", "-r", fix, "-f", "parallels", "image"]);
            // QEMU marks an image as closed even without a repair, so the bytes are compared only after a full repair.
            if fix == "all" {
                both.same_bytes("image");
            }
        }
    }
}

#[test]
fn a_repair_keeps_the_data_of_a_cluster_that_the_file_cuts_off() {
    let both = image();
    let [directory, _] = both.our_directories();
    let path = directory.join("image");
    let file = File::options().write(true).open(&path).expect("the image");
    file.set_len(4 * MIB + 4096).expect("the image");
    put(&file, BAT + 24, 77);
    let repaired =
        Program::oxblk().args(["img", "check", "-r", "all", "image"]).directory(&directory);
    let repaired = repaired.run();
    assert_eq!(repaired.code(), 0, "{}", repaired.err());
    let reads = ["-c", "read -P 4 9M 4k", "-c", "read -P 0 9441280 65536", "-c", "read -P 0 6M 1M"];
    Program::new("qemu-io").args(["-f", "parallels"]).args(reads).arg(&path).succeed();
    Program::new("qemu-img").args(["check", "-q", "-f", "parallels"]).arg(&path).succeed();
}

#[test]
fn discarded_clusters_are_reused() {
    let both = image();
    let [directory, _] = both.our_directories();
    let changes =
        ["-c", "discard 3M 1M", "-c", "flush", "-c", "write -P 6 4M 1M", "-c", "read -P 0 3M 1M"];
    let io = Program::oxblk().args(["io", "-d", "unmap", "-f", "parallels"]).args(changes);
    io.arg("image").directory(&directory).succeed();
    let path = directory.join("image");
    assert_eq!(std::fs::metadata(&path).expect("the image").len(), 5 * MIB);
    let reads = ["-c", "read -P 6 4M 1M", "-c", "read -P 0 3M 1M", "-c", "read -P 3 5M 1M"];
    Program::new("qemu-io").args(["-f", "parallels"]).args(reads).arg(&path).succeed();
    Program::new("qemu-img").args(["check", "-q", "-f", "parallels"]).arg(&path).succeed();
}
