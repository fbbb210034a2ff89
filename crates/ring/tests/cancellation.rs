//! Tests that drop futures at every await point. Each operation keeps its buffer until the kernel has completed the
//! operation, the slots of operations are reused, and the engine still works.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use oxblk_ring::sim::{self, Disk};
use oxblk_ring::{
    Aio, Config, Engine, File, IoBuf, IoBufMut, IoThread, RangeLock, Stream, block_on_with,
    offload, sleep, spawn, timeout, yield_now,
};

/// A fill byte that shows a stray write.
const CANARY: u8 = 0xc5;

/// Polls a future at most `polls` times, then drops it. Returns true if it completed before.
async fn poll_and_drop<F: Future>(future: F, polls: usize) -> bool {
    let mut future = pin!(future);
    let mut left = polls;
    std::future::poll_fn(move |cx| {
        if left == 0 {
            return Poll::Ready(false);
        }
        left -= 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(_) => Poll::Ready(true),
            // Drop the future now, while its operation is in flight. After the next wake-up the operation would be
            // complete.
            Poll::Pending if left == 0 => Poll::Ready(false),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// A sequence of many steps with operations of every kind.
async fn script(file: File) {
    let data = IoBufMut::filled(8192, 1).freeze();
    file.write_all_at(data.clone(), 0, false).await.unwrap();
    file.write_all_vectored_at([data.clone(), data].into_iter().collect(), 8192, true)
        .await
        .unwrap();
    file.sync(true).await.unwrap();
    let (back, _) = file.read_full_at(IoBufMut::new(16_384), 4096).await.unwrap();
    assert_eq!(back.len(), 16_384);
    let reads: Vec<_> = (0..8).map(|i| file.read_at(IoBufMut::new(4096), i * 4096)).collect();
    yield_now().await;
    for read in reads {
        read.await.0.unwrap();
    }
    file.set_len(30_000).await.unwrap();
    file.seek_extent(0).await.unwrap();
    let _ = offload(|| 1).await;
    let lock = RangeLock::new();
    let held = lock.lock(0..10).await;
    assert!(timeout(Duration::from_micros(1), lock.lock(5..6)).await.is_err());
    drop(held);
    sleep(Duration::from_micros(1)).await;
}

/// Runs the script repeatedly, and drops it after 0, 1, 2, … polls, until it completes. Buffers that are allocated
/// after the drop must keep their contents.
async fn drop_everywhere(file: File) {
    for polls in 0..200 {
        let done = poll_and_drop(script(file.clone()), polls).await;
        let canaries: Vec<IoBufMut> = (0..24).map(|_| IoBufMut::filled(4096, CANARY)).collect();
        file.sync(true).await.unwrap();
        file.write_all_at(IoBuf::zeroes(512), 0, false).await.unwrap();
        assert!(
            canaries.iter().all(|c| c.iter().all(|&b| b == CANARY)),
            "memory was reused while an operation still used it"
        );
        if done {
            return;
        }
    }
    panic!("the script did not complete");
}

fn temporary(aio: Aio) -> File {
    File::from_fd(OwnedFd::from(tempfile::tempfile().unwrap()), aio)
}

#[test]
fn a_script_can_be_dropped_at_every_step_with_every_engine_and_aio() {
    for engine in [Engine::Uring, Engine::Threads] {
        for aio in [Aio::IoUring, Aio::Threads, Aio::Native] {
            block_on_with(Config { engine, ..Config::default() }, drop_everywhere(temporary(aio)))
                .unwrap();
        }
    }
}

#[test]
fn a_script_can_be_dropped_at_every_step_in_simulation() {
    for seed in 0..10 {
        sim::run(seed, drop_everywhere(File::sim(&Disk::new(seed, 0))));
    }
}

#[test]
fn a_thread_ends_with_operations_in_flight_and_waits_for_them() {
    for engine in [Engine::Uring, Engine::Threads] {
        for aio in [Aio::IoUring, Aio::Threads, Aio::Native] {
            let file = temporary(aio);
            let writer = file.clone();
            block_on_with(Config { engine, ..Config::default() }, async move {
                for i in 0..200u64 {
                    let buf = IoBufMut::filled(4096, 7).freeze();
                    let file = writer.clone();
                    spawn(async move { file.write_at(buf, i * 4096, false).await }).detach();
                }
                yield_now().await;
            })
            .unwrap();
            let (back, n) =
                block_on_with(Config::default(), file.read_full_at(IoBufMut::new(4096 * 200), 0))
                    .unwrap()
                    .unwrap();
            assert!(
                back[..n].iter().all(|&b| b == 7 || b == 0),
                "the detached write must be complete"
            );
        }
    }
}

#[test]
fn a_dropped_receive_does_not_write_to_reused_memory() {
    for engine in [Engine::Uring, Engine::Threads] {
        block_on_with(Config { engine, ..Config::default() }, async {
            let (a, b) = Stream::pair().unwrap();
            for _ in 0..100 {
                assert!(!poll_and_drop(a.recv(IoBufMut::new(4096)), 1).await);
                let canaries: Vec<IoBufMut> =
                    (0..4).map(|_| IoBufMut::filled(4096, CANARY)).collect();
                b.send_all(std::iter::once(IoBuf::from(&b"x"[..])).collect()).await.unwrap();
                let (result, _) = a.recv(IoBufMut::new(1)).await;
                assert!(matches!(result, Ok(1)), "a cancelled receive must not consume data");
                assert!(canaries.iter().all(|c| c.iter().all(|&byte| byte == CANARY)));
            }
        })
        .unwrap();
    }
}

#[test]
fn buffers_and_wakers_cross_threads_while_operations_run() {
    oxblk_ring::perturb::start(1);
    for engine in [Engine::Uring, Engine::Threads] {
        let config = Config { engine, ..Config::default() };
        let threads: Vec<IoThread> =
            (0..3).map(|_| IoThread::start("cross", config.clone()).unwrap()).collect();
        let file = temporary(Aio::IoUring);
        let work = async move {
            for round in 0..200u64 {
                let [first, second] =
                    [0, 1].map(|i| &threads[(usize::try_from(round).unwrap() + i) % threads.len()]);
                let (writer, reader) = (file.clone(), file.clone());
                // The buffer is allocated on this thread, written on another thread, and freed on the thread that
                // drops the last clone.
                let buf = IoBufMut::filled(4096, round.to_le_bytes()[0]).freeze();
                let copy = buf.clone();
                first
                    .spawn(
                        move || async move { writer.write_all_at(copy, round * 4096, false).await },
                    )
                    .await
                    .unwrap()
                    .unwrap();
                let read = second.spawn(move || async move {
                    reader.read_full_at(IoBufMut::new(4096), round * 4096).await
                });
                let (back, n) = read.await.unwrap().unwrap();
                assert!(n == 4096 && back[..] == buf[..]);
            }
        };
        block_on_with(config, work).unwrap();
    }
}

#[test]
fn tasks_cancelled_from_another_thread_are_dropped_on_their_own_thread() {
    struct Handle(oxblk_ring::Task<()>);
    struct Tattle(std::thread::ThreadId);
    impl Drop for Tattle {
        fn drop(&mut self) {
            assert_eq!(
                std::thread::current().id(),
                self.0,
                "the future was dropped on another thread than its own"
            );
        }
    }
    oxblk_ring::perturb::start(2);
    let thread = IoThread::start("home", Config::default()).unwrap();
    for _ in 0..200 {
        let task = thread.spawn(|| async {
            let tattle = Tattle(std::thread::current().id());
            let task = spawn(async move {
                let _tattle = tattle;
                loop {
                    yield_now().await;
                }
            });
            Handle(task)
        });
        let Handle(task) = task.wait().unwrap();
        drop(task);
    }
    assert_eq!(thread.spawn(|| async { 1 }).wait(), Ok(1));
    thread.join();
}

#[test]
fn a_boxed_future_may_outlive_its_thread_context() {
    let file = temporary(Aio::IoUring);
    let mut kept: Vec<Pin<Box<dyn Future<Output = usize>>>> = Vec::new();
    block_on_with(Config::default(), async {
        let read = file.read_at(IoBufMut::new(4096), 0);
        kept.push(Box::pin(async move { read.await.0.unwrap() }));
    })
    .unwrap();
    let n = block_on_with(Config::default(), async { kept.remove(0).await }).unwrap();
    assert_eq!(
        n, 0,
        "the thread must have awaited the operation when it ended, and its result must be available"
    );
}
