//! Tests of the lock-free parts of the cache with the model checker loom. `state.rs` and `version.rs` are compiled against
//! loom's primitives. loom then tries the interleavings with at most three preemptions, and the reorderings that the memory
//! orderings permit.

#![allow(dead_code, unreachable_pub, reason = "the models use a part of each file")]
#![allow(clippy::duplicate_mod, reason = "the same files, against other primitives")]
#![allow(clippy::unwrap_used, reason = "a model may fail by panicking")]

mod atomics {
    pub(super) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    pub(super) use loom::sync::{Mutex, MutexGuard};

    pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap()
    }
}

#[path = "state.rs"]
mod state;
#[path = "version.rs"]
mod version;

use atomics::{
    AtomicU64, Mutex,
    Ordering::{Acquire, Relaxed, Release},
    lock,
};
use loom::sync::Arc;
use loom::thread;
use state::{DirtyList, State};
use version::Version;

fn bounded() -> loom::model::Builder {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder
}

/// One slot of two words, and the copy of these words on disk.
struct Image {
    list: DirtyList,
    state: State,
    words: [AtomicU64; 2],
    /// The lock ensures that only one flush runs at a time, as with write-back cycles.
    disk: Mutex<[u64; 2]>,
}

impl Image {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            list: DirtyList::default(),
            state: State::new(),
            words: [AtomicU64::new(0), AtomicU64::new(0)],
            disk: Mutex::new([0; 2]),
        })
    }

    fn change(&self, word: usize) {
        assert!(self.state.pin());
        self.words[word].store(1, Release);
        self.list.mark(&self.state, 1);
        self.state.unpin();
    }

    fn flush(&self) -> [u64; 2] {
        let mut disk = lock(&self.disk);
        for _ in self.list.take() {
            if self.state.take_dirty() {
                // The copy may read the two words at different times, because this model has no version.
                *disk = [0, 1].map(|word: usize| self.words[word].load(Acquire));
                self.state.unpin();
            }
        }
        *disk
    }
}

#[test]
fn a_flush_writes_every_change_that_was_completed_before_it() {
    bounded().check(|| {
        let image = Image::new();
        let threads: Vec<_> = (0..2)
            .map(|own| {
                let image = Arc::clone(&image);
                thread::spawn(move || {
                    image.change(own);
                    assert_eq!(image.flush()[own], 1, "the flush missed the thread's own change");
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(image.flush(), [1, 1]);
    });
}

#[test]
fn a_change_during_a_flush_is_written_by_the_next_one() {
    bounded().check(|| {
        let image = Image::new();
        image.change(0);
        let flushing = {
            let image = Arc::clone(&image);
            thread::spawn(move || image.flush())
        };
        image.change(1);
        assert_eq!(image.flush(), [1, 1]);
        flushing.join().unwrap();
    });
}

#[test]
fn a_slot_with_an_unwritten_change_is_not_claimed() {
    bounded().check(|| {
        let image = Image::new();
        let changing = {
            let image = Arc::clone(&image);
            thread::spawn(move || {
                // A claimed slot no longer contains the slice, so a change would use another slot.
                if image.state.pin() {
                    image.words[0].store(1, Release);
                    image.list.mark(&image.state, 1);
                    image.state.unpin();
                    true
                } else {
                    false
                }
            })
        };
        image.flush();
        if image.state.claim() {
            // No thread changes the words of a claimed slot, and the disk has the same words.
            assert_eq!(image.words[0].load(Acquire), lock(&image.disk)[0]);
            image.state.unclaim();
        }
        if changing.join().unwrap() {
            assert_eq!(image.flush()[0], 1);
        }
    });
}

#[test]
fn a_reader_sees_all_words_of_a_change_or_none() {
    bounded().check(|| {
        let slot = Arc::new((Version::new(), [AtomicU64::new(0), AtomicU64::new(0)]));
        let writer = {
            let slot = Arc::clone(&slot);
            thread::spawn(move || {
                for round in 1..3 {
                    let changing = slot.0.begin_change();
                    slot.1.iter().for_each(|word| word.store(round, Relaxed));
                    drop(changing);
                }
            })
        };
        if let Some(before) = slot.0.before() {
            let seen = [0, 1].map(|word: usize| slot.1[word].load(Relaxed));
            assert!(!slot.0.is_still(before) || seen[0] == seen[1]);
        }
        writer.join().unwrap();
        assert!(slot.0.before().is_some());
    });
}

#[test]
fn a_reader_detects_concurrent_changes_of_several_threads() {
    bounded().check(|| {
        let slot = Arc::new((Version::new(), [0; 4].map(AtomicU64::new)));
        let writers: Vec<_> = [0_usize, 2]
            .into_iter()
            .map(|own| {
                let slot = Arc::clone(&slot);
                thread::spawn(move || {
                    let changing = slot.0.begin_change();
                    slot.1[own].store(1, Relaxed);
                    slot.1[own + 1].store(1, Relaxed);
                    drop(changing);
                })
            })
            .collect();
        if let Some(before) = slot.0.before() {
            let seen = [0, 1, 2, 3].map(|word: usize| slot.1[word].load(Relaxed));
            let whole = seen[0] == seen[1] && seen[2] == seen[3];
            assert!(!slot.0.is_still(before) || whole);
        }
        for writer in writers {
            writer.join().unwrap();
        }
    });
}
