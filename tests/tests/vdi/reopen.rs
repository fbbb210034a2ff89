//! Reopening VDI images. An image that becomes read-only is complete on disk. An image becomes writable only if no other
//! program has changed it.

use std::os::unix::fs::FileExt;

use oxblk::core::{Backend, Gate, Graph, OpenFlags, Options, WriteFlags};
use oxblk::ring::{IoBufMut, block_on};
use oxblk_tests::program::Program;

fn options(dotted: &str) -> Options {
    Options::from_dotted(dotted, None).expect("options")
}

async fn open(path: &std::path::Path, text: &str) -> Backend {
    let graph = Graph::new(oxblk::drivers(), Gate::Anything);
    let flags = OpenFlags { read_only: text.contains("read-only"), ..OpenFlags::default() };
    graph.open_backend(path.to_str(), options("driver=vdi"), flags).await.expect("an image")
}

fn new_image() -> (tempfile::TempDir, std::path::PathBuf) {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let path = scratch.path().join("image");
    Program::new("qemu-img").args(["create", "-q", "-f", "vdi"]).arg(&path).arg("8M").succeed();
    (scratch, path)
}

#[test]
fn an_image_becomes_read_only_and_writable_again() {
    let (_scratch, path) = new_image();
    block_on(async {
        let disk = open(&path, "").await;
        disk.write(5 << 20, vec![1; 512].into(), WriteFlags::empty()).await.expect("a write");
        disk.reopen(options("read-only=on")).await.expect("a reopen");
        Program::new("qemu-img").args(["check", "-q"]).arg(&path).succeed();
        assert_eq!(
            disk.write(0, vec![1].into(), WriteFlags::empty()).await.unwrap_err().raw_errno(),
            1
        );
        disk.reopen(options("read-only=off")).await.expect("a reopen");
        disk.write(2 << 20, vec![2; 512].into(), WriteFlags::empty()).await.expect("a write");
        disk.close().await.expect("it closes");
    });
    let reads = ["-c", "read -P 1 5M 512", "-c", "read -P 2 2M 512"];
    Program::new("qemu-io").args(["-f", "vdi"]).args(reads).arg(&path).succeed();
    Program::new("qemu-img").args(["check", "-q"]).arg(&path).succeed();
}

#[test]
fn an_image_that_another_program_has_changed_stays_read_only() {
    let (_scratch, path) = new_image();
    block_on(async {
        let disk = open(&path, "read-only").await;
        disk.read(0, IoBufMut::new(512)).await.expect("a read");
        let file = std::fs::File::options().write(true).open(&path).expect("the image");
        file.write_all_at(&0_u32.to_le_bytes(), 0x204).expect("the image");
        let refused = disk.reopen(options("read-only=off")).await.unwrap_err();
        assert!(refused.to_string().contains("changed while it was open read-only"), "{refused}");
        disk.close().await.expect("it closes");
    });
}

#[test]
fn an_image_that_is_opened_for_a_check_allocates_nothing() {
    let (_scratch, path) = new_image();
    let write = ["-c", "write -P 1 0 1M"];
    Program::new("qemu-io").args(["-f", "vdi"]).args(write).arg(&path).succeed();
    block_on(async {
        let graph = Graph::new(oxblk::drivers(), Gate::Anything);
        let flags = OpenFlags { check: true, ..OpenFlags::default() };
        let disk = graph.open_backend(path.to_str(), options("driver=vdi"), flags).await;
        let disk = disk.expect("an image");
        let refused = disk.write(5 << 20, vec![2; 512].into(), WriteFlags::empty()).await;
        assert!(refused.unwrap_err().to_string().contains("opened again"));
        disk.close().await.expect("it closes");
    });
    let read = ["-c", "read -P 1 0 1M"];
    Program::new("qemu-io").args(["-f", "vdi"]).args(read).arg(&path).succeed();
}
