//! Model tests of the code that threads share. The source files of the engine are compiled with the primitives of the
//! model checker loom. Loom explores the interleavings of the threads (in most models with up to three preemptions) and
//! the reorderings that the memory orderings permit. A lost wake-up appears as a deadlock.

#![allow(dead_code, unreachable_pub, reason = "the models use a part of each file")]
#![allow(clippy::duplicate_mod, reason = "the same files, against other primitives")]
#![allow(clippy::unwrap_used, reason = "a model may fail by panicking, in its helpers too")]

mod atomics {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
    pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};

    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap()
    }
}

#[path = "oneshot.rs"]
mod oneshot;
#[path = "../sync/range_lock.rs"]
mod range_lock;
#[path = "../buf/references.rs"]
mod references;
#[path = "../buf/returned.rs"]
mod returned;
#[path = "wake.rs"]
mod wake;

use std::ptr::NonNull;

use atomics::{Arc, AtomicPtr, Condvar, Mutex, lock};
use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::thread;
use range_lock::RangeLock;
use references::References;
use returned::{Linked, Returned};
use wake::Mailbox;

/// Models the eventfd: a ring before the wait ends the wait immediately.
#[derive(Clone)]
struct Bell(Arc<(Mutex<bool>, Condvar)>);

impl Bell {
    fn new() -> Bell {
        Bell(Arc::new((Mutex::new(false), Condvar::new())))
    }

    fn ring(&self) {
        *lock(&self.0.0) = true;
        self.0.1.notify_one();
    }

    fn wait(&self) {
        let mut rung = lock(&self.0.0);
        while !*rung {
            rung = self.0.1.wait(rung).unwrap();
        }
        *rung = false;
    }
}

fn bounded() -> loom::model::Builder {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder
}

#[test]
fn a_sleeping_thread_is_woken_by_each_sender_of_a_message() {
    bounded().check(|| {
        let mailbox = Arc::new(Mailbox::new());
        let bell = Bell::new();
        let senders: Vec<_> = [1u32, 2]
            .into_iter()
            .map(|value| {
                let (mailbox, bell) = (Arc::clone(&mailbox), bell.clone());
                thread::spawn(move || {
                    if mailbox.push(value).unwrap() {
                        bell.ring();
                    }
                })
            })
            .collect();
        let mut sum = 0;
        while sum < 3 {
            mailbox.take().for_each(|value| sum += value);
            if sum < 3 && mailbox.prepare_sleep() {
                bell.wait();
                mailbox.awake();
            }
        }
        for sender in senders {
            sender.join().unwrap();
        }
    });
}

#[test]
fn a_flag_set_before_a_nudge_is_seen_by_the_thread_that_goes_to_sleep() {
    bounded().check(|| {
        let mailbox: Arc<Mailbox<u32>> = Arc::new(Mailbox::new());
        let flag = Arc::new(atomics::AtomicBool::new(false));
        let bell = Bell::new();
        let setter = {
            let (mailbox, flag, bell) = (Arc::clone(&mailbox), Arc::clone(&flag), bell.clone());
            thread::spawn(move || {
                flag.store(true, atomics::Ordering::Release);
                if mailbox.must_ring() {
                    bell.ring();
                }
            })
        };
        while !flag.load(atomics::Ordering::Acquire) {
            if mailbox.prepare_sleep() {
                if !flag.load(atomics::Ordering::Acquire) {
                    bell.wait();
                }
                mailbox.awake();
            }
        }
        setter.join().unwrap();
    });
}

