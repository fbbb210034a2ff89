//! Loom models of the module `current`. The models include the source file of the module, with loom's primitives.

#![allow(clippy::duplicate_mod, reason = "the same file with loom's primitives")]
#![allow(clippy::unwrap_used, reason = "a model may fail by panicking")]

mod atomics {
    pub(super) use loom::sync::atomic::{Ordering, fence};
}

#[path = "current.rs"]
mod current;

use current::{mark_current, replace};
use loom::sync::Arc;
use loom::sync::atomic::{
    AtomicU64, AtomicUsize,
    Ordering::{AcqRel, Acquire, Release},
};
use loom::thread;

/// A bitmap with two maps; the state is the number of the current map.
struct Bitmap {
    state: AtomicUsize,
    maps: [AtomicU64; 2],
}

impl Bitmap {
    fn new() -> Arc<Self> {
        let maps = [AtomicU64::new(0), AtomicU64::new(0)];
        Arc::new(Self { state: AtomicUsize::new(0), maps })
    }

    /// Sets bits in the same way as a map: nothing is written if the bits are set already.
    fn set(&self, map: usize, bits: u64) {
        if self.maps[map].load(Acquire) & bits != bits {
            self.maps[map].fetch_or(bits, AcqRel);
        }
    }

    fn mark(&self, bits: u64) {
        let current = || self.state.load(Acquire);
        mark_current(current, |one, other| one == other, |map| self.set(*map, bits));
    }

    /// Replaces the first map by the second and copies the bits of the first.
    fn resize(&self) {
        replace(|| self.state.store(1, Release));
        self.set(1, self.maps[0].load(Acquire));
    }

    /// Replaces the first map by the second. Returns the bits that the first map has after the replacement.
    fn clear(&self) -> u64 {
        replace(|| self.state.store(1, Release));
        self.maps[0].load(Acquire)
    }
}

fn bounded() -> loom::model::Builder {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder
}

/// Runs `change` while two threads set bits. Returns the result of `change`, and the bits of the second map at the end.
fn marked_during<T>(bits: [u64; 2], change: impl FnOnce(&Bitmap) -> T) -> (T, u64) {
    let bitmap = Bitmap::new();
    let marker = |bits| {
        let bitmap = Arc::clone(&bitmap);
        thread::spawn(move || bitmap.mark(bits))
    };
    let markers = bits.map(marker);
    let changed = change(&bitmap);
    for marker in markers {
        marker.join().unwrap();
    }
    (changed, bitmap.maps[1].load(Acquire))
}

#[test]
fn a_mark_during_a_resize_is_copied_or_repeated() {
    bounded().check(|| {
        let ((), left) = marked_during([1, 2], Bitmap::resize);
        assert_eq!(left, 3);
    });
}

#[test]
fn a_mark_on_bits_already_set_survives_a_resize() {
    bounded().check(|| {
        let ((), left) = marked_during([1, 1], Bitmap::resize);
        assert_eq!(left, 1);
    });
}

#[test]
fn a_mark_during_a_clear_is_in_the_old_map_or_in_the_new_one() {
    bounded().check(|| {
        let (cleared, left) = marked_during([1, 2], Bitmap::clear);
        assert_eq!(cleared | left, 3);
    });
}
