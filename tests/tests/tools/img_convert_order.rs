//! `img convert` writes the same bytes on every run (encrypted images: the same layout), and stores data in guest order. The
//! progress has the steps of qemu-img.

use std::path::Path;

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};
use serde_json::Value;

/// Returns a disk with holes, stored zeroes, random bytes, and text that compresses well.
fn disk() -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = vec![0; 12 << 20];
    for (index, block) in bytes.chunks_mut(40_000).enumerate() {
        if index % 7 < 2 {
            continue;
        }
        for byte in block.iter_mut() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let random = state.to_be_bytes()[0];
            *byte = if index % 2 == 0 { random } else { b'a' + random % 4 };
        }
    }
    bytes
}

fn ours(directory: &Path) -> Program {
    Program::oxblk().arg("img").directory(directory)
}

#[test]
fn a_conversion_makes_the_same_bytes_with_any_number_of_threads() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    std::fs::write(scratch.path().join("disk.raw"), disk()).expect("a disk");
    for options in [
        "",
        "-o cluster_size=4k",
        "-o extended_l2=on",
        "-m 1",
        "-m 16",
        "-c",
        "-c -m 16",
        "-c -o compression_type=zstd,cluster_size=4k",
    ] {
        let converted = [1, 2, 8].map(|threads| {
            let line = format!("convert --threads {threads} -O qcow2 {options} disk.raw out.qcow2");
            let convert = ours(scratch.path()).args(line.split_whitespace());
            // In the run with the most threads, hand-overs between threads are delayed at random.
            let convert = if threads == 8 { convert.perturbed(1) } else { convert };
            convert.succeed();
            std::fs::read(scratch.path().join("out.qcow2")).expect("an image")
        });
        assert!(converted[0] == converted[1] && converted[0] == converted[2], "[{options}]");
    }
}

/// Returns the data extents of an image: guest offset, length, host offset.
fn layout(image: &Path) -> Vec<(u64, u64, Option<u64>)> {
    let map = Program::new("qemu-img").args(["map", "--output=json"]).arg(image).succeed();
    let map: Value = serde_json::from_slice(&map.stdout).expect("JSON");
    let number = |extent: &Value, key: &str| extent.get(key).and_then(Value::as_u64);
    let extents = map.as_array().expect("a list").iter();
    let data = extents.filter(|extent| extent.get("data") == Some(&Value::Bool(true)));
    let place = |extent: &Value| {
        let (start, length) = (number(extent, "start"), number(extent, "length"));
        (start.expect("start"), length.expect("length"), number(extent, "offset"))
    };
    data.map(place).collect()
}

/// Returns the layout of an encrypted image: its L2 table as stored on disk.
fn entries(image: &Path) -> Vec<u8> {
    let bytes = std::fs::read(image).expect("an image");
    let word =
        |at: usize| bytes.get(at..at + 8).map(|word| word.try_into().map(u64::from_be_bytes));
    let word =
        |at: usize| usize::try_from(word(at).expect("in the file").expect("8 bytes")).unwrap();
    let offset = |at: usize| word(at) & 0x00ff_ffff_ffff_fe00;
    let table = offset(offset(40));
    bytes.get(table..table + (64 << 10)).expect("a table").to_vec()
}

#[test]
fn data_is_stored_in_guest_order() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    std::fs::write(scratch.path().join("disk.raw"), disk()).expect("a disk");
    for options in ["", "-o cluster_size=4k", "-o cluster_size=2M"] {
        let line = format!("convert -O qcow2 {options} disk.raw out.qcow2");
        ours(scratch.path()).args(line.split_whitespace()).succeed();
        let hosts = layout(&scratch.path().join("out.qcow2"));
        let hosts: Vec<u64> = hosts.iter().filter_map(|(_, _, host)| *host).collect();
        assert!(hosts.is_sorted() && !hosts.is_empty(), "[{options}]: {hosts:?}");
    }
}

#[test]
fn an_encrypted_image_has_the_same_layout_on_every_run() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    std::fs::write(scratch.path().join("disk.raw"), disk()).expect("a disk");
    let image = scratch.path().join("out.qcow2");
    let runs = ["1", "8"].map(|threads| {
        let line = format!(
            "convert --threads {threads} --object secret,id=key,data=word -O qcow2 -o encrypt.format=luks,\
             encrypt.key-secret=key,encrypt.iter-time=10 disk.raw out.qcow2"
        );
        ours(scratch.path()).args(line.split_whitespace()).succeed();
        entries(&image)
    });
    assert!(runs[0] == runs[1]);
}

#[test]
fn progress_counts_only_data_and_has_the_steps_of_qemu() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "raw", "disk.raw", "100M"]);
    both.qemu(Io, &["-f", "raw", "-c", "write -q -P 1 50M 3M", "disk.raw"]);
    both.qemu(Img, &["create", "-q", "-f", "raw", "long.raw", "120M"]);
    both.qemu(Io, &["-f", "raw", "-c", "write -q -P 1 50M 3M", "long.raw"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "top.qcow2"]);
    for line in [
        "convert -p -O qcow2 disk.raw out.qcow2",
        "convert -p -S 0 disk.raw out.raw",
        "convert -p -n disk.raw out.raw",
        "compare -p disk.raw disk.raw",
        "compare -p disk.raw long.raw",
        "rebase -p -f qcow2 -b long.raw -F raw top.qcow2",
    ] {
        both.same(Img, &line.split(' ').collect::<Vec<_>>());
    }
}

#[test]
fn a_strict_comparison_also_compares_allocation() {
    let both = Differential::new();
    let image = |name, commands: &[&str]| {
        both.qemu(Img, &["create", "-q", "-f", "qcow2", name, "1M"]);
        for command in commands {
            both.qemu(Io, &["-c", command, name]);
        }
    };
    image("plain", &["write -q -P 3 0 1M"]);
    image("packed", &["write -q -c -P 3 0 64k", "write -q -P 3 64k 960k"]);
    image("kept", &["write -q -P 3 0 64k", "write -q -z 0 64k"]);
    image("zero", &["write -q -z 0 64k"]);
    image("short", &["write -q -z 0 64k", "write -q -P 0 128k 64k"]);
    image("long", &["write -q -z 0 64k", "write -q -P 0 128k 64k", "write -q -P 3 512k 64k"]);
    for (one, other) in [
        ("plain", "plain"),
        ("plain", "packed"),
        ("kept", "zero"),
        ("zero", "short"),
        ("short", "long"),
    ] {
        both.same(Img, &["compare", "-s", one, other]);
        both.same(Img, &["compare", "-s", other, one]);
    }
}
