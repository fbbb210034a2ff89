//! Test of a thread that sleeps until several operations have completed: other events still wake the thread in time.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::os::fd::OwnedFd;
use std::time::Duration;

use futures_util::future::{join, join_all};
use oxblk_ring::{Aio, Config, Engine, File, IoBufMut, IoThread, block_on_with, sleep};

/// The transfers on tmpfs are so long that kernel workers execute them, and so many that the thread waits for several
/// of them together. At the same time the thread waits for messages, timers and a flush.
#[test]
fn bulk_transfers_messages_and_timers_never_block_one_another() {
    let Ok(host) = tempfile::tempfile_in("/dev/shm") else { return };
    host.set_len(1 << 20).unwrap();
    let memory = File::from_fd(OwnedFd::from(host), Aio::IoUring);
    let disk =
        File::from_fd(OwnedFd::from(tempfile::tempfile_in("/var/tmp").unwrap()), Aio::IoUring);
    let other = IoThread::start("other", Config::default()).unwrap();
    let config = Config { engine: Engine::Auto, ..Config::default() };
    block_on_with(config, async {
        for round in 0..150_usize {
            let many = join_all((0..=round % 40).map(|i| {
                let read = memory.read_at(IoBufMut::new(64 << 10), (i as u64 % 8) << 16);
                async move { read.await.0.unwrap() }
            }));
            // A detached transfer is also included in the number for which the thread waits.
            drop(memory.read_at(IoBufMut::new(64 << 10), 0));
            let message = other.spawn(|| async { 1 });
            let timer = sleep(Duration::from_micros(u64::try_from(round).unwrap()));
            let ((read, sync), (sent, ())) =
                join(join(many, disk.sync(true)), join(message, timer)).await;
            assert!(read.into_iter().all(|n| n == 64 << 10));
            assert_eq!(sent, Ok(1));
            sync.unwrap();
        }
    })
    .unwrap();
    other.join();
}
