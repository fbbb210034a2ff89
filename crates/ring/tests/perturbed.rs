//! Tests of hand-overs between threads (messages, wake-ups, buffers), with random delays between their steps. The
//! tests exist only with the feature `perturb`, which the test builds of the workspace enable.
#![cfg(feature = "perturb")]
#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use oxblk_ring::{
    Aio, Config, Engine, Event, File, IoBufMut, IoThread, RangeLock, Semaphore, TaskGone, block_on,
    keep_until_settled, offload, perturb, settled, spawn, yield_now,
};

const THREADS: u64 = 3;

fn threads(engine: Engine) -> Vec<IoThread> {
    let config = || Config { engine, ..Config::default() };
    (0..THREADS).map(|_| IoThread::start("perturbed", config()).unwrap()).collect()
}

/// Runs `body` with several seeds of the delays, on each engine.
fn perturbed(body: impl Fn(Engine)) {
    for seed in 1..=4 {
        perturb::start(seed);
        for engine in [Engine::Uring, Engine::Threads] {
            body(engine);
        }
    }
    perturb::stop();
}

#[test]
fn no_wake_up_between_threads_is_lost() {
    perturbed(|engine| {
        let threads = threads(engine);
        // The threads increment a counter in a fixed order. A thread is woken only by a notification of another thread.
        let (turn, moved) = (Arc::new(AtomicU64::new(0)), Arc::new(Event::new()));
        let remotes: Vec<_> = (0_u64..)
            .zip(&threads)
            .map(|(me, thread)| {
                let (turn, moved) = (Arc::clone(&turn), Arc::clone(&moved));
                thread.spawn(move || async move {
                    for round in 0..200 {
                        loop {
                            let listener = moved.listen();
                            if turn.load(Relaxed) == round * THREADS + me {
                                break;
                            }
                            listener.await;
                        }
                        turn.fetch_add(1, Relaxed);
                        moved.notify(usize::MAX);
                    }
                })
            })
            .collect();
        remotes.into_iter().for_each(|remote| remote.wait().unwrap());
        assert_eq!(turn.load(Relaxed), 200 * THREADS);
        threads.into_iter().for_each(IoThread::join);
    });
}

#[test]
fn results_of_workers_arrive_while_threads_start_and_end() {
    perturbed(|engine| {
        let host = OwnedFd::from(tempfile::tempfile().unwrap());
        let file = File::from_fd(host, Aio::Threads);
        for round in 0..6 {
            let threads = threads(engine);
            let remotes: Vec<_> = threads
                .iter()
                .map(|thread| {
                    let file = file.clone();
                    thread.spawn(move || async move {
                        let tasks: Vec<_> = (0..16_u64)
                            .map(|i| {
                                let file = file.clone();
                                spawn(async move {
                                    let data = IoBufMut::filled(4096, 1).freeze();
                                    file.write_all_at(data, i * 4096, false).await.unwrap();
                                    drop(file.read_at(IoBufMut::new(4096), i * 4096));
                                    offload(move || i).await
                                })
                            })
                            .collect();
                        let mut sum = 0;
                        for task in tasks {
                            sum += task.await;
                        }
                        sum
                    })
                })
                .collect();
            // In every second round, the threads end while tasks are still running.
            if round % 2 == 0 {
                remotes.into_iter().for_each(|remote| assert_eq!(remote.wait(), Ok(120)));
            }
            threads.into_iter().for_each(IoThread::join);
        }
    });
}

#[test]
fn an_ending_thread_runs_the_work_sent_to_it_or_reports_it_as_gone() {
    perturbed(|_| {
        for _ in 0..20 {
            let (sender, receiver) = std::sync::mpsc::channel();
            let thread = std::thread::spawn(move || {
                block_on(async {
                    sender.send(IoThread::current().unwrap()).unwrap();
                    yield_now().await;
                });
            });
            let handle = receiver.recv().unwrap();
            for _ in 0..10 {
                let outcome = handle.spawn(|| async { 1 }).wait();
                assert!(matches!(outcome, Ok(1) | Err(TaskGone)));
            }
            thread.join().unwrap();
        }
    });
}

#[test]
fn buffers_returned_by_other_threads_are_not_written_by_anyone_else() {
    perturbed(|engine| {
        let threads = threads(engine);
        let remotes: Vec<_> = (1_u8..)
            .zip(&threads)
            .map(|(me, thread)| {
                let others = threads.clone();
                thread.spawn(move || async move {
                    for round in 0..100_usize {
                        let len = [600, 4096, 16 << 10, 64 << 10][round % 4];
                        let buf = IoBufMut::filled(len, me).freeze();
                        let (copy, other) = (buf.clone(), &others[round % others.len()]);
                        // The two views of the buffer are dropped on two threads at about the same time.
                        let remote = other.spawn(move || async move { copy[0] });
                        let mine = IoBufMut::filled(len, me);
                        drop(buf);
                        yield_now().await;
                        assert!(mine.iter().all(|byte| *byte == me));
                        assert_eq!(remote.await, Ok(me));
                    }
                })
            })
            .collect();
        remotes.into_iter().for_each(|remote| remote.wait().unwrap());
        threads.into_iter().for_each(IoThread::join);
    });
}

#[test]
fn locks_pass_from_thread_to_thread() {
    perturbed(|engine| {
        let threads = threads(engine);
        let (lock, permits) = (Arc::new(RangeLock::new()), Arc::new(Semaphore::new(1)));
        let remotes: Vec<_> = threads
            .iter()
            .map(|thread| {
                let (lock, permits) = (Arc::clone(&lock), Arc::clone(&permits));
                thread.spawn(move || async move {
                    for round in 0..60 {
                        let range = lock.lock(round..round + 4).await;
                        let permit = permits.acquire().await;
                        yield_now().await;
                        drop(permit);
                        drop(range);
                    }
                })
            })
            .collect();
        remotes.into_iter().for_each(|remote| remote.wait().unwrap());
        assert!(lock.is_idle());
        threads.into_iter().for_each(IoThread::join);
    });
}

#[test]
fn values_are_kept_until_workers_have_finished() {
    struct Done(Arc<AtomicU64>, u64);
    impl Drop for Done {
        fn drop(&mut self) {
            assert!(self.0.load(Relaxed) >= self.1, "dropped while a call was running");
        }
    }
    perturbed(|engine| {
        let file = File::from_fd(std::fs::File::open("/dev/null").unwrap().into(), Aio::Threads);
        let thread = IoThread::start("keeper", Config { engine, ..Config::default() }).unwrap();
        let remote = thread.spawn(move || async move {
            let calls = Arc::new(AtomicU64::new(0));
            for begun in 1..=100 {
                let count = Arc::clone(&calls);
                drop(file.call(move |_| count.fetch_add(1, Relaxed)));
                keep_until_settled(Done(Arc::clone(&calls), begun));
            }
            settled().await;
            calls.load(Relaxed)
        });
        assert_eq!(remote.wait(), Ok(100));
        thread.join();
    });
}
