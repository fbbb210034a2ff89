//! Reopening VPC images. An image that becomes read-only is complete on disk. An image becomes writable only if no other
//! program has changed it.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use oxblk::core::check::Fix;
use oxblk::core::{Backend, Gate, Graph, OpenFlags, Options, WriteFlags};
use oxblk::ring::{IoBufMut, block_on};
use oxblk_tests::program::Program;

fn options(dotted: &str) -> Options {
    Options::from_dotted(dotted, None).expect("options")
}

async fn open(path: &Path, read_only: bool) -> Backend {
    open_with(path, read_only, "").await
}

async fn open_with(path: &Path, read_only: bool, more: &str) -> Backend {
    let graph = Graph::new(oxblk::drivers(), Gate::Anything);
    let flags = OpenFlags { read_only, ..OpenFlags::default() };
    graph
        .open_backend(path.to_str(), options(&format!("driver=vpc{more}")), flags)
        .await
        .expect("an image")
}

fn new_image(options: &str) -> (tempfile::TempDir, PathBuf) {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let path = scratch.path().join("image");
    let create = Program::new("qemu-img").args(["create", "-q", "-f", "vpc", "-o", options]);
    create.arg(&path).arg("16M").succeed();
    (scratch, path)
}

fn assert_complete(path: &Path) {
    Program::oxblk().args(["img", "check", "-f", "vpc"]).arg(path).succeed();
}

#[test]
fn an_image_becomes_read_only_and_writable_again() {
    for subformat in ["subformat=dynamic", "subformat=fixed"] {
        let (_scratch, path) = new_image(subformat);
        block_on(async {
            let disk = open(&path, false).await;
            disk.write(5 << 20, vec![1; 512].into(), WriteFlags::empty()).await.expect("a write");
            disk.reopen(options("read-only=on")).await.expect("a reopen");
            assert_complete(&path);
            let refused = disk.write(0, vec![1].into(), WriteFlags::empty()).await.unwrap_err();
            assert_eq!(refused.raw_errno(), 1);
            disk.reopen(options("read-only=off")).await.expect("a reopen");
            disk.write(2 << 20, vec![2; 512].into(), WriteFlags::empty()).await.expect("a write");
            disk.close().await.expect("it closes");
        });
        let reads = ["-c", "read -P 1 5M 512", "-c", "read -P 2 2M 512", "-c", "read -P 0 0 2M"];
        let said = Program::new("qemu-io").args(["-f", "vpc"]).args(reads).arg(&path).succeed();
        assert!(!said.out().contains("verification failed"), "{}", said.out());
        assert_complete(&path);
    }
}

#[test]
fn an_image_that_another_program_has_changed_stays_read_only() {
    let (_scratch, path) = new_image("subformat=dynamic");
    block_on(async {
        let disk = open(&path, true).await;
        disk.read(0, IoBufMut::new(512)).await.expect("a read");
        let file = std::fs::File::options().write(true).open(&path).expect("the image");
        file.write_all_at(&[0, 0, 0, 4], 0x604).expect("the image");
        let refused = disk.reopen(options("read-only=off")).await.unwrap_err();
        assert!(refused.to_string().contains("changed while it was open read-only"), "{refused}");
        disk.close().await.expect("it closes");
    });
}

/// Changes bytes of the footer at `place`, and corrects the checksum of the footer.
fn change_footer(path: &Path, place: u64, offset: usize, bytes: &[u8]) {
    let file = std::fs::File::options().read(true).write(true).open(path).expect("the image");
    let mut footer = [0; 512];
    file.read_exact_at(&mut footer, place).expect("a footer");
    footer[offset..offset + bytes.len()].copy_from_slice(bytes);
    footer[64..68].fill(0);
    let sum = footer.iter().fold(0_u32, |sum, byte| sum + u32::from(*byte));
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    file.write_all_at(&footer, place).expect("a footer");
}

#[test]
fn the_size_rule_of_the_open_holds_for_reopen_and_check() {
    // The geometry gives a disk of about 16 MiB. The other size field is 64 GiB. The BAT and the file are too small
    // for a disk of this size.
    for (subformat, rule) in [
        ("subformat=dynamic", ""),
        ("subformat=dynamic", ",force_size_calc=chs"),
        ("subformat=fixed", ""),
        ("subformat=fixed", ",force_size_calc=chs"),
    ] {
        let (_scratch, path) = new_image(subformat);
        let end = std::fs::metadata(&path).expect("the image").len() - 512;
        let places = if subformat == "subformat=fixed" { vec![end] } else { vec![0, end] };
        for place in places {
            change_footer(&path, place, 48, &(64_u64 << 30).to_be_bytes());
            if !rule.is_empty() {
                // Set a creator application that stores the size in the other field.
                change_footer(&path, place, 28, b"qem2");
            }
        }
        block_on(async {
            let disk = open_with(&path, true, rule).await;
            disk.reopen(options("read-only=off")).await.expect("a reopen");
            let node = disk.node().expect("the image");
            let check = node.driver().check().expect("a format with a check");
            let report = check.check(Fix::Nothing, &|_| ()).await.expect("a check");
            assert_eq!(report.corruptions, 0, "{subformat}{rule}");
            disk.close().await.expect("it closes");
        });
    }
}
