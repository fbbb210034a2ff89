//! The tools open malicious images safely, and images with a huge virtual size as QEMU does.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

#[test]
fn info_opens_nothing_but_the_image_itself() {
    let both = Differential::new();
    for name in ["/etc/shadow", "json:{}", "nbd://127.0.0.1:1/x", "/dev/zero"] {
        let args = ["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", "a.qcow2", "1M"];
        both.qemu(Img, &args);
        both.same(Img, &["info", "a.qcow2"]);
    }
}

#[test]
fn a_given_format_overrides_probing() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "inner.qcow2", "64M"]);
    both.same(Img, &["info", "-f", "raw", "inner.qcow2"]);
    both.same(Img, &["convert", "-f", "raw", "-O", "raw", "inner.qcow2", "copy.raw"]);
    both.same_bytes("copy.raw");
    both.same(Img, &["resize", "-f", "raw", "inner.qcow2", "1M"]);
    both.same_bytes("inner.qcow2");
    both.same(Io, &["-f", "raw", "-c", "read -v 0 16", "inner.qcow2"]);
}

#[test]
fn an_image_of_a_huge_virtual_size_is_inspected_as_by_qemu() {
    let both = Differential::new();
    let args = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "huge.qcow2", "4P"];
    both.qemu(Img, &args);
    for line in ["info huge.qcow2", "map --output json huge.qcow2", "measure -O raw huge.qcow2"] {
        both.same(Img, &line.split(' ').collect::<Vec<_>>());
    }
}
