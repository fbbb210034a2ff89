//! Tests of file locks between this driver and the installed QEMU tools, in both directions.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::common::{error, graph, open_file, text};
use oxblk_core::create::Removal;
use oxblk_core::{Backend, OpenFlags, Options, Perm, Permissions};
use oxblk_ring::block_on;

/// A qemu-io process that keeps an image open until this value is dropped.
struct Holder(Child);

impl Holder {
    fn new(args: &[&str], path: &Path) -> Self {
        let mut child = Command::new("qemu-io")
            .args(args)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io is installed");
        // qemu-io answers the first command only after the image is open.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut answer).unwrap();
        assert!(answer.contains('B') || answer.contains("iB"), "{answer}");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn qcow2(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("disk.qcow2");
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg("1M")
        .status()
        .expect("qemu-img is installed");
    assert!(status.success());
    path
}

/// Opens the file with the permissions that a format driver takes: it writes and resizes, and shares neither
/// permission.
async fn open_as_format(path: &Path) -> oxblk_core::Result<Backend> {
    let options = format!("driver=file,filename={}", text(path));
    let graph = graph();
    let options = Options::from_dotted(&options, None)?;
    let node = graph.open(options, OpenFlags::default()).await?;
    Backend::new(
        &graph,
        "",
        node,
        Permissions {
            taken: Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE,
            shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
        },
    )
}

fn qemu_io(args: &[&str], path: &Path) -> (bool, String) {
    let output = Command::new("qemu-io").args(args).arg(path).output().unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn an_image_that_qemu_has_open_for_writing_is_refused_until_qemu_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path());
    let holder = Holder::new(&["-f", "qcow2"], &path);
    block_on(async {
        let refused = open_as_format(&path).await.err().unwrap();
        assert_eq!(refused.to_string(), "Failed to get \"write\" lock");
        let hint = format!("Is another process using the image [{}]?", text(&path));
        assert_eq!(refused.hint(), Some(hint.as_str()));
        assert_eq!(error(open_file(&path, "").await), "Failed to get \"write\" lock");
        let create = graph()
            .create_image(&text(&path), "file", &Options::from_dotted("size=0", None).unwrap())
            .await;
        assert_eq!(error(create), "Failed to get \"write\" lock");
        // A reader that shares all permissions is accepted, and so is a writer without locks.
        let options = ",read-only=on";
        open_file(&path, options).await.unwrap().close().await.unwrap();
        open_file(&path, ",locking=off").await.unwrap().close().await.unwrap();
    });
    drop(holder);
    block_on(async { open_as_format(&path).await.unwrap().close().await.unwrap() });
}

#[test]
fn a_new_image_that_another_process_has_opened_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new");
    let options = Options::from_dotted("size=1M", None).unwrap();
    let remove = async |meanwhile: Option<&[&str]>| {
        let graph = graph();
        let created = graph.create_image(&text(&path), "file", &options).await.unwrap();
        let holder = meanwhile.map(|arguments| Holder::new(arguments, &path));
        let mut removals = created.remove(&graph).await;
        drop(holder);
        assert!(graph.nodes().is_empty());
        let removal = removals.pop().unwrap();
        assert_eq!((removal.filename, removals.len()), (text(&path), 0));
        removal.outcome
    };
    block_on(async {
        let refused = error(remove(Some(&["-f", "raw"])).await);
        assert_eq!(refused, "Failed to get shared \"write\" lock");
        assert!(path.exists());
        std::fs::remove_file(&path).unwrap();
        // A reader that shares all permissions does not need the incomplete image.
        assert_eq!(remove(Some(&["-r", "-U", "-f", "raw"])).await.unwrap(), Removal::Removed);
        assert!(!path.exists());
        assert_eq!(remove(None).await.unwrap(), Removal::Removed);
        assert!(!path.exists());
    });
}

#[test]
fn an_image_open_for_writing_is_refused_to_qemu_until_it_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path());
    block_on(async {
        let disk = open_as_format(&path).await.unwrap();
        let (opened, message) = qemu_io(&["-f", "qcow2", "-c", "length"], &path);
        assert!(!opened);
        let hint = format!("Is another process using the image [{}]?", text(&path));
        assert!(message.contains("Failed to get \"write\" lock"), "{message}");
        assert!(message.contains(&hint), "{message}");
        let (opened, message) = qemu_io(&["-r", "-f", "qcow2", "-c", "length"], &path);
        assert!(!opened);
        assert!(message.contains("Failed to get shared \"write\" lock"), "{message}");
        let (opened, message) = qemu_io(&["-r", "-U", "-f", "qcow2", "-c", "length"], &path);
        assert!(opened, "{message}");
        disk.close().await.unwrap();
        let (opened, message) = qemu_io(&["-f", "qcow2", "-c", "length"], &path);
        assert!(opened, "{message}");
    });
}

#[test]
fn readers_of_qemu_and_of_this_driver_share_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path());
    let _holder = Holder::new(&["-r", "-f", "qcow2"], &path);
    block_on(async {
        let disk = open_file(&path, ",read-only=on").await.unwrap();
        assert_eq!(error(open_file(&path, "").await), "Failed to get \"write\" lock");
        disk.close().await.unwrap();
    });
}

#[test]
fn with_locking_off_qemu_may_open_the_image_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path());
    block_on(async {
        let disk = open_file(&path, ",locking=off").await.unwrap();
        let (opened, message) = qemu_io(&["-f", "qcow2", "-c", "length"], &path);
        assert!(opened, "{message}");
        disk.close().await.unwrap();
    });
}
