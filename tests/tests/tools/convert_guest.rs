//! A real guest disk, partitioned and with an ext4 root, is converted from raw to qcow2 and back without changes.

use std::path::Path;

use oxblk_tests::differential::check_clean;
use oxblk_tests::guest;
use oxblk_tests::program::Program;

fn convert(program: Program, from: (&str, &Path), to: (&str, &Path), options: &[&str]) {
    program
        .args(["convert", "-f", from.0, "-O", to.0])
        .args(options)
        .arg(from.1)
        .arg(to.1)
        .succeed();
}

fn ours() -> Program {
    Program::oxblk().arg("img")
}

fn qemu() -> Program {
    Program::new("qemu-img")
}

fn same_bytes(a: &Path, b: &Path) {
    Program::new("cmp").arg(a).arg(b).succeed();
}

fn same_content(a: &Path, b: &Path) {
    qemu().arg("compare").arg(a).arg(b).succeed();
    ours().arg("compare").arg(a).arg(b).succeed();
}

#[test]
fn a_guest_disk_converted_to_qcow2_and_back_is_identical_with_both_tools() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let raw = guest::disk::build(scratch.path());
    let path = |name: &str| scratch.path().join(name);
    let (ours_up, ours_down) = (path("ours.qcow2"), path("ours.raw"));
    convert(ours(), ("raw", &raw), ("qcow2", &ours_up), &[]);
    check_clean(&ours_up);
    same_content(&raw, &ours_up);
    convert(ours(), ("qcow2", &ours_up), ("raw", &ours_down), &[]);
    same_bytes(&raw, &ours_down);

    // Each tool reads the image that the other tool wrote.
    let (theirs_up, crossed, crossed_back) = (path("theirs.qcow2"), path("a.raw"), path("b.raw"));
    convert(qemu(), ("raw", &raw), ("qcow2", &theirs_up), &[]);
    convert(ours(), ("qcow2", &theirs_up), ("raw", &crossed), &[]);
    same_bytes(&raw, &crossed);
    convert(qemu(), ("qcow2", &ours_up), ("raw", &crossed_back), &[]);
    same_bytes(&raw, &crossed_back);
}

#[test]
fn a_guest_disk_survives_every_kind_of_compression_and_cluster() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let raw = guest::disk::build(scratch.path());
    for options in [
        &["-c"][..],
        &["-c", "-o", "compression_type=zstd"],
        &["-o", "cluster_size=4k,refcount_bits=1"],
        &["-o", "compat=0.10"],
        &["-o", "cluster_size=2M", "-W", "-m", "16"],
    ] {
        let image = scratch.path().join("image.qcow2");
        let back = scratch.path().join("back.raw");
        convert(ours(), ("raw", &raw), ("qcow2", &image), options);
        check_clean(&image);
        same_content(&raw, &image);
        convert(ours(), ("qcow2", &image), ("raw", &back), &[]);
        same_bytes(&raw, &back);
    }
}
