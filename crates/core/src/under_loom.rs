//! Loom models of lock-free code. The models include the crate's own source files with loom's primitives, so that loom
//! tries every interleaving, and every reordering that the memory orderings permit.

#![allow(dead_code, unreachable_pub, reason = "the models use only parts of each file")]
#![allow(clippy::duplicate_mod, reason = "the same files with loom's primitives")]
#![allow(clippy::unwrap_used, reason = "a model may fail by panicking, in its helpers too")]

mod atomics {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
}

#[path = "unflushed.rs"]
mod unflushed;
#[path = "writes_in_flight.rs"]
mod writes_in_flight;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering, Ordering::Relaxed, fence};
use loom::thread;
use unflushed::Unflushed;
use writes_in_flight::Slots;

/// A host with one block, in the page cache and on the medium. `cached` is the contents of the page cache. Accesses to
/// `cached` are relaxed, so that only the flag orders them.
struct Host {
    unflushed: Unflushed,
    cached: AtomicUsize,
}

impl Host {
    fn new() -> Arc<Self> {
        Arc::new(Self { unflushed: Unflushed::new(), cached: AtomicUsize::new(0) })
    }

    fn write(&self, value: usize) {
        self.cached.store(value, Relaxed);
        self.unflushed.mark();
    }

    /// Flushes, and returns the contents of the medium. `medium` is the contents of the medium before the flush.
    fn flush(&self, medium: usize) -> usize {
        if self.unflushed.take() { self.cached.load(Relaxed) } else { medium }
    }
}

#[test]
fn a_flush_that_starts_after_a_write_puts_it_on_the_medium() {
    loom::model(|| {
        let host = Host::new();
        host.write(1);
        let flusher = {
            let host = Arc::clone(&host);
            thread::spawn(move || host.flush(0))
        };
        // A second write completes while the first flush is in progress.
        host.write(2);
        let medium = flusher.join().unwrap();
        // Flushes of one node run one after the other.
        assert_eq!(host.flush(medium), 2);
    });
}

/// A block that writers of one thread and a serialising request of another thread change. `block` detects accesses at the same
/// time.
struct Block {
    slots: Slots,
    serialising: AtomicUsize,
    block: UnsafeCell<u32>,
}

impl Block {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            slots: Slots::new(1),
            serialising: AtomicUsize::new(0),
            block: UnsafeCell::new(0),
        })
    }

    fn change(&self) {
        self.block.with_mut(|_| ());
    }

    /// Writes bytes 0 to 8 if no serialising request is in progress.
    fn write(&self) {
        let entered = self.slots.enter(&(0..8)).unwrap();
        if self.serialising.load(Ordering::SeqCst) == 0 {
            self.change();
        }
        self.slots.leave(entered);
    }

    /// Uses the slot for another range, whose write changes another block.
    fn write_elsewhere(&self) {
        let entered = self.slots.enter(&(64..72)).unwrap();
        self.slots.leave(entered);
    }

    fn serialise(&self) {
        self.serialising.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        for write in self.slots.overlapping(&(4..12)) {
            while self.slots.is_in_flight(write) {
                thread::yield_now();
            }
        }
        self.change();
    }
}

#[test]
fn a_serialising_request_and_an_overlapping_write_never_run_at_the_same_time() {
    loom::model(|| {
        let block = Block::new();
        let writer = {
            let block = Arc::clone(&block);
            thread::spawn(move || {
                block.write();
                block.write_elsewhere();
            })
        };
        block.serialise();
        writer.join().unwrap();
    });
}

#[test]
fn a_serialising_request_waits_for_no_write_elsewhere() {
    loom::model(|| {
        let block = Block::new();
        let entered = block.slots.enter(&(12..64)).unwrap();
        // This call would wait forever for the write.
        block.serialise();
        block.slots.leave(entered);
    });
}
