//! Tests of QED images: creation gives the same bytes as QEMU's tools, and a repair loses no data.

use std::fs::File;
use std::os::unix::fs::FileExt;

use oxblk_tests::differential::Differential;
use oxblk_tests::hostile::bounded;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::Img;

/// The size of a cluster, in bytes.
const CLUSTER: u64 = 64 << 10;
/// The offset of the L2 table of an image with four data clusters, in bytes. The first data cluster is in front of this table.
const L2: u64 = 6 * CLUSTER;

#[test]
fn new_images_are_the_same_bytes() {
    let both = Differential::new();
    for size in ["0", "1", "513", "10M", "3500000", "3T"] {
        for options in ["cluster_size=64k", "cluster_size=4k,table_size=16", "table_size=1"] {
            if size == "3T" && options.contains("4k") {
                continue;
            }
            both.same(Img, &["create", "-f", "qed", "-o", options, "image", size]);
            both.same_bytes("image");
        }
    }
    both.same(Img, &["create", "-f", "raw", "base", "3M"]);
    both.same(Img, &["create", "-f", "qed", "-b", "base", "-F", "raw", "image"]);
    both.same_bytes("image");
    both.same(Img, &["create", "-f", "qed", "-u", "-b", "base", "-F", "vmdk", "image", "3M"]);
    both.same_bytes("image");
}

#[test]
fn wrong_options_are_refused_as_by_the_qemu_tools() {
    let both = Differential::new();
    let all = ["cluster_size=2k", "cluster_size=5000", "cluster_size=128M", "table_size=0"];
    for options in all.into_iter().chain(["table_size=3", "table_size=32", "static=on", "help"]) {
        both.same(Img, &["create", "-f", "qed", "-o", options, "image", "1M"]);
    }
    both.same(Img, &["create", "-f", "qed", "image", "65T"]);
    both.same(Img, &["create", "-f", "qed", "-o", "backing_fmt=foo", "image", "1M"]);
}

/// Makes an image of 10 MiB with data in clusters 0, 16, 17 and 32 of the disk, and its raw copy `before`.
fn image() -> tempfile::TempDir {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let qemu = |tool: &str, args: &[&str]| {
        Program::new(tool).args(args).directory(scratch.path()).succeed();
    };
    qemu("qemu-img", &["create", "-q", "-f", "qed", "image", "10M"]);
    let writes = ["-c", "write -P 1 0 64k", "-c", "write -P 2 1M 128k", "-c", "write -P 3 2M 64k"];
    qemu("qemu-io", &[&["-f", "qed", "image"], &writes[..]].concat());
    scratch
}

fn put(scratch: &tempfile::TempDir, offset: u64, value: u64) {
    let file = File::options().write(true).open(scratch.path().join("image")).expect("the image");
    file.write_all_at(&value.to_le_bytes(), offset).expect("the image");
}

/// Repairs the image, and checks that the contents of the disk are the same as before and that QEMU finds no fault.
fn repair(scratch: &tempfile::TempDir, how: &str) {
    let qemu = |args: &[&str]| {
        Program::new("qemu-img").args(args).directory(scratch.path()).succeed();
    };
    qemu(&["convert", "-f", "qed", "-O", "raw", "image", "before"]);
    let reply = bounded(scratch.path(), &["img", "check", "-f", "qed", "-r", how, "image"]);
    assert_eq!(reply.code(), 0, "{}", reply.err());
    qemu(&["compare", "-q", "-f", "raw", "-F", "qed", "before", "image"]);
    qemu(&["check", "-q", "image"]);
}

#[test]
fn a_repair_gives_a_copy_to_an_entry_that_shares_its_cluster() {
    let scratch = image();
    put(&scratch, L2 + 8 * 40, 5 * CLUSTER);
    repair(&scratch, "all");
}

#[test]
fn a_repair_removes_unused_clusters_also_in_front_of_a_table() {
    let scratch = image();
    // Free the cluster in front of the L2 table.
    put(&scratch, L2, 0);
    put(&scratch, L2 + 8 * 17, 0);
    repair(&scratch, "leaks");
    let len = scratch.path().join("image").metadata().expect("the image").len();
    assert_eq!(len, 11 * CLUSTER, "two of thirteen clusters are gone");
}

#[test]
fn an_image_that_was_not_closed_is_repaired_when_it_is_opened_for_writing() {
    let scratch = image();
    put(&scratch, 16, 2);
    put(&scratch, L2 + 8 * 17, 3);
    let reply = bounded(scratch.path(), &["io", "-f", "qed", "-c", "write -P 5 4M 64k", "image"]);
    assert_eq!(reply.code(), 0, "{}", reply.err());
    let bytes = std::fs::read(scratch.path().join("image")).expect("the image");
    assert_eq!(bytes[16..24], [0; 8], "the features");
    repair(&scratch, "all");
}

#[test]
fn an_image_with_tables_of_one_cluster_can_be_used() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let oxblk = |args: &[&str]| {
        let reply = bounded(scratch.path(), args);
        assert_eq!(reply.code(), 0, "{args:?}: {}", reply.err());
    };
    let options = "cluster_size=4k,table_size=1";
    oxblk(&["img", "create", "-q", "-f", "qed", "-o", options, "image", "1G"]);
    oxblk(&["io", "-f", "qed", "-c", "write -P 5 500M 3M", "image"]);
    oxblk(&["io", "-f", "qed", "-c", "read -P 5 500M 3M", "-c", "read -P 0 0 1M", "image"]);
    oxblk(&["img", "check", "-f", "qed", "image"]);
}
