//! Tests of the end of an I/O thread. The files that the thread has used are closed when the thread has ended. While
//! the thread closes, destructors, panics and other threads never free the memory of an operation in flight.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::fs::OpenOptions;
use std::future::Future;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake, Waker};

use oxblk_ring::{
    Aio, Config, Engine, File, IoBuf, IoBufMut, IoThread, TaskGone, block_on, block_on_with,
    settled, sleep, spawn, yield_now,
};

/// Whether no process has the file open. The kernel grants a write lease only on such a file.
fn is_closed_by_all(path: &Path) -> bool {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    // SAFETY: the descriptor is open; the lease ends when the descriptor is closed.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) == 0 }
}

async fn write(file: &File) {
    file.write_all_at(IoBuf::from(vec![7; 4096]), 0, false).await.unwrap();
}

#[test]
fn a_file_is_closed_when_the_threads_that_used_it_have_ended() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    for engine in [Engine::Uring, Engine::Threads] {
        let config = || Config { engine, ..Config::default() };
        let helper = IoThread::start("helper", config()).unwrap();
        let host = std::fs::File::create(&path).unwrap();
        block_on_with(config(), async {
            let file = File::from_fd(host.into(), Aio::IoUring);
            write(&file).await;
            let shared = file.clone();
            helper.spawn(move || async move { write(&shared).await }).await.unwrap();
        })
        .unwrap();
        helper.join();
        assert!(is_closed_by_all(&path), "{engine:?}");
    }
}

/// Reports that it is dropped, then panics.
struct Bomb(mpsc::Sender<()>);

impl Drop for Bomb {
    fn drop(&mut self) {
        let _ = self.0.send(());
        if !std::thread::panicking() {
            panic!("dropped");
        }
    }
}

#[test]
fn destructors_that_panic_while_a_thread_closes_free_no_memory_in_flight() {
    const LEN: usize = 512 << 10;
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        File::from_fd(OwnedFd::from(file), Aio::Threads)
    };
    let (gone, is_gone) = mpsc::channel();
    let (ready, is_ready) = mpsc::channel();
    let (in_task, in_call) = (Bomb(gone.clone()), Bomb(gone));
    let thread = std::thread::spawn(move || {
        block_on(async move {
            let file = file();
            // The reads are queued behind these calls, which keep all workers busy.
            let calls: Vec<_> = (0..64)
                .map(|_| {
                    let (end, ended) = mpsc::channel::<()>();
                    drop(file.call(move |_| ended.recv()));
                    end
                })
                .collect();
            for at in 0..8_u64 {
                drop(file.read_at(IoBufMut::filled(LEN, 0xaa), at << 20));
            }
            spawn(async move {
                let _bomb = in_task;
                std::future::pending::<()>().await;
            })
            .detach();
            yield_now().await;
            let me = IoThread::current().unwrap();
            std::thread::spawn(move || {
                drop(me.spawn(move || async move { drop(in_call) }));
                ready.send(calls).unwrap();
            })
            .join()
            .unwrap();
        });
    });
    let calls = is_ready.recv().unwrap();
    // The message that was sent to the closing thread is dropped while the reads are in flight.
    is_gone.recv().unwrap();
    let mut mine: Vec<_> = (0..16).map(|_| IoBufMut::filled(LEN, 0x11)).collect();
    drop(calls);
    thread.join().expect("no panic must unwind out of closing");
    is_gone.recv().unwrap();
    assert!(mine.iter_mut().all(|buf| buf.iter().all(|byte| *byte == 0x11)));
}

#[test]
fn work_sent_to_an_ended_thread_is_reported_as_gone() {
    let handle = block_on(async { IoThread::current().unwrap() });
    assert_eq!(handle.spawn(|| async { 1 }).wait(), Err(TaskGone));
    assert_eq!(block_on(async { handle.spawn(|| async { 1 }).await }), Err(TaskGone));
}

#[test]
fn work_sent_to_an_ending_thread_completes_or_is_reported_as_gone() {
    oxblk_ring::perturb::start(1);
    for _ in 0..200 {
        let (handle, has_handle) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            block_on(async {
                handle.send(IoThread::current().unwrap()).unwrap();
                yield_now().await;
            });
        });
        let handle = has_handle.recv().unwrap();
        for _ in 0..20 {
            let outcome = handle.spawn(|| async { 1 }).wait();
            assert!(matches!(outcome, Ok(1) | Err(TaskGone)));
        }
        thread.join().unwrap();
    }
}

/// A waker that panics.
struct Grenade;

impl Wake for Grenade {
    fn wake(self: Arc<Self>) {
        panic!("woken");
    }
}

#[test]
fn a_panicking_waker_does_not_lose_other_completions() {
    for engine in [Engine::Uring, Engine::Threads] {
        block_on_with(Config { engine, ..Config::default() }, async {
            let directory = tempfile::tempdir_in("/var/tmp").unwrap();
            let host = std::fs::File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(directory.path().join("file"))
                .unwrap();
            let file = File::from_fd(host.into(), Aio::Threads);
            let waker = Waker::from(Arc::new(Grenade));
            let mut cx = Context::from_waker(&waker);
            for _ in 0..20 {
                let mut bad = pin!(file.sync(true));
                let good: Vec<_> =
                    (0..8).map(|i| file.write_at(IoBuf::zeroes(512), i * 512, false)).collect();
                let mut late = pin!(sleep(std::time::Duration::from_micros(10)));
                let pending = bad.as_mut().poll(&mut cx).is_pending();
                let _ = late.as_mut().poll(&mut cx);
                for write in good {
                    assert_eq!(write.await.unwrap(), 512);
                }
                settled().await;
                if pending {
                    let again = bad.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                    assert!(matches!(again, Poll::Ready(Ok(()))));
                }
            }
        })
        .unwrap();
    }
}
