//! oxblk creates the same qcow2 images as `qemu-img create`: the same bytes where qemu-img's layout is fixed, and valid images
//! in all cases.

use std::path::Path;

use oxblk::core::{Graph, Options, Result};
use oxblk::ring::block_on;
use oxblk_tests::differential::check_clean;
use oxblk_tests::program::Program;

/// Creates the same image with qemu-img and with oxblk. Returns the two paths.
fn both(directory: &Path, options: &str, size: &str) -> [std::path::PathBuf; 2] {
    let theirs = directory.join("theirs.qcow2");
    let ours = directory.join("ours.qcow2");
    let mut qemu = Program::new("qemu-img").args(["create", "-q", "-u", "-f", "qcow2"]);
    if !options.is_empty() {
        qemu = qemu.args(["-o", options]);
    }
    qemu.arg(&theirs).arg(size).succeed();
    create_ours(&ours, options, size).unwrap();
    [theirs, ours]
}

fn create_ours(path: &Path, options: &str, size: &str) -> Result<()> {
    let mut options = Options::from_dotted(options, None)?;
    options.insert("size", size);
    let path = path.to_str().expect("a path in UTF-8");
    block_on(async {
        Graph::new(oxblk::drivers(), oxblk_core::Gate::Anything)
            .create_image(path, "qcow2", &options)
            .await
            .map(drop)
    })
}

#[test]
fn new_images_are_the_same_bytes() {
    let cases = [
        ("", "64M"),
        ("", "0"),
        ("", "1"),
        ("", "513"),
        ("", "1T"),
        ("compat=0.10", "1G"),
        ("compat=v2,cluster_size=512", "1M"),
        ("cluster_size=512", "1M"),
        ("cluster_size=4k", "100M"),
        ("cluster_size=8k", "100M"),
        ("cluster_size=2M", "10T"),
        ("refcount_bits=1", "64M"),
        ("refcount_bits=2", "64M"),
        ("refcount_bits=8", "64M"),
        ("refcount_bits=64", "64M"),
        ("lazy_refcounts=on", "64M"),
        ("compression_type=zstd", "64M"),
        ("backing_file=base.qcow2,backing_fmt=qcow2", "64M"),
        ("backing_file=base.raw,backing_fmt=raw,compat=0.10", "64M"),
        ("backing_file=base,backing_fmt=raw,cluster_size=512", "1M"),
        ("preallocation=metadata", "64M"),
        ("preallocation=metadata", "1200M"),
        ("extended_l2=on", "64M"),
        ("extended_l2=on,cluster_size=16k", "5G"),
        ("extended_l2=on,preallocation=metadata", "64M"),
        ("extended_l2=on,cluster_size=16k,preallocation=metadata", "8M"),
        ("preallocation=metadata,compat=0.10,cluster_size=4k", "3M"),
        ("preallocation=metadata,refcount_bits=1", "8M"),
    ];
    for (options, size) in cases {
        let scratch = tempfile::tempdir().unwrap();
        let [theirs, ours] = both(scratch.path(), options, size);
        let same = Program::new("cmp").arg(&theirs).arg(&ours).run();
        assert!(same.status.success(), "{options} {size}: {}{}", same.out(), same.err());
    }
}

#[test]
fn large_and_preallocated_images_are_sound_and_read_as_zeroes() {
    let cases = [
        ("cluster_size=512", "1G"),
        ("cluster_size=512,refcount_bits=64", "200M"),
        ("preallocation=metadata,cluster_size=4k", "64M"),
        ("preallocation=metadata,cluster_size=512,refcount_bits=64", "4M"),
        ("preallocation=metadata", "5G"),
        ("preallocation=falloc", "64M"),
        ("preallocation=full", "64M"),
        ("preallocation=full,compat=0.10,cluster_size=1k", "1M"),
    ];
    for (options, size) in cases {
        let scratch = tempfile::tempdir().unwrap();
        let [theirs, ours] = both(scratch.path(), options, size);
        check_clean(&ours);
        let compare = Program::new("qemu-img").arg("compare").arg(&theirs).arg(&ours).run();
        assert!(compare.status.success(), "{options}: {}", compare.out());
        if !options.contains("preallocation") {
            continue;
        }
        let map = |image: &Path| {
            let map = Program::new("qemu-img").args(["map", "--output=json"]).arg(image).succeed();
            map.out().matches("\"data\": true").count()
        };
        assert_eq!(map(&ours) > 0, map(&theirs) > 0, "{options}");
    }
}

#[test]
fn impossible_options_are_refused_with_qemus_messages() {
    let long = "x".repeat(1024);
    let long_backing = format!("backing_file={long},backing_fmt=raw");
    let no_room = format!("backing_file={},backing_fmt=raw,cluster_size=512", &long[..500]);
    let cases = [
        ("cluster_size=300", "1M"),
        ("cluster_size=4M", "1M"),
        ("compat=0.9", "1M"),
        ("compat=0.10,lazy_refcounts=on", "1M"),
        ("refcount_bits=3", "1M"),
        ("compat=0.10,refcount_bits=8", "1M"),
        ("compression_type=lzo", "1M"),
        ("compat=0.10,compression_type=zstd", "1M"),
        ("preallocation=foo", "1M"),
        ("preallocation=full,backing_file=a,backing_fmt=raw", "1M"),
        ("data_file_raw=on", "1M"),
        ("foo=1", "1M"),
        ("", "7E"),
        ("cluster_size=512", "200G"),
        (long_backing.as_str(), "1M"),
        (no_room.as_str(), "1M"),
    ];
    for (options, size) in cases {
        let scratch = tempfile::tempdir().unwrap();
        let mut qemu = Program::new("qemu-img").directory(scratch.path());
        qemu = qemu.args(["create", "-q", "-u", "-f", "qcow2"]);
        if !options.is_empty() {
            qemu = qemu.args(["-o", options]);
        }
        let theirs = qemu.arg("new").arg(size).run();
        let theirs = theirs.err();
        let error = create_ours(&scratch.path().join("new"), options, size).unwrap_err();
        assert_eq!(format!("qemu-img: new: {error}"), theirs.trim_end(), "{options} {size}");
    }
}
