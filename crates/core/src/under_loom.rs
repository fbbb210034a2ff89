//! Loom models of lock-free code. The models include the crate's own source files with loom's primitives, so that loom
//! tries every interleaving, and every reordering that the memory orderings permit.

#![allow(dead_code, unreachable_pub, reason = "the models use only parts of each file")]
#![allow(clippy::duplicate_mod, reason = "the same files with loom's primitives")]
#![allow(clippy::unwrap_used, reason = "a model may fail by panicking, in its helpers too")]

mod atomics {
    pub(crate) use loom::sync::atomic::{AtomicBool, Ordering, fence};
}

#[path = "unflushed.rs"]
mod unflushed;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use loom::thread;
use unflushed::Unflushed;

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
