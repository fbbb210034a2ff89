//! Test of a system that forbids io_uring and Linux AIO, as many containers do. The engine logs each once per process and
//! uses threads instead.
//!
//! A system-call filter cannot be removed, so the test runs itself as a child process that installs the filter.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

mod child;

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use child::{is_child, refuse};
use oxblk_ring::{
    Aio, Config, Engine, File, IoBuf, IoBufMut, IoThread, Stream, block_on, block_on_with, is_zero,
    spawn,
};

/// Collects the log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

async fn work(aio: Aio) {
    let file = File::from_fd(OwnedFd::from(tempfile::tempfile().unwrap()), aio);
    let tasks: Vec<_> = (0..200u64)
        .map(|i| {
            let file = file.clone();
            spawn(async move {
                file.write_all_at(IoBufMut::filled(512, 1).freeze(), i * 1024, false).await
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    file.sync(true).await.unwrap();
    let (back, n) = file.read_full_at(IoBufMut::new(200 * 1024), 0).await.unwrap();
    assert_eq!(n, 199 * 1024 + 512);
    assert!(back.chunks(1024).all(|c| c[..512].iter().all(|&b| b == 1) && is_zero(&c[512..])));
    let (a, b) = Stream::pair().unwrap();
    let sender =
        spawn(async move { a.send_all(std::iter::once(IoBuf::zeroes(1 << 20)).collect()).await });
    assert!(is_zero(&b.recv_exact(IoBufMut::filled(1 << 20, 1)).await.unwrap()));
    sender.await.unwrap();
}

#[test]
fn the_engine_works_without_io_uring_and_logs_it_once() {
    if !is_child("the_engine_works_without_io_uring_and_logs_it_once") {
        return;
    }
    refuse(&[libc::SYS_io_uring_setup, libc::SYS_io_setup]);
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_ansi(false);
    subscriber.with_writer(move || writer.clone()).init();
    for aio in [Aio::IoUring, Aio::Threads, Aio::Native] {
        block_on(work(aio));
        let thread = IoThread::start("fallback", Config::default()).unwrap();
        thread.spawn(move || work(aio)).wait().unwrap();
        thread.join();
    }
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert_eq!(text.matches("io_uring is not available").count(), 1, "{text}");
    assert_eq!(text.matches("Linux AIO is not available").count(), 1, "{text}");
    assert_eq!(text.lines().count(), 2, "{text}");
    let strict = block_on_with(Config { engine: Engine::Uring, ..Config::default() }, async {});
    assert_eq!(strict.unwrap_err().raw_os_error(), Some(libc::EPERM));
}
