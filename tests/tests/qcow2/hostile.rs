//! Damaged and malicious qcow2 images, run through the program.

use std::fs;
use std::path::Path;

use oxblk_tests::hostile::{bounded, qcow2};
use oxblk_tests::program::Program;

fn qemu_img(directory: &Path, args: &[&str]) {
    Program::new("qemu-img").args(args).directory(directory).succeed();
}

/// Creates an overlay with the backing file name `backing`. The backing file does not have to exist.
fn overlay_naming(directory: &Path, backing: &str) {
    qemu_img(directory, &["create", "-q", "-f", "qcow2", "overlay", "1M"]);
    qemu_img(directory, &["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, "overlay"]);
}

#[test]
fn an_untrusted_image_does_not_choose_a_protocol_for_its_backing_file() {
    for name in [
        r#"json:{"driver":"file","filename":"secret"}"#,
        "nbd:127.0.0.1:1",
        "nbd://127.0.0.1:1/x",
        "nbd+unix:///x?socket=/nonexistent",
        "nfs://host/x",
        "ssh://host/x",
        "https://host/x",
        "null-co://",
    ] {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let directory = scratch.path();
        fs::write(directory.join("secret"), [7; 65_536]).expect("a file");
        overlay_naming(directory, name);
        let read = ["io", "--untrusted", "-r", "-f", "qcow2", "-c", "read 0 4k", "overlay"];
        let reply = bounded(directory, &read);
        assert_eq!(reply.code(), 1, "{name}: {}", reply.out());
        assert!(reply.err().contains("overlay"), "the error names the image: {}", reply.err());
        assert!(reply.err().contains(name), "the error names the file: {}", reply.err());
    }
}

#[test]
fn info_opens_nothing_but_the_image_unless_asked() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    overlay_naming(scratch.path(), "/nonexistent/base");
    let info = bounded(scratch.path(), &["img", "info", "overlay"]);
    assert_eq!(info.code(), 0, "{}", info.err());
    assert!(info.out().contains("backing file: /nonexistent/base"), "{}", info.out());
    let chain = bounded(scratch.path(), &["img", "info", "--backing-chain", "overlay"]);
    assert_eq!(chain.code(), 1);
    assert!(chain.err().contains("/nonexistent/base"), "{}", chain.err());
}

#[test]
fn a_loop_of_backing_files_ends_in_an_error() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let directory = scratch.path();
    for name in ["itself", "one", "other"] {
        qemu_img(directory, &["create", "-q", "-f", "qcow2", name, "1M"]);
    }
    for (image, backing) in [("itself", "itself"), ("one", "other"), ("other", "one")] {
        qemu_img(directory, &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, image]);
    }
    for image in ["itself", "one"] {
        for command in [
            &["io", "-r", "-c", "read 0 4k"][..],
            &["img", "info", "--backing-chain"],
            &["img", "map"],
            &["img", "check"],
        ] {
            let args = [command, &[image]].concat();
            let reply = bounded(directory, &args);
            // A check opens only the image itself.
            assert!(reply.code() == 1 || command.contains(&"check"), "{args:?}: {}", reply.out());
        }
    }
}

#[test]
fn guest_data_does_not_turn_a_raw_disk_into_another_format() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let directory = scratch.path();
    fs::write(directory.join("secret"), [7; 65_536]).expect("a file");
    overlay_naming(directory, "secret");
    fs::rename(directory.join("overlay"), directory.join("disk.raw")).expect("a rename");
    let bytes = fs::read(directory.join("disk.raw")).expect("the disk");
    // If the user gives a format, every command uses that format.
    let info = bounded(directory, &["img", "info", "-f", "raw", "disk.raw"]);
    assert!(info.out().contains("file format: raw"), "{}", info.out());
    let convert = ["img", "convert", "-f", "raw", "-O", "raw", "disk.raw", "copy.raw"];
    assert_eq!(bounded(directory, &convert).code(), 0);
    let copy = fs::read(directory.join("copy.raw")).expect("the copy");
    assert!(copy.starts_with(&bytes), "the header is content");
}

#[test]
fn a_disk_that_was_probed_as_raw_refuses_to_become_another_format() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let directory = scratch.path();
    fs::write(directory.join("disk"), vec![0; 1 << 20]).expect("a file");
    fs::write(directory.join("header"), qcow2::good().bytes().get(..512).expect("a header"))
        .expect("a file");
    let probed = bounded(directory, &["io", "-c", "write -s header 0 512", "disk"]);
    assert_eq!(probed.code(), 1, "{}", probed.out());
    let bytes = fs::read(directory.join("disk")).expect("the disk");
    assert!(bytes.iter().all(|byte| *byte == 0), "nothing was written");
    let named = bounded(directory, &["io", "-f", "raw", "-c", "write -s header 0 512", "disk"]);
    assert_eq!(named.code(), 0, "{}", named.err());
}

