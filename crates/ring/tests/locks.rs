//! Tests of range locks and sharded data.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::cell::RefCell;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use oxblk_ring::{
    Config, IoThread, RangeLock, Sharded, block_on, perturb, sim, sleep, spawn, thread_index,
    yield_now,
};
use proptest::prelude::*;

#[test]
fn overlapping_requests_are_served_in_the_order_of_their_arrival() {
    block_on(async {
        let lock = Rc::new(RangeLock::new());
        let log = Rc::new(RefCell::new(Vec::new()));
        let held = lock.lock(0..100).await;
        let tasks: Vec<_> = [0..10, 5..15, 12..20, 0..20]
            .into_iter()
            .zip(0..)
            .map(|(range, name): (Range<u64>, u32)| {
                let (lock, log) = (Rc::clone(&lock), Rc::clone(&log));
                spawn(async move {
                    let _guard = lock.lock(range).await;
                    log.borrow_mut().push(name);
                    yield_now().await;
                })
            })
            .collect();
        yield_now().await;
        assert!(lock.try_lock(200..300).is_some(), "a disjoint range must not wait");
        assert!(lock.try_lock(99..101).is_none());
        assert!(lock.try_lock(50..50).is_some(), "an empty range must not conflict");
        drop(held);
        for task in tasks {
            task.await;
        }
        assert_eq!(*log.borrow(), [0, 1, 2, 3]);
        assert!(lock.is_idle());
    });
}

