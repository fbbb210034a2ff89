//! Run-time options of a qcow2 image, compared with the QEMU tools, and temporary overlays.

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Error, Preallocation, WriteFlags};
use oxblk_ring::{IoBuf, sim};
use oxblk_tests::crash::change::{assert_sound, contents, image, open};
use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

/// Whether an image has the dirty bit set.
fn is_dirty(bytes: &[u8]) -> bool {
    bytes[79] & 1 == 1
}

#[test]
fn lazy_refcounts_are_written_when_the_image_is_closed() {
    let disk = image(1, &["-o", "cluster_size=4k", "image", "1M"], &[]);
    let outcome = sim::run(1, async {
        let disk_open = open(&disk, ",lazy-refcounts=on", false).await?;
        assert!(!is_dirty(&disk.bytes()), "nothing has been allocated");
        disk_open.write(0, IoBuf::from(vec![7; 300_000]), WriteFlags::empty()).await?;
        disk_open.flush().await?;
        // After a power cut at this moment, the image has all data, but its refcounts must be rebuilt.
        let left = disk.after_power_loss_none();
        assert!(is_dirty(&left.bytes()));
        let again = open(&left, "", false).await?;
        assert!(contents(&again).await.iter().take(300_000).all(|byte| *byte == 7));
        again.close().await?;
        assert_sound(&left, false, "after a power cut").await;
        // Snapshots and resizes first write correct refcounts. After these operations, refcounts are lazy again.
        disk_open.create_snapshot(&SnapshotInfo::default()).await?;
        disk_open.write(0, IoBuf::from(vec![8; 100_000]), WriteFlags::empty()).await?;
        disk_open.discard(200_000, 100_000).await?;
        disk_open.resize(2 << 20, Preallocation::Off).await?;
        disk_open.flush().await?;
        disk_open.close().await?;
        assert!(!is_dirty(&disk.bytes()));
        assert_sound(&disk, false, "closed").await;
        Ok::<_, Error>(())
    });
    outcome.unwrap();
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_reopened_for_writing() {
    let directory = tempfile::tempdir().unwrap();
    let run =
        |program: Program, args: &[&str]| program.args(args).directory(directory.path()).run();
    run(Program::new("qemu-img"), &words("create -q -f qcow2 a.qcow2 10M"));
    let lazy = "driver=qcow2,file.filename=a.qcow2,lazy-refcounts=on";
    run(Program::new("qemu-io"), &["-c", "write -P 1 0 1M", "-c", "abort", "--image-opts", lazy]);
    let path = directory.path().join("a.qcow2");
    assert!(is_dirty(&std::fs::read(&path).unwrap()), "QEMU left it dirty");
    let commands = [
        "io",
        "-r",
        "-c",
        "read -P 1 0 1M",
        "-c",
        "reopen -w",
        "-c",
        "write -P 2 1M 1M",
        "a.qcow2",
    ];
    let reply = run(Program::oxblk(), &commands);
    assert_eq!(reply.code(), 0, "{}{}", reply.out(), reply.err());
    assert!(!reply.out().contains("failed"), "{}", reply.out());
    assert!(!is_dirty(&std::fs::read(&path).unwrap()));
    let reply = run(Program::new("qemu-img"), &["check", "a.qcow2"]);
    assert_eq!(reply.code(), 0, "{}", reply.out());
    let read = ["-c", "read -P 1 0 1M", "-c", "read -P 2 1M 1M", "a.qcow2"];
    assert!(!run(Program::new("qemu-io"), &read).out().contains("failed"));
}

#[test]
fn options_are_accepted_and_refused_as_by_qemu() {
    let both = Differential::new();
    both.qemu(Img, &words("create -q -f qcow2 a.qcow2 10M"));
    both.qemu(Img, &words("create -q -f qcow2 -o compat=0.10 old.qcow2 10M"));
    for (image, options) in [
        ("old", "lazy-refcounts=on"),
        ("old", "discard-no-unref=on"),
        ("old", "lazy-refcounts=off,pass-discard-other=on"),
        ("a", "lazy-refcounts=on"),
        ("a", "lazy-refcounts=x"),
        ("a", "overlap-check=foo"),
        ("a", "overlap-check=none"),
        ("a", "overlap-check=constant"),
        ("a", "overlap-check=all"),
        ("a", "overlap-check.template=cached,overlap-check.main-header=off"),
        ("a", "overlap-check.template=foo"),
        ("a", "overlap-check.main-header=x"),
        ("a", "overlap-check.foo=on"),
        ("a", "cache-clean-interval=x"),
        ("a", "cache-clean-interval=5"),
        ("a", "cache-clean-interval=99999999999"),
        ("a", "pass-discard-request=on,pass-discard-snapshot=off,pass-discard-other=on"),
        ("a", "pass-discard-request=x"),
        ("a", "discard-no-unref=on"),
    ] {
        let image = format!("driver=qcow2,file.filename={image}.qcow2,{options}");
        both.same(Io, &["-c", "write -P 1 0 128k", "-c", "discard 0 64k", "--image-opts", &image]);
    }
    both.same_content("a.qcow2");
    both.same_content("old.qcow2");
}

#[test]
fn discarded_clusters_stay_allocated_if_the_options_say_so() {
    let both = Differential::new();
    both.qemu(Img, &words("create -q -f qcow2 a.qcow2 10M"));
    both.qemu(Io, &["-c", "write -P 1 0 1M", "a.qcow2"]);
    let image = "driver=qcow2,file.filename=a.qcow2,discard-no-unref=on,discard=unmap";
    both.same(Io, &["-c", "discard 64k 512k", "-c", "read -P 0 64k 512k", "--image-opts", image]);
    both.same_content("a.qcow2");
    both.same(Img, &words("map --output=json a.qcow2"));
    both.same(Io, &["-c", "write -P 3 128k 128k", "-c", "read -P 3 128k 128k", "a.qcow2"]);
    both.same_content("a.qcow2");
    // The write has used the clusters that were kept.
    both.same(Img, &words("map --output=json a.qcow2"));
    // QEMU leaves holes in the file where such a cluster is written in part, so the maps would differ.
    both.same(Io, &["-c", "write -P 4 300k 100k", "-c", "read -P 4 300k 100k", "a.qcow2"]);
    both.same_content("a.qcow2");
    both.same(Img, &words("check a.qcow2"));
}

#[test]
fn discards_reach_the_host_if_the_options_say_so() {
    use std::os::unix::fs::MetadataExt;
    for (options, kept) in [("pass-discard-request=off", true), ("pass-discard-request=on", false)]
    {
        let directory = tempfile::tempdir().unwrap();
        let run = |program: Program, args: &[&str]| {
            program.args(args).directory(directory.path()).succeed()
        };
        run(Program::new("qemu-img"), &words("create -q -f qcow2 a.qcow2 10M"));
        run(Program::new("qemu-io"), &["-c", "write -P 1 0 4M", "a.qcow2"]);
        let image = format!("driver=qcow2,file.filename=a.qcow2,discard=unmap,{options}");
        run(Program::oxblk(), &["io", "-c", "discard 0 4M", "--image-opts", &image]);
        run(Program::new("qemu-img"), &["check", "-q", "a.qcow2"]);
        let blocks = std::fs::metadata(directory.path().join("a.qcow2")).unwrap().blocks();
        assert_eq!(blocks * 512 > 4 << 20, kept, "{options}: {blocks} blocks");
    }
}

#[test]
fn writes_to_a_temporary_snapshot_are_dropped() {
    let both = Differential::new();
    both.qemu(Img, &words("create -q -f qcow2 a.qcow2 10M"));
    both.qemu(Io, &["-c", "write -P 1 0 1M", "a.qcow2"]);
    both.file("odd.raw", &[5; 1000]);
    let raw = ["-s", "-f", "raw", "-c", "write -P 4 100 200", "-c", "read -v 90 20", "odd.raw"];
    let lines: [&[&str]; 5] = [
        &[
            "-s",
            "-c",
            "write -P 2 512k 1M",
            "-c",
            "read -P 2 512k 1M",
            "-c",
            "read -P 1 0 512k",
            "a.qcow2",
        ],
        &["-s", "-c", "length", "-c", "flush", "-c", "discard 0 64k", "a.qcow2"],
        &["-s", "-r", "-c", "read -P 1 0 1M", "-c", "write 0 1k", "a.qcow2"],
        &["-c", "open -s a.qcow2", "-c", "write -P 3 0 1M", "-c", "close"],
        &raw,
    ];
    for line in lines {
        both.same(Io, line);
    }
    both.same_bytes("a.qcow2");
    both.same_bytes("odd.raw");
}

/// Creates an image with 64 KiB clusters and one L2 table. `spoil` changes its bytes.
fn spoilt(directory: &std::path::Path, spoil: impl Fn(&mut [u8])) {
    let run = |program: Program, args: &[&str]| program.args(args).directory(directory).run();
    run(Program::new("qemu-img"), &words("create -q -f qcow2 a.qcow2 1G"));
    run(Program::new("qemu-io"), &["-c", "write -P 1 0 64k", "a.qcow2"]);
    let path = directory.join("a.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    spoil(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn a_write_that_would_overwrite_metadata_is_refused() {
    // Offsets: refcount table at 0x1_0000, refcount block at 0x2_0000, L1 table at 0x3_0000, L2 table at 0x4_0000.
    let put = |bytes: &mut [u8], at: usize, value: u64| {
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    };
    type Spoil<'a> = &'a dyn Fn(&mut [u8]);
    let block_on_l1: Spoil<'_> = &|bytes| put(bytes, 0x1_0000, 0x3_0000);
    let l2_on_block: Spoil<'_> = &|bytes| put(bytes, 0x3_0000, (1 << 63) | 0x2_0000);
    let l2_on_l1: Spoil<'_> = &|bytes| put(bytes, 0x3_0000, (1 << 63) | 0x3_0000);
    for (spoil, found) in [
        (block_on_l1, "Preventing invalid allocation of 1 clusters"),
        (l2_on_block, "refcount block (overlaps with active L2 table)"),
        (l2_on_l1, "active L1 table (overlaps with active L2 table)"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        spoilt(directory.path(), spoil);
        let path = directory.path().join("a.qcow2");
        let before = std::fs::read(&path).unwrap();
        let write = ["io", "-c", "write -P 2 512M 64k", "-c", "flush", "a.qcow2"];
        let reply = Program::oxblk().args(write).directory(directory.path()).run();
        let output = format!("{}{}", reply.out(), reply.err());
        assert!(output.contains("Marking image as corrupt"), "{found}: {output}");
        assert!(output.contains(found), "{found}: {output}");
        let after = std::fs::read(&path).unwrap();
        assert_eq!(after[79] & 2, 2, "{found}: not marked corrupt");
        // The tables are unchanged, but refcounts may be too high.
        assert!(before[0x3_0000..0x5_0000] == after[0x3_0000..0x5_0000], "{found}: overwritten");
    }
}

#[test]
fn disabled_overlap_checks_report_no_overlap() {
    let directory = tempfile::tempdir().unwrap();
    spoilt(directory.path(), |bytes| {
        bytes[0x1_0000..0x1_0008].copy_from_slice(&0x3_0000_u64.to_be_bytes());
    });
    let image = "driver=qcow2,file.filename=a.qcow2,overlap-check=none";
    let write = ["io", "-c", "write -P 2 0 64k", "--image-opts", image];
    let reply = Program::oxblk().args(write).directory(directory.path()).run();
    assert!(!reply.err().contains("corrupt"), "{}", reply.err());
    // A reopen turns the overlap checks on.
    spoilt(directory.path(), |bytes| {
        bytes[0x3_0000..0x3_0008].copy_from_slice(&(1 << 63 | 0x2_0000_u64).to_be_bytes());
    });
    let reopen = "reopen -o overlap-check=cached";
    let write = ["io", "-c", reopen, "-c", "write -P 2 512M 64k", "--image-opts", image];
    let reply = Program::oxblk().args(write).directory(directory.path()).run();
    assert!(reply.err().contains("Preventing invalid write"), "{}{}", reply.out(), reply.err());
}
