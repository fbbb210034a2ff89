//! `img snapshot` and the snapshot list of `img info`, compared with qemu-img.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

fn images() -> Differential {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "raw", "a.raw", "1M"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    both.qemu(Io, &["-c", "write -P 1 0 1M", "a.qcow2"]);
    both
}

/// Creates the same image with the same snapshots and dates in every directory.
fn with_snapshots() -> Differential {
    let both = images();
    let made = both.qemu_directory().join("a.qcow2");
    for name in ["one", "two words", "a name that is longer than its column"] {
        Program::new("qemu-img").args(["snapshot", "-c", name]).arg(&made).succeed();
    }
    let bytes = std::fs::read(&made).unwrap();
    both.file("a.qcow2", &bytes);
    both
}

#[test]
fn snapshots_are_listed_and_refused_as_by_qemu() {
    let both = with_snapshots();
    for line in [
        "snapshot a.qcow2",
        "snapshot -l a.qcow2",
        "snapshot --list -U a.qcow2",
        "snapshot -l -f raw a.raw",
        "snapshot -l -c x a.qcow2",
        "snapshot -l nofile",
        "snapshot -l",
        "snapshot -l a b",
        "snapshot -d nope a.qcow2",
        "snapshot -d 1 a.qcow2",
        "snapshot -a nope a.qcow2",
        "snapshot -c x -f raw a.raw",
        "info --output json a.qcow2",
        "info a.qcow2",
    ] {
        both.same(Img, &line.split(' ').collect::<Vec<_>>());
    }
}

/// Options that open the image through a raw node.
const THROUGH_RAW: &str = "driver=raw,file.driver=qcow2,file.file.filename=a.qcow2";

#[test]
fn a_raw_node_passes_snapshot_requests_to_the_image_below() {
    let both = with_snapshots();
    for line in [
        "info --image-opts",
        "info --output json --image-opts",
        "snapshot -l --image-opts",
        "snapshot -a nope --image-opts",
        "snapshot -d nope --image-opts",
        "snapshot -d one --image-opts",
        "snapshot -l --image-opts",
        "convert -l 2 -O raw n.raw --image-opts",
    ] {
        let words: Vec<_> = line.split(' ').chain([THROUGH_RAW]).collect();
        both.same(Img, &words);
    }
}

#[test]
fn a_snapshot_is_taken_and_applied_through_a_raw_image() {
    let both = images();
    let image = both.qemu_directory().join("a.qcow2");
    let through = format!("driver=raw,file.driver=qcow2,file.file.filename={}", image.display());
    let snapshot = |args: &[&str]| {
        Program::oxblk()
            .args(["img", "snapshot", "--image-opts"])
            .args(args)
            .arg(&through)
            .succeed();
        Program::new("qemu-img").arg("check").arg(&image).succeed();
    };
    snapshot(&["-c", "one"]);
    Program::new("qemu-img").args(["resize", "-q"]).arg(&image).arg("8M").succeed();
    Program::new("qemu-io").args(["-c", "write -q -P 2 0 5M"]).arg(&image).succeed();
    snapshot(&["-a", "one"]);
    let read = Program::new("qemu-io").args(["-c", "read -P 1 0 1M"]).arg(&image).succeed();
    assert!(!read.out().contains("failed"));
    let info = Program::new("qemu-img").arg("info").arg(&image).succeed();
    assert!(info.out().contains("virtual size: 4 MiB"));
    snapshot(&["-d", "one"]);
}

#[test]
fn each_tool_continues_the_snapshots_of_the_other() {
    let both = images();
    let (ours, theirs) = (Program::oxblk, || Program::new("qemu-img"));
    let image = both.qemu_directory().join("a.qcow2");
    let img = |tool: bool, args: &[&str]| {
        let program = if tool { ours().arg("img") } else { theirs() };
        program.args(args).arg(&image).succeed();
        theirs().arg("check").arg(&image).succeed();
    };
    let io = |command: &str| Program::new("qemu-io").args(["-c", command]).arg(&image).succeed();
    for (create, other) in [(true, false), (false, true)] {
        io("write -P 2 0 2M");
        img(create, &["snapshot", "-c", "two"]);
        io("write -P 3 0 3M");
        img(other, &["snapshot", "-c", "three"]);
        io("write -P 4 0 4M");
        img(other, &["snapshot", "-a", "two"]);
        assert!(!io("read -P 2 0 2M").out().contains("failed"));
        img(create, &["snapshot", "-a", "three"]);
        assert!(!io("read -P 3 0 3M").out().contains("failed"));
        img(other, &["snapshot", "-d", "two"]);
        img(create, &["snapshot", "-d", "three"]);
        assert!(!io("read -P 3 0 3M").out().contains("failed"));
    }
}

#[test]
fn a_snapshot_can_be_converted_and_measured_instead_of_the_active_state() {
    let both = images();
    both.prepare(|directory| {
        let image = directory.join("a.qcow2");
        let img = |args: &[&str]| Program::new("qemu-img").args(args).arg(&image).succeed();
        let io = |command: &str| {
            Program::new("qemu-io").args(["-c", command]).arg(&image).succeed();
        };
        img(&["snapshot", "-c", "one"]);
        io("write -P 2 512k 2M");
        img(&["snapshot", "-c", "1"]);
        io("write -P 3 0 4M");
    });
    for snapshot in [
        "one",
        "1",
        "2",
        "3",
        "",
        "snapshot.name=1",
        "snapshot.id=1,snapshot.name=one",
        "snapshot.id=2,snapshot.name=one",
        "snapshot.id=2",
        "snapshot.foo=2",
    ] {
        both.prepare(|directory| drop(std::fs::remove_file(directory.join("out.raw"))));
        let code = both.same(Img, &["convert", "-l", snapshot, "-O", "raw", "a.qcow2", "out.raw"]);
        if code.code() == 0 {
            both.same_content("out.raw");
        }
        both.same(Img, &["measure", "-O", "qcow2", "-l", snapshot, "a.qcow2"]);
    }
    both.same(Img, &["convert", "-l", "one", "a.qcow2", "a.qcow2", "-O", "raw", "out.raw"]);
    both.same(Img, &["convert", "-f", "raw", "-l", "one", "a.raw", "-O", "raw", "out.raw"]);
    both.same(Img, &["measure", "-f", "raw", "-l", "one", "a.raw"]);
}

#[test]
fn a_snapshot_of_another_size_is_converted_completely() {
    let scratch = tempfile::tempdir().unwrap();
    let (image, out) = (scratch.path().join("a.qcow2"), scratch.path().join("out.raw"));
    let img = |args: &[&str]| Program::oxblk().arg("img").args(args).arg(&image).succeed();
    Program::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("4M").succeed();
    Program::new("qemu-io").args(["-c", "write -P 1 0 4M"]).arg(&image).succeed();
    img(&["snapshot", "-c", "large"]);
    Program::new("qemu-img").args(["resize", "-q", "--shrink"]).arg(&image).arg("1M").succeed();
    let convert = ["img", "convert", "-l", "large", "-O", "raw"];
    Program::oxblk().args(convert).arg(&image).arg(&out).succeed();
    assert!(std::fs::read(&out).unwrap() == vec![1; 4 << 20]);
}
