//! Test of a flush whose future is dropped because its thread ends. At this time, the writes of the flush are in flight.
//!
//! The next flush must wait until these writes have ended, and must then complete.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::future::Future;
use std::sync::Arc;
use std::sync::mpsc;
use std::task::{Context, Waker};
use std::time::Duration;

use oxblk_core::create::{CreateRequest, CreateTarget};
use oxblk_core::{
    Attachment, Backend, DriverTable, Graph, OpenFlags, Options, Perm, Permissions, WriteFlags,
};
use oxblk_formats::qcow2::QCOW2;
use oxblk_protocols::file::FILE;
use oxblk_ring::{Aio, File, IoBufMut, block_on, settled, timeout, yield_now};

static DRIVERS: DriverTable = &[QCOW2, &FILE];
/// Number of worker threads for blocking calls on files.
const WORKERS: usize = 64;

fn options(dotted: &str) -> Options {
    Options::from_dotted(dotted, None).unwrap()
}

/// Creates and opens an empty image. Worker threads read and write its file.
async fn new_image(graph: &Graph, path: &std::path::Path) -> Backend {
    std::fs::write(path, []).unwrap();
    let file = format!("driver=file,filename={},aio=threads", path.display());
    let node = graph.open(options(&file), OpenFlags::default()).await.unwrap();
    let all = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
    let edge = Attachment::new(&node, "creation", "file", all).unwrap();
    let target = CreateTarget::File(Arc::clone(edge.edge()));
    let request = CreateRequest { target, options: options("size=1M") };
    QCOW2.create(graph, request).unwrap().await.unwrap();
    drop(edge);
    graph.release(node).await.unwrap();
    let dotted =
        format!("driver=qcow2,file.driver=file,file.filename={},file.aio=threads", path.display());
    graph.open_backend(None, options(&dotted), OpenFlags::default()).await.unwrap()
}

/// Blocks all worker threads until the returned senders are dropped.
fn occupy_workers() -> Vec<mpsc::Sender<()>> {
    let file = File::from_fd(std::fs::File::open("/dev/null").unwrap().into(), Aio::Threads);
    let occupy = |_| {
        let (end, ended) = mpsc::channel::<()>();
        drop(file.call(move |_| ended.recv()));
        end
    };
    (0..WORKERS).map(occupy).collect()
}

#[test]
fn a_flush_waits_for_the_writes_of_a_flush_that_ended_with_its_thread() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = directory.path().join("image");
    let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
    let image = block_on(async {
        let image = new_image(&graph, &path).await;
        let data = IoBufMut::filled(65536, 1).freeze();
        image.write(0, data, WriteFlags::empty()).await.unwrap();
        image
    });
    let (workers, has_workers) = mpsc::channel();
    let other = image.clone();
    let thread = std::thread::spawn(move || {
        block_on(async {
            workers.send(occupy_workers()).unwrap();
            let mut flush = Box::pin(other.flush());
            for _ in 0..100 {
                let mut cx = Context::from_waker(Waker::noop());
                assert!(flush.as_mut().poll(&mut cx).is_pending());
                yield_now().await;
            }
        });
    });
    let workers = has_workers.recv().unwrap();
    block_on(async {
        let mut flush = Box::pin(image.flush());
        for _ in 0..100 {
            let mut cx = Context::from_waker(Waker::noop());
            assert!(flush.as_mut().poll(&mut cx).is_pending(), "the first flush is in flight");
            yield_now().await;
        }
        drop(workers);
        timeout(Duration::from_secs(60), flush).await.unwrap().unwrap();
        let read = image.read(0, IoBufMut::new(65536)).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 1));
        image.close().await.unwrap();
        settled().await;
    });
    thread.join().unwrap();
}