#[test]
fn messages_of_one_sender_arrive_in_order_and_the_rest_are_dropped_with_the_mailbox() {
    bounded().check(|| {
        let mailbox = Arc::new(Mailbox::new());
        let payload = Arc::new(());
        let sender = {
            let (mailbox, payload) = (Arc::clone(&mailbox), Arc::clone(&payload));
            thread::spawn(move || {
                for number in 0..3 {
                    let _ = mailbox.push((number, Arc::clone(&payload))).unwrap_or(false);
                }
            })
        };
        for (place, (number, _)) in mailbox.take().enumerate() {
            assert_eq!(number, place);
        }
        sender.join().unwrap();
        drop(mailbox);
        assert_eq!(Arc::strong_count(&payload), 1);
    });
}

#[test]
fn a_message_pushed_while_the_mailbox_closes_is_taken_or_returned_to_its_sender() {
    bounded().check(|| {
        let mailbox = Arc::new(Mailbox::new());
        let senders: Vec<_> = [1u32, 2]
            .into_iter()
            .map(|value| {
                let mailbox = Arc::clone(&mailbox);
                thread::spawn(move || mailbox.push(value).err().unwrap_or(0))
            })
            .collect();
        let taken: u32 = mailbox.take().sum::<u32>() + mailbox.close().sum::<u32>();
        let given_back: u32 = senders.into_iter().map(|sender| sender.join().unwrap()).sum();
        assert_eq!(taken + given_back, 3);
        assert_eq!(mailbox.push(9), Err(9));
    });
}

#[test]
fn a_result_reaches_a_thread_that_blocks_on_it() {
    loom::model(|| {
        let (sender, receiver) = oneshot::channel();
        let thread = thread::spawn(move || sender.send(Ok(7)));
        assert_eq!(receiver.wait().unwrap().unwrap(), 7);
        thread.join().unwrap();
    });
}

#[test]
fn a_future_receives_a_result_and_learns_of_a_dropped_sender() {
    loom::model(|| {
        let (sender, receiver) = oneshot::channel();
        let (lost, gone) = oneshot::channel::<u32>();
        let thread = thread::spawn(move || {
            sender.send(Ok(7));
            drop(lost);
        });
        assert_eq!(block_on(receiver).unwrap().unwrap(), 7);
        assert!(block_on(gone).is_none());
        thread.join().unwrap();
    });
}

/// Locks the range on another thread and writes to the cell. Loom reports an access that is not exclusive.
fn write_under(
    lock: &Arc<RangeLock>,
    cell: &Arc<UnsafeCell<u32>>,
    range: std::ops::Range<u64>,
) -> thread::JoinHandle<()> {
    let (lock, cell) = (Arc::clone(lock), Arc::clone(cell));
    thread::spawn(move || {
        block_on(async {
            let guard = lock.lock(range).await;
            // SAFETY: the lock must permit no other access at the same time; the model checks this.
            cell.with_mut(|value| unsafe { *value += 1 });
            drop(guard);
        });
    })
}

#[test]
fn overlapping_ranges_exclude_each_other_across_threads() {
    bounded().check(|| {
        let lock = Arc::new(RangeLock::new());
        let cell = Arc::new(UnsafeCell::new(0));
        let threads = [write_under(&lock, &cell, 0..10), write_under(&lock, &cell, 5..15)];
        for thread in threads {
            thread.join().unwrap();
        }
        // SAFETY: all other threads have ended.
        assert_eq!(cell.with(|value| unsafe { *value }), 2);
        assert!(lock.is_idle());
    });
}

#[test]
fn a_cancelled_request_unblocks_the_requests_behind_it() {
    bounded().check(|| {
        let lock = Arc::new(RangeLock::new());
        let cell = Arc::new(UnsafeCell::new(0));
        let held = lock.try_lock(0..4).unwrap();
        let behind = {
            let mut cancelled = Box::pin(lock.lock(2..8));
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(cancelled.as_mut().poll(&mut cx).is_pending());
            write_under(&lock, &cell, 6..9)
        };
        behind.join().unwrap();
        drop(held);
        assert!(lock.is_idle());
    });
}

/// A piece of an arena, with memory that loom observes.
struct Piece {
    next: AtomicPtr<Piece>,
    memory: UnsafeCell<u32>,
}