#[test]
fn a_disk_of_12802_tib_is_inspected_in_bounded_memory_and_time() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let directory = scratch.path();
    let options = "cluster_size=2M";
    qemu_img(directory, &["create", "-q", "-f", "qcow2", "-o", options, "huge", "12802T"]);
    for command in [
        &["img", "info"][..],
        &["img", "check"],
        &["img", "map"],
        &["img", "map", "--output=json"],
        &["img", "measure", "-O", "raw"],
        &["io", "-c", "write 12801T 1M", "-c", "discard 12801T 1G", "-c", "read 12801T 1M"],
        &["img", "check"],
        &["img", "map"],
    ] {
        let reply = bounded(directory, &[command, &["huge"]].concat());
        assert_eq!(reply.code(), 0, "{command:?}: {}{}", reply.out(), reply.err());
    }
    let len = fs::metadata(directory.join("huge")).expect("the image").len();
    assert!(len < 64 << 20, "{len} bytes");
}

#[test]
fn an_unaligned_cluster_is_reported_with_its_l2_entry() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    qemu_img(scratch.path(), &["create", "-q", "-f", "qcow2", "bad", "1M"]);
    let write = ["-c", "write -q 0 256k", "bad"];
    Program::new("qemu-io").args(write).directory(scratch.path()).succeed();
    let path = scratch.path().join("bad");
    let mut bytes = fs::read(&path).expect("the image");
    let word = |bytes: &[u8], at: usize| {
        let word = u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        usize::try_from(word & 0x00ff_ffff_ffff_fe00).expect("an offset")
    };
    let table = word(&bytes, word(&bytes, 40));
    bytes[table + 14] |= 2;
    let cluster = word(&bytes, table + 8);
    fs::write(&path, bytes).expect("the image");
    let reply = bounded(scratch.path(), &["io", "-r", "-c", "read 64k 64k", "bad"]);
    let expected = format!(
        "Cluster allocation offset {cluster:#x} unaligned (L2 offset: {table:#x}, L2 index: 0x1)"
    );
    assert!(reply.err().contains(&expected), "{}", reply.err());
    let reply = bounded(scratch.path(), &["img", "map", "bad"]);
    let expected = "Could not read file metadata: Input/output error\n";
    assert!(reply.err().ends_with(expected), "{}", reply.err());
    let reply = bounded(scratch.path(), &["io", "-c", "write 68k 4k", "bad"]);
    let expected = format!("Data cluster offset {cluster:#x} unaligned (guest offset: 0x11000)");
    assert!(reply.err().contains(&expected), "{}", reply.err());
}

#[test]
fn a_refcount_block_far_behind_the_file_does_not_delay_preallocation() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    qemu_img(scratch.path(), &["create", "-q", "-f", "qcow2", "far", "1M"]);
    let path = scratch.path().join("far");
    let mut bytes = fs::read(&path).expect("the image");
    const CLUSTER: usize = 65_536;
    // Replace the refcount table with a table of two clusters at the end of the file. The last entry of the new table contains
    // the offset of a block past the end.
    let table = bytes.len().next_multiple_of(CLUSTER);
    let old = u64::from_be_bytes(bytes[48..56].try_into().expect("8 bytes"));
    let old = usize::try_from(old).expect("an offset");
    let first_block = bytes[old..old + 8].to_vec();
    bytes.resize(table + 3 * CLUSTER, 0);
    let word = |number: usize| u64::try_from(number).expect("a number").to_be_bytes();
    bytes[table..table + 8].copy_from_slice(&first_block);
    bytes[table + 2 * CLUSTER - 8..table + 2 * CLUSTER].copy_from_slice(&word(table + 2 * CLUSTER));
    bytes[48..56].copy_from_slice(&word(table));
    bytes[56..60].copy_from_slice(&2_u32.to_be_bytes());
    fs::write(&path, bytes).expect("the image");
    for tool in [&["img", "check", "-r", "all", "far"][..], &["img", "check", "far"]] {
        bounded(scratch.path(), tool);
    }
    let reply = bounded(scratch.path(), &["img", "resize", "--preallocation=falloc", "far", "+1M"]);
    assert_eq!(reply.code(), 0, "{}", reply.err());
    qemu_img(scratch.path(), &["check", "-q", "far"]);
}

#[test]
fn an_l2_entry_far_behind_the_file_does_not_delay_the_next_allocation() {
    for zero in [0, 1] {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let options = "cluster_size=512,refcount_bits=64";
        qemu_img(scratch.path(), &["create", "-q", "-f", "qcow2", "-o", options, "far", "1M"]);
        let write = ["-c", "write -q 0 512", "far"];
        Program::new("qemu-io").args(write).directory(scratch.path()).succeed();
        let path = scratch.path().join("far");
        let mut bytes = fs::read(&path).expect("the image");
        let word = |bytes: &[u8], at: usize| {
            let word = u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
            usize::try_from(word & 0x00ff_ffff_ffff_fe00).expect("an offset")
        };
        let table = word(&bytes, word(&bytes, 40));
        let entry: u64 = 1 << 63 | 1 << 55 | zero;
        bytes[table..table + 8].copy_from_slice(&entry.to_be_bytes());
        fs::write(&path, bytes).expect("the image");
        // The first cluster cannot be written. The second cluster is new.
        let reply = bounded(scratch.path(), &["io", "-c", "write 0 1k", "far"]);
        assert_eq!(reply.code(), 1, "{}", reply.out());
    }
}

