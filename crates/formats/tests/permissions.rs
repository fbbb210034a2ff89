//! Users of one node with conflicting permissions. The error messages must equal those of the installed
//! qemu-storage-daemon.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use oxblk_core::{
    Backend, DriverTable, Errno, Graph, Node, OpenFlags, Options, Perm, Permissions, Result,
};
use oxblk_formats::{qcow2::QCOW2, raw::RAW};
use oxblk_protocols::file::FILE;
use oxblk_ring::block_on;

static DRIVERS: DriverTable = &[&RAW, QCOW2, &FILE];

const TIMEOUT: Duration = Duration::from_secs(60);

fn image(dir: &Path) -> String {
    let path = dir.join("disk.qcow2").to_str().unwrap().to_owned();
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &path, "1M"]).status();
    assert!(made.expect("qemu-img is installed").success());
    path
}

/// The error message of the daemon when it refuses its last option, without the text of the option.
fn daemon_refusal(args: &[String]) -> String {
    let mut daemon = Command::new("qemu-storage-daemon")
        .args(args)
        .stderr(Stdio::piped())
        .spawn()
        .expect("qemu-storage-daemon is installed");
    let start = Instant::now();
    while daemon.try_wait().unwrap().is_none() {
        if start.elapsed() > TIMEOUT {
            daemon.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = daemon.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "the daemon did not refuse {args:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    let at = text.find("Permission conflict").expect("a permission conflict");
    text[at..].trim_end().to_owned()
}

fn blockdev(args: &[&str]) -> Vec<String> {
    args.iter().flat_map(|arg| ["--blockdev".to_owned(), (*arg).to_owned()]).collect()
}

async fn open(graph: &Graph, options: &str) -> Result<Arc<Node>> {
    let node = graph.open(Options::from_dotted(options, None)?, OpenFlags::default()).await?;
    graph.keep_open(Arc::clone(&node)).unwrap();
    Ok(node)
}

fn writer(graph: &Graph, node: &Arc<Node>) -> Result<Backend> {
    let taken = Perm::CONSISTENT_READ | Perm::WRITE;
    Backend::new(graph, "", Arc::clone(node), Permissions::sharing_all(taken))
}

#[test]
fn two_formats_on_one_file_are_refused_as_the_daemon_refuses_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path());
    let file = format!("driver=file,node-name=f,filename={path}");
    let formats = ["driver=qcow2,file=f,node-name=q1", "driver=qcow2,file=f,node-name=q2"];
    let expected = daemon_refusal(&blockdev(&[&file, formats[0], formats[1]]));
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        open(&graph, &file).await.unwrap();
        let first = open(&graph, formats[0]).await.unwrap();
        let refused = open(&graph, formats[1]).await.unwrap_err();
        assert_eq!(refused.to_string(), expected);
        assert_eq!(refused.raw_errno(), Errno::PERM);
        assert!(graph.node("q2").is_none());
        // The first format node still works. After it is closed, the second one can be opened.
        writer(&graph, &first).unwrap().close().await.unwrap();
        graph.allow_close(first).await.unwrap();
        open(&graph, formats[1]).await.unwrap();
    });
}

#[test]
fn a_writer_and_a_format_on_one_file_are_refused_in_either_order_as_the_daemon_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path());
    let file = format!("driver=file,node-name=f,filename={path}");
    let format = "driver=qcow2,file=f,node-name=q1";
    let export = ["--export".to_owned(), "nbd,id=e,node-name=f,writable=on".to_owned()];
    let socket = format!("addr.type=unix,addr.path={}/socket", dir.path().display());
    let server = ["--nbd-server".to_owned(), socket];
    let args = [&server[..], &blockdev(&[&file, format]), &export].concat();
    let writer_last = daemon_refusal(&args);
    let args = [&server[..], &blockdev(&[&file]), &export, &blockdev(&[format])].concat();
    let format_last = daemon_refusal(&args);
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let node = open(&graph, &file).await.unwrap();
        let above = open(&graph, format).await.unwrap();
        let refused = writer(&graph, &node).unwrap_err();
        assert_eq!(refused.to_string(), writer_last);
        graph.allow_close(above).await.unwrap();
        let backend = writer(&graph, &node).unwrap();
        let refused = open(&graph, format).await.unwrap_err();
        assert_eq!(refused.to_string(), format_last);
        backend.close().await.unwrap();
        open(&graph, format).await.unwrap();
    });
}

#[test]
fn a_read_only_node_refuses_writers() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path());
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let options = format!("driver=file,node-name=f,read-only=on,filename={path}");
        let node = open(&graph, &options).await.unwrap();
        assert_eq!(writer(&graph, &node).unwrap_err().to_string(), "Block node is read-only");
        // Several read-only format nodes may share the file node.
        open(&graph, "driver=qcow2,file=f,read-only=on,node-name=a").await.unwrap();
        open(&graph, "driver=qcow2,file=f,read-only=on,node-name=b").await.unwrap();
    });
}
