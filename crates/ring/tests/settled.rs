//! Tests of values that are kept until the operations of dropped futures have completed.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Waker};

use oxblk_ring::sim::{self, Disk, Faults};
use oxblk_ring::{
    Aio, Config, Engine, File, IoBufMut, Stream, UntilSettled, block_on, block_on_with,
    keep_until_settled, settled, spawn, yield_now,
};

/// Sets a flag when dropped.
struct Flag(Arc<AtomicBool>);

impl Drop for Flag {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

fn flag() -> (Flag, Arc<AtomicBool>) {
    let dropped = Arc::new(AtomicBool::new(false));
    (Flag(Arc::clone(&dropped)), dropped)
}

fn temporary() -> File {
    File::from_fd(OwnedFd::from(tempfile::tempfile().unwrap()), Aio::IoUring)
}

/// Starts a call and drops its future. The call lasts until a message is sent to the returned sender.
fn leave_call_behind(file: &File) -> mpsc::Sender<()> {
    let (sender, receiver) = mpsc::channel::<()>();
    drop(file.call(move |_| receiver.recv()));
    sender
}

fn is_pending(future: impl Future) -> bool {
    pin!(future).poll(&mut Context::from_waker(Waker::noop())).is_pending()
}

#[test]
fn a_value_is_kept_until_the_operations_in_flight_have_ended() {
    for engine in [Engine::Uring, Engine::Threads] {
        block_on_with(Config { engine, ..Config::default() }, async {
            let file = temporary();
            let end = leave_call_behind(&file);
            let (value, dropped) = flag();
            keep_until_settled(value);
            for _ in 0..100 {
                yield_now().await;
            }
            assert!(!dropped.load(SeqCst));
            // The value is not kept for operations that begin after `keep_until_settled`.
            let later = leave_call_behind(&file);
            end.send(()).unwrap();
            while !dropped.load(SeqCst) {
                yield_now().await;
            }
            assert!(is_pending(settled()));
            later.send(()).unwrap();
            settled().await;
        })
        .unwrap();
    }
}

#[test]
fn a_value_is_dropped_immediately_if_nothing_is_in_flight() {
    let (value, dropped) = flag();
    keep_until_settled(value);
    assert!(dropped.load(SeqCst), "outside an I/O thread the value must be dropped immediately");
    block_on(async {
        let (a, _b) = Stream::pair().unwrap();
        let receive = spawn(async move { a.recv(IoBufMut::new(1)).await.1.len() });
        yield_now().await;
        let (value, dropped) = flag();
        keep_until_settled(value);
        assert!(dropped.load(SeqCst), "a receive may last for ever, so it must not keep the value");
        drop(receive);
    });
}

#[test]
fn a_released_value_is_not_kept_and_a_dropped_one_is() {
    block_on(async {
        let end = leave_call_behind(&temporary());
        let (value, dropped) = flag();
        drop(UntilSettled::new(value).release());
        assert!(dropped.load(SeqCst));
        let (value, dropped) = flag();
        drop(UntilSettled::new(value));
        assert!(!dropped.load(SeqCst));
        end.send(()).unwrap();
        settled().await;
        assert!(dropped.load(SeqCst));
    });
}

#[test]
fn an_ending_thread_keeps_values_until_the_host_has_finished() {
    for engine in [Engine::Uring, Engine::Threads] {
        let (ending, has_ended) = mpsc::channel();
        let (value, dropped) = flag();
        let (in_task, task_dropped) = flag();
        let thread = std::thread::spawn(move || {
            block_on_with(Config { engine, ..Config::default() }, async move {
                ending.send(leave_call_behind(&temporary())).unwrap();
                keep_until_settled(value);
                // A guard in a task is also dropped only after the operations in flight have completed.
                spawn(async move {
                    let _guard = in_task;
                    std::future::pending::<()>().await;
                })
                .detach();
                yield_now().await;
            })
            .unwrap();
        });
        let end = has_ended.recv().unwrap();
        for _ in 0..100 {
            std::thread::yield_now();
            assert!(!dropped.load(SeqCst) && !task_dropped.load(SeqCst));
        }
        end.send(()).unwrap();
        thread.join().unwrap();
        assert!(dropped.load(SeqCst) && task_dropped.load(SeqCst));
    }
}

#[test]
fn in_simulation_a_value_is_kept_until_a_dropped_write_is_on_disk() {
    for seed in 0..20 {
        let disk = Disk::new(seed, 4096);
        disk.set_faults(Faults {
            delay: std::time::Duration::from_micros(1)..std::time::Duration::from_millis(9),
            ..Faults::default()
        });
        let file = File::sim(&disk);
        sim::run(seed, async {
            drop(file.write_at(IoBufMut::filled(4096, 7).freeze(), 0, false));
            let (value, dropped) = flag();
            keep_until_settled(value);
            assert!(!dropped.load(SeqCst) && disk.bytes()[0] == 0);
            settled().await;
            assert!(dropped.load(SeqCst) && disk.bytes()[0] == 7);
        });
    }
}

#[test]
fn settled_completes_when_polled_with_a_waker_of_another_executor() {
    block_on(async {
        let end = leave_call_behind(&temporary());
        let mut wait = pin!(settled());
        assert!(std::future::poll_fn(|cx| Poll::Ready(wait.as_mut().poll(cx).is_pending())).await);
        end.send(()).unwrap();
        wait.await;
    });
}
