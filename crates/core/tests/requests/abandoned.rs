//! Tests of requests whose futures are dropped while the host carries out the requests. Such a request is counted as in
//! flight until the host has completed the request, even if the thread of the request ends earlier. The count is
//! lowered in the same shard in which it was raised.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use oxblk_core::{Backend, BoxFuture, Driver, Limits, OpenFlags, Result, WriteFlags};
use oxblk_ring::{Aio, File, IoBuf, IoBufMut, IoThread, block_on, timeout, yield_now};

use crate::all;
use crate::memory::{DRIVERS, Memory, graph, node};

/// A protocol whose first read lasts until the test sends a message.
struct Host {
    file: File,
    end: Mutex<Option<mpsc::Receiver<()>>>,
}

impl Driver for Host {
    fn read(&self, _offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        let end = self.end.lock().unwrap().take();
        let call = self.file.call(move |_| end.map(|end| end.recv()));
        Box::pin(async move {
            call.await;
            Ok(buf)
        })
    }

    fn write(&self, _offset: u64, _data: IoBuf, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn size(&self) -> u64 {
        4096
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }
}

fn poll_once(future: &mut Pin<Box<impl Future>>) -> bool {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending()
}

/// Whether no request is in flight and no request holds back an epoch.
async fn is_idle(backend: &Backend) -> bool {
    let mut quiesce = Box::pin(backend.quiesce());
    let quiesced = std::future::poll_fn(|cx| Poll::Ready(quiesce.as_mut().poll(cx).is_ready()));
    let node = backend.node().unwrap();
    let epochs = node.epochs();
    quiesced.await && epochs.has_passed(epochs.current())
}

#[test]
fn a_request_that_is_dropped_in_another_shard_lowers_its_count_once() {
    let graph = graph();
    let memory = Arc::new(Memory { bytes: vec![0; 4096].into(), yields: 3, ..Memory::default() });
    let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
    for keep in [false, true] {
        let mut read = Box::pin(backend.read(0, IoBufMut::new(512)));
        // Each running I/O thread occupies a shard, so `block_on` does not use the first shard.
        let _other = IoThread::start("other", oxblk_ring::Config::default()).unwrap();
        block_on(async {
            assert!(poll_once(&mut read));
            assert!(!is_idle(&backend).await);
        });
        if keep {
            let _first = IoThread::start("first", oxblk_ring::Config::default()).unwrap();
            block_on(async move { drop(read) });
        } else {
            drop(read);
        }
        block_on(async {
            assert!(is_idle(&backend).await);
            timeout(Duration::from_secs(30), backend.quiesce()).await.unwrap();
        });
    }
}

#[test]
fn a_request_of_a_thread_that_ends_is_in_flight_until_the_host_has_completed_it() {
    let graph = graph();
    let (end, ended) = mpsc::channel();
    let file = File::from_fd(std::fs::File::open("/dev/null").unwrap().into(), Aio::IoUring);
    let driver = Box::new(Host { file, end: Mutex::new(Some(ended)) });
    let node = graph.add_node(Some("h"), DRIVERS[0], driver, OpenFlags::default()).unwrap();
    let backend = Backend::new(&graph, "b", node, all()).unwrap();
    let (abandoned, is_abandoned) = mpsc::channel();
    let other = backend.clone();
    let thread = std::thread::spawn(move || {
        block_on(async {
            let mut read = Box::pin(other.read(0, IoBufMut::new(512)));
            assert!(poll_once(&mut read));
            drop(read);
            abandoned.send(()).unwrap();
        });
    });
    is_abandoned.recv().unwrap();
    block_on(async {
        for _ in 0..100 {
            assert!(!is_idle(&backend).await);
            yield_now().await;
        }
        end.send(()).unwrap();
        timeout(Duration::from_secs(30), backend.quiesce()).await.unwrap();
    });
    thread.join().unwrap();
    assert!(block_on(is_idle(&backend)));
}
