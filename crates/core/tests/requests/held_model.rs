//! A random test of error policies in virtual time: several tasks write and read, some of their requests are cancelled, the disk
//! fails at times, and requests are resumed, drained, and lose their medium. A deadlock ends the simulation with a panic.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use oxblk_core::{Backend, Errno, Limits, OnError, WriteFlags};
use oxblk_ring::{IoBufMut, sim, sleep, spawn, timeout};

use super::devices::{backend, policies};
use crate::memory::{Memory, node};

const WORKERS: usize = 4;
const SECTORS: usize = 4;
const ROUNDS: u32 = 30;

/// Pseudo-random numbers (xorshift).
struct Random(Cell<u64>);

impl Random {
    fn new(seed: u64) -> Self {
        Self(Cell::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1))
    }

    /// A number below `end`.
    fn below(&self, end: u64) -> u64 {
        let mut x = self.0.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.set(x);
        x % end
    }
}

/// The values that a sector may have: the last value that was written, and the values of requests that failed or were cancelled
/// after it.
type Possible = Rc<RefCell<Vec<Vec<u8>>>>;

/// Makes requests to the sectors of one worker. Returns how many writes have succeeded and how many have failed.
async fn work(
    backend: Backend,
    random: Random,
    first: usize,
    possible: Possible,
    same_medium: bool,
) -> (u64, u64) {
    let (mut succeeded, mut failed) = (0, 0);
    for round in 0..ROUNDS {
        let sector = first + usize::try_from(random.below(SECTORS as u64)).unwrap();
        let offset = sector as u64 * 512;
        if random.below(3) == 0 {
            if let Ok(read) = backend.read(offset, IoBufMut::new(512)).await
                && same_medium
            {
                assert!(possible.borrow()[sector].contains(&read[0]), "sector {sector}");
                assert!(read.iter().all(|byte| *byte == read[0]));
            }
            continue;
        }
        let value = u8::try_from(round + 1).unwrap();
        possible.borrow_mut()[sector].push(value);
        let write = backend.write(offset, vec![value; 512].into(), WriteFlags::empty());
        let limit = if random.below(4) == 0 { random.below(20) } else { 1_000_000 };
        match timeout(Duration::from_millis(limit), write).await {
            Ok(Ok(())) => {
                succeeded += 1;
                possible.borrow_mut()[sector] = vec![value];
            }
            Ok(Err(_)) => failed += 1,
            // The request was cancelled. The disk may still carry it out, so the next one waits.
            Err(_) => drop(backend.quiesce().await),
        }
    }
    (succeeded, failed)
}

fn run(seed: u64, policy: OnError, changes_medium: bool) {
    sim::run(seed, async move {
        let memory = Memory::new(WORKERS * SECTORS * 512, Limits::default());
        memory.delay_ms.store(3, SeqCst);
        let (graph, backend, _) = backend(&memory);
        backend.set_accounting(Default::default()).unwrap();
        let device = backend.attach_device(policies(policy, policy)).unwrap();
        let root = backend.node().unwrap();
        graph.keep_open(Arc::clone(&root)).unwrap();
        let other = node(&graph, "other", &Memory::new(WORKERS * SECTORS * 512, Limits::default()));
        graph.keep_open(Arc::clone(&other)).unwrap();
        let possible: Possible = Rc::new(RefCell::new(vec![vec![0]; WORKERS * SECTORS]));
        let running = Rc::new(Cell::new(WORKERS));
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let random = Random::new(seed * 100 + worker as u64);
                let (backend, possible) = (backend.clone(), Rc::clone(&possible));
                let running = Rc::clone(&running);
                spawn(async move {
                    let first = worker * SECTORS;
                    let counts = work(backend, random, first, possible, !changes_medium).await;
                    running.set(running.get() - 1);
                    counts
                })
            })
            .collect();
        let random = Random::new(seed + 7);
        while running.get() > 0 {
            sleep(Duration::from_millis(random.below(10))).await;
            match random.below(8) {
                0 => memory.errno.store(Errno::IO, SeqCst),
                1 => memory.errno.store(Errno::NOSPC, SeqCst),
                2 | 3 => memory.errno.store(0, SeqCst),
                4 => {
                    let drained = graph.drain(&root).await;
                    backend.resume();
                    sleep(Duration::from_millis(random.below(10))).await;
                    drop(drained);
                }
                5 if changes_medium && backend.remove().await.is_ok() => {
                    let next = if random.below(2) == 0 { &root } else { &other };
                    backend.insert(next).await.unwrap();
                }
                _ => backend.resume(),
            }
        }
        let (mut succeeded, mut failed) = (0, 0);
        for worker in workers {
            let counts = worker.await;
            (succeeded, failed) = (succeeded + counts.0, failed + counts.1);
        }
        let counts = backend.statistics().unwrap().counts.write;
        assert_eq!((counts.operations, counts.failed + counts.invalid), (succeeded, failed));
        assert_eq!(backend.held_requests(), 0);
        memory.errno.store(0, SeqCst);
        drop(device);
        backend.close().await.unwrap();
        graph.allow_close(root).await.unwrap();
        graph.allow_close(other).await.unwrap();
        assert!(graph.nodes().is_empty());
    });
}

#[test]
fn random_errors_resumes_and_drains_lose_no_write() {
    for seed in 0..60 {
        run(seed, OnError::Stop, false);
        run(seed, OnError::Enospc, false);
    }
}

#[test]
fn random_media_changes_leave_no_request_waiting() {
    for seed in 0..60 {
        run(seed, OnError::Stop, true);
    }
}