#[test]
fn thousands_of_unusable_bitmaps_of_a_huge_disk_take_little_memory() {
    const COUNT: u32 = 6_000;
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let options = "cluster_size=2M";
    qemu_img(scratch.path(), &["create", "-q", "-f", "qcow2", "-o", options, "many", "1024T"]);
    let path = scratch.path().join("many");
    let mut bytes = fs::read(&path).expect("the image");
    let place = bytes.len().next_multiple_of(2 << 20);
    bytes.resize(place, 0);
    for number in 0..COUNT {
        // Add an entry without a table, with the flag "in use", a granularity of 512 bytes, and a name of 8 bytes.
        bytes.extend([0; 12]);
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend([1, 9, 0, 8, 0, 0, 0, 0]);
        bytes.extend(format!("{number:08}").as_bytes());
    }
    let len = u64::try_from(bytes.len() - place).expect("a number");
    let place = u64::try_from(place).expect("a number");
    let mut extension = Vec::new();
    extension.extend([0x2385_2875_u32, 24, COUNT, 0].map(u32::to_be_bytes).concat());
    extension.extend([len, place, 0].map(u64::to_be_bytes).concat());
    let header = usize::try_from(u32::from_be_bytes(bytes[100..104].try_into().expect("4 bytes")));
    let header = header.expect("a length");
    bytes[header..header + extension.len()].copy_from_slice(&extension);
    bytes[95] |= 1;
    fs::write(&path, bytes).expect("the image");
    let reply = bounded(scratch.path(), &["img", "info", "many"]);
    assert_eq!(reply.code(), 0, "{}", reply.err());
    assert!(reply.out().contains("name: 00005999"), "the bitmaps are listed");
}

#[test]
fn a_disk_with_a_broken_snapshot_table_can_be_read_but_not_written() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let directory = scratch.path();
    qemu_img(directory, &["create", "-q", "-f", "qcow2", "broken", "1M"]);
    let write = ["-c", "write -q -P 3 0 64k", "broken"];
    Program::new("qemu-io").args(write).directory(directory).succeed();
    qemu_img(directory, &["snapshot", "-c", "s", "broken"]);
    let path = directory.join("broken");
    let mut bytes = fs::read(&path).expect("the image");
    let table = u64::from_be_bytes(bytes[64..72].try_into().expect("8 bytes"));
    // Write a length that is too large for the extra data of the first entry.
    bytes[usize::try_from(table).expect("an offset") + 36] = 0x80;
    fs::write(&path, &bytes).expect("the image");
    let said = "Too much extra metadata in snapshot table entry 0";
    for command in [
        &["img", "info", "broken"][..],
        &["img", "map", "broken"],
        &["img", "convert", "-O", "raw", "broken", "copy"],
        &["io", "-r", "-c", "read -P 3 0 64k", "broken"],
    ] {
        let reply = bounded(directory, command);
        assert_eq!(reply.code(), 0, "{command:?}: {}", reply.err());
        assert_eq!(reply.err().matches(said).count(), 1, "{command:?}: {}", reply.err());
    }
    let copy = fs::read(directory.join("copy")).expect("the copy");
    assert!(copy[..65_536].iter().all(|byte| *byte == 3) && copy.len() == 1 << 20);
    let list = bounded(directory, &["img", "snapshot", "-l", "broken"]);
    assert!(list.err().contains("check -r all"), "{}", list.err());
    for command in [
        &["img", "snapshot", "-l", "broken"][..],
        &["img", "convert", "-l", "s", "-O", "raw", "broken", "copy"],
    ] {
        let reply = bounded(directory, command);
        assert_eq!(reply.code(), 1, "{command:?}: {}", reply.out());
        assert!(reply.err().contains(&format!(": {said}")), "{command:?}: {}", reply.err());
    }
    for command in [
        &["io", "-c", "write 0 512", "broken"][..],
        &["io", "-r", "-c", "reopen -w", "-c", "write 0 512", "broken"],
        &["img", "resize", "broken", "+1M"],
    ] {
        let reply = bounded(directory, command);
        assert_eq!(reply.code(), 1, "{command:?}: {}", reply.out());
        assert!(reply.err().contains(said), "{command:?}: {}", reply.err());
        assert!(reply.err().contains("qemu-img convert"), "{command:?}: {}", reply.err());
    }
    assert!(fs::read(&path).expect("the image") == bytes, "nothing was written");
}