#[test]
fn a_shared_request_does_not_pass_an_exclusive_one_that_waits() {
    block_on(async {
        let lock = RangeLock::new();
        let reader = lock.lock_shared(0..10).await;
        assert!(lock.try_lock_shared(0..10).is_some(), "shared requests must not conflict");
        let mut writer = Box::pin(lock.lock(0..10));
        assert!(futures_util::poll!(writer.as_mut()).is_pending());
        assert!(
            lock.try_lock_shared(0..10).is_none(),
            "a shared request must not pass the waiting exclusive one"
        );
        drop(reader);
        let writer = writer.await;
        assert!(lock.try_lock_shared(9..20).is_none());
        drop(writer);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn conflicting_ranges_are_never_held_together_and_every_request_is_granted(
        seed in any::<u64>(),
        requests in proptest::collection::vec((0u64..30, 0u64..10, any::<bool>(), 0u64..5, any::<bool>()), 1..30),
    ) {
        sim::run(seed, async {
            let lock = Rc::new(RangeLock::new());
            let held = Rc::new(RefCell::new(Vec::<(Range<u64>, bool)>::new()));
            let tasks: Vec<_> = requests
                .into_iter()
                .map(|(start, len, shared, pause, is_cancelled)| {
                    let (lock, held, range) = (Rc::clone(&lock), Rc::clone(&held), start..start + len);
                    spawn(async move {
                        let request = async {
                            if shared { lock.lock_shared(range.clone()).await } else { lock.lock(range.clone()).await }
                        };
                        let patience = Duration::from_micros(if is_cancelled { 3 } else { 1_000_000_000 });
                        let Ok(guard) = oxblk_ring::timeout(patience, request).await else { return };
                        let conflict = held.borrow().iter().any(|(other, other_shared)| {
                            !(shared && *other_shared) && other.start.max(range.start) < other.end.min(range.end)
                        });
                        assert!(!conflict, "{range:?} was granted twice");
                        held.borrow_mut().push((range.clone(), shared));
                        sleep(Duration::from_micros(pause)).await;
                        let at = held.borrow().iter().position(|h| *h == (range.clone(), shared)).unwrap();
                        held.borrow_mut().swap_remove(at);
                        drop(guard);
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            assert!(lock.is_idle());
        });
    }
}

#[test]
fn a_range_lock_excludes_across_io_threads() {
    perturb::start(1);
    let (lock, inside) = (Arc::new(RangeLock::new()), Arc::new(AtomicU64::new(0)));
    let threads: Vec<_> =
        (0..3).map(|_| IoThread::start("lock", Config::default()).unwrap()).collect();
    let tasks: Vec<_> = (0..60)
        .map(|i| {
            let (lock, inside) = (Arc::clone(&lock), Arc::clone(&inside));
            threads[i % 3].spawn(move || async move {
                for _ in 0..50 {
                    let guard = lock.lock(0..10).await;
                    assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
                    if i % 4 == 0 {
                        yield_now().await;
                    }
                    inside.fetch_sub(1, Ordering::Relaxed);
                    drop(guard);
                }
            })
        })
        .collect();
    for task in tasks {
        task.wait().unwrap();
    }
    assert!(lock.is_idle());
}

#[test]
fn every_io_thread_has_its_own_shard_and_the_shards_sum_up() {
    let counts: Arc<Sharded<AtomicU64>> = Arc::new(Sharded::default());
    let threads: Vec<_> =
        (0..4).map(|_| IoThread::start("shard", Config::default()).unwrap()).collect();
    let mut addresses: Vec<usize> = threads
        .iter()
        .map(|thread| {
            let counts = Arc::clone(&counts);
            let task = thread.spawn(|| async move {
                counts.local().fetch_add(thread_index() as u64 + 1, Ordering::Relaxed);
                std::ptr::from_ref(counts.local()).addr()
            });
            task.wait().unwrap()
        })
        .collect();
    counts.local().fetch_add(1000, Ordering::Relaxed);
    let expected: u64 = threads.iter().map(|t| t.index() as u64 + 1).sum::<u64>() + 1000;
    assert_eq!(counts.iter().map(|c| c.load(Ordering::Relaxed)).sum::<u64>(), expected);
    addresses.sort_unstable();
    addresses.dedup();
    assert_eq!(addresses.len(), 4);
}

#[test]
fn a_panicking_waker_does_not_block_other_requests() {
    struct Grenade;
    impl std::task::Wake for Grenade {
        fn wake(self: Arc<Self>) {
            panic!("woken");
        }
    }
    block_on(async {
        let lock = Rc::new(RangeLock::new());
        let held = lock.lock(0..10).await;
        let waker = std::task::Waker::from(Arc::new(Grenade));
        let mut bad = Box::pin(lock.lock(0..5));
        assert!(bad.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_pending());
        let good = Rc::clone(&lock);
        let good = spawn(async move { drop(good.lock(5..10).await) });
        yield_now().await;
        drop(held);
        good.await;
        drop(bad);
        assert!(lock.is_idle());
    });
}

/// A waker that takes and releases `lock` when it is dropped.
struct ReentrantWaker {
    lock: Arc<RangeLock>,
    /// How often the destructor has run.
    dropped: Arc<AtomicU64>,
}

impl ReentrantWaker {
    fn waker(lock: &Arc<RangeLock>, dropped: &Arc<AtomicU64>) -> Waker {
        Waker::from(Arc::new(Self { lock: Arc::clone(lock), dropped: Arc::clone(dropped) }))
    }
}

impl Wake for ReentrantWaker {
    fn wake(self: Arc<Self>) {}
}

impl Drop for ReentrantWaker {
    fn drop(&mut self) {
        self.lock.try_lock(0..100);
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn the_destructor_of_a_waker_may_use_the_lock() {
    let (lock, dropped) = (Arc::new(RangeLock::new()), Arc::new(AtomicU64::new(0)));
    let poll = |request: &mut Pin<Box<_>>| {
        let waker = ReentrantWaker::waker(&lock, &dropped);
        Future::poll(Pin::as_mut(request), &mut Context::from_waker(&waker)).is_ready()
    };
    let mut first: Pin<Box<dyn Future<Output = _>>> = Box::pin(lock.lock(0..10));
    assert!(poll(&mut first));
    assert_eq!(dropped.load(Ordering::Relaxed), 1);
    drop(first);
    let held = lock.try_lock(0..10).unwrap();
    let mut waiting: Pin<Box<dyn Future<Output = _>>> = Box::pin(lock.lock(0..10));
    assert!(!poll(&mut waiting));
    // The second waker replaces the first.
    assert!(!poll(&mut waiting));
    assert_eq!(dropped.load(Ordering::Relaxed), 2);
    drop(waiting);
    assert_eq!(dropped.load(Ordering::Relaxed), 3);
    drop(held);
    assert!(lock.is_idle());
}