impl Linked for Piece {
    fn link(&self) -> &AtomicPtr<Piece> {
        &self.next
    }
}

// SAFETY: only the holder of the piece uses the memory; the model checks this.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

#[test]
fn pieces_returned_by_other_threads_all_come_back_with_their_written_data() {
    bounded().check(|| {
        let pieces: Vec<Arc<Piece>> = (0..3)
            .map(|_| {
                let next = AtomicPtr::new(std::ptr::null_mut());
                Arc::new(Piece { next, memory: UnsafeCell::new(0) })
            })
            .collect();
        let stack = Arc::new(Returned::new());
        // One thread uses and returns two pieces, the other thread one.
        let threads: Vec<_> = [vec![0, 1], vec![2]]
            .into_iter()
            .map(|mine| {
                let (stack, pieces) = (Arc::clone(&stack), pieces.clone());
                thread::spawn(move || {
                    for index in mine {
                        let piece = &pieces[index];
                        // SAFETY: nobody else has the piece.
                        piece.memory.with_mut(|memory| unsafe { *memory = 1 });
                        // SAFETY: `pieces` of the model keeps the piece alive, and the piece is in no stack.
                        unsafe { stack.put(NonNull::from(&**piece)) };
                    }
                })
            })
            .collect();
        let mut back = 0;
        let mut take = || {
            stack.take(|piece| {
                // SAFETY: the piece is alive (see above), and no longer in the stack.
                let piece = unsafe { piece.as_ref() };
                // SAFETY: the piece is ours.
                back += piece.memory.with_mut(|memory| unsafe { std::mem::take(&mut *memory) });
            });
        };
        // Take pieces while the threads run, and again after the threads have ended.
        take();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        take();
        assert_eq!(back, 3);
    });
}

/// Memory with a reference count. The holder of the last reference frees it.
struct Counted {
    refs: References,
    memory: UnsafeCell<u32>,
}

// SAFETY: holders only read, and the only holder may write. The models check this.
unsafe impl Send for Counted {}
// SAFETY: as above.
unsafe impl Sync for Counted {}

impl Counted {
    /// Creates memory with `holders` references.
    fn shared(holders: usize) -> Arc<Counted> {
        let counted = Counted { refs: References::one(), memory: UnsafeCell::new(1) };
        (1..holders).for_each(|_| counted.refs.add());
        Arc::new(counted)
    }

    /// Reads the memory and drops a reference. If it was the last reference, writes to the memory and returns true.
    fn read_and_release(&self) -> bool {
        // SAFETY: nobody writes while this reference exists.
        assert_eq!(self.memory.with(|memory| unsafe { *memory }), 1);
        let last = self.refs.release();
        if last {
            // SAFETY: no reference is left.
            self.memory.with_mut(|memory| unsafe { *memory = 0 });
        }
        last
    }
}

#[test]
fn exactly_one_holder_frees_the_memory_after_all_other_holders_released_it() {
    bounded().check(|| {
        let counted = Counted::shared(3);
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let counted = Arc::clone(&counted);
                thread::spawn(move || counted.read_and_release())
            })
            .collect();
        let mut last = usize::from(counted.read_and_release());
        last += threads
            .into_iter()
            .filter_map(|thread| thread.join().ok())
            .filter(|last| *last)
            .count();
        assert_eq!(last, 1);
    });
}

#[test]
fn a_holder_that_sees_one_reference_may_write() {
    bounded().check(|| {
        let counted = Counted::shared(2);
        let other = {
            let counted = Arc::clone(&counted);
            thread::spawn(move || assert!(!counted.read_and_release()))
        };
        while !counted.refs.is_one() {
            thread::yield_now();
        }
        // SAFETY: the only reference.
        counted.memory.with_mut(|memory| unsafe { *memory = 2 });
        assert!(counted.refs.release());
        other.join().unwrap();
    });
}
