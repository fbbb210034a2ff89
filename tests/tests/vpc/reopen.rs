//! Reopening VPC images. An image that becomes read-only is complete on disk. An image becomes writable only if no other
//! program has changed it.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use oxblk::core::{Backend, Gate, Graph, OpenFlags, Options, WriteFlags};
use oxblk::ring::{IoBufMut, block_on};
use oxblk_tests::program::Program;

fn options(dotted: &str) -> Options {
    Options::from_dotted(dotted, None).expect("options")
}

async fn open(path: &Path, read_only: bool) -> Backend {
    let graph = Graph::new(oxblk::drivers(), Gate::Anything);
    let flags = OpenFlags { read_only, ..OpenFlags::default() };
    graph.open_backend(path.to_str(), options("driver=vpc"), flags).await.expect("an image")
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
