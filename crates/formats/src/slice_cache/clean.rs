//! Dropping cached slices that were not used for a while (`cache-clean-interval`).
//!
//! A task scans the caches once per interval. The task runs on the I/O thread that opened the image or last changed the
//! interval. The task does not keep the caches alive. While no slice is cached, the task waits without a timer, so that an
//! idle image wakes no thread.

use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire},
};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use oxblk_ring::{Event, now, spawn, timeout, try_thread_index, yield_now};

use super::{SliceCache, lock};

/// State that the task and the [`Cleaner`] share.
struct Signal {
    /// Notified when the task must end, and when the first slice is cached.
    event: Arc<Event>,
    /// Incremented when the interval changes. A task that was started for an older value ends.
    turn: AtomicU64,
}

/// Drops unused slices from the caches of an image, until the cleaner itself is dropped.
pub(crate) struct Cleaner {
    signal: Arc<Signal>,
    interval: Mutex<Duration>,
    caches: Arc<[Weak<SliceCache>]>,
}

impl Cleaner {
    /// A cleaner without a task. All caches notify `event` when they are no longer empty.
    pub(crate) fn new(event: Arc<Event>, caches: impl Into<Arc<[Weak<SliceCache>]>>) -> Self {
        let signal = Arc::new(Signal { event, turn: AtomicU64::new(0) });
        Self { signal, interval: Mutex::default(), caches: caches.into() }
    }

    /// Makes the cleaner drop slices that were not used for at least `interval`. The cleaner drops no slices if `interval`
    /// is 0, or if the caller does not run on an I/O thread.
    pub(crate) fn set_interval(&self, interval: Duration) {
        let mut current = lock(&self.interval);
        if *current == interval {
            return;
        }
        *current = interval;
        let turn = self.signal.turn.fetch_add(1, AcqRel).wrapping_add(1);
        self.signal.event.notify(usize::MAX);
        if !interval.is_zero() && try_thread_index().is_some() {
            spawn(run(Arc::clone(&self.signal), turn, interval, Arc::clone(&self.caches))).detach();
        }
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        self.set_interval(Duration::ZERO);
    }
}

async fn run(signal: Arc<Signal>, turn: u64, interval: Duration, caches: Arc<[Weak<SliceCache>]>) {
    let mut due = None;
    loop {
        let listener = signal.event.listen();
        if signal.turn.load(Acquire) != turn {
            return;
        }
        let cached = caches.iter().filter_map(Weak::upgrade).any(|cache| cache.in_use() != 0);
        if !cached {
            due = None;
            listener.await;
            continue;
        }
        let at: Duration = *due.get_or_insert_with(|| now().saturating_add(interval));
        if timeout(at.saturating_sub(now()), listener).await.is_err() {
            for cache in caches.iter() {
                clean(cache).await;
            }
            due = None;
        }
    }
}

/// Scans a cache in small steps, so that other tasks of the thread wait only briefly.
async fn clean(cache: &Weak<SliceCache>) {
    for chunk in 0.. {
        let there = cache.upgrade().is_some_and(|cache| cache.drop_unused(chunk));
        if !there {
            return;
        }
        yield_now().await;
    }
}
