//! Power cuts while four I/O threads work on the image concurrently.
//!
//! Several threads can use the simulated disk. The disk executes each operation immediately. So the operations in flight at a
//! power cut depend on the scheduler of the machine. Tasks yield at random between the steps of a request, so that requests of
//! one thread interleave as well, and hand-overs between threads are delayed at random ([`oxblk_ring::perturb`]). A seed gives
//! the same images and operations, but not the same order. A failure therefore saves its images.

use oxblk_core::Backend;
use oxblk_ring::sim;
use oxblk_ring::{Config, IoThread};

use super::history::History;
use super::look::{Cut, Look, look, look_at_cut};
use super::qemu;
use super::workload::{Workload, active};
use crate::filters::Stack;
use crate::formats::Variant;
use crate::model::chain::{self, Chain, Tolerance};
use crate::model::pool::{Next, Pool};
use crate::model::run;
use crate::perturbed::Perturbed;
use crate::random::Random;
use crate::tally::Tally;
use crate::tasks::Tasks;

/// The number of I/O threads.
const THREADS: usize = 4;
/// The number of tasks on each thread. Each task has one operation in flight.
const TASKS: usize = 4;

/// One task: executes operations until the pool is empty or a check fails.
pub(super) async fn requests(disk: Backend, pool: Pool, history: History) {
    loop {
        let op = match pool.take() {
            Next::Do(op) => op,
            Next::Wait => {
                oxblk_ring::yield_now().await;
                continue;
            }
            Next::End => return,
        };
        let number = history.issue(&op);
        let outcome = run::execute(&disk, &op).await;
        if outcome.is_ok() {
            history.complete(number);
        }
        pool.done(&op, outcome.map(drop).map_err(|error| format!("{op:?}: {error}")));
    }
}

/// Runs the operations on a chain from all threads.
fn work(chain: &Chain, pool: &Pool, history: &History, seed: u64) -> Result<(), String> {
    let _perturbed = Perturbed::new(seed, chain.last().map_or("", |image| image.variant.name));
    let start = |n| IoThread::start(&format!("crash-{n}"), Config::default()).expect("a thread");
    let threads: Vec<IoThread> = (0..THREADS).map(start).collect();
    let gone = |gone| format!("a thread ended early: {gone:?}");
    let images = chain.clone();
    let opening = threads[0].spawn(move || async move { chain::open_slow(&images).await });
    let disk = opening.wait().map_err(gone)??;
    let mut tasks = Tasks::new();
    for thread in threads.iter().cycle().take(THREADS * TASKS) {
        let (disk, pool, history) = (disk.clone(), pool.clone(), history.clone());
        tasks.spawn(thread, move || requests(disk, pool, history));
    }
    tasks.wait()?;
    pool.outcome()?;
    threads[0].spawn(move || chain::close(disk)).wait().map_err(gone)?
}

fn attempt(workload: &Workload, operations: u64, cuts: usize) -> Result<Tally, String> {
    let (chain, disks, start) = sim::run(workload.seed, workload.build())?;
    let power = active(&chain);
    power.keep_moments(workload.seed, cuts);
    let history = History::new(&[power]);
    let random = Random::new(workload.seed ^ 0x7ead);
    let pool = Pool::new(workload.shape.clone(), random, operations);
    work(&chain, &pool, &history, workload.seed)?;
    let mut tally = Tally { operations: history.operations(), ..Tally::default() };
    tally.chain(workload.images());
    let mut replay = history.replay(start);
    for (number, (boundary, moment)) in power.moments().into_iter().enumerate() {
        let cut = Cut { boundary, disks: disks.on(std::slice::from_ref(&moment)), number };
        let seen = look_at_cut(workload, &chain, &cut, replay.at(boundary));
        tally.add(&seen.map_err(|e| format!("{e}\n{}", qemu::keep(&chain, &moment)))?);
    }
    let how = Look { go_on: false, by_qemu: true };
    let end = look(workload, &chain, power, replay.at_the_end(), Tolerance::Clean, how);
    tally.checked_by_qemu += sim::run(0, end)
        .map_err(|e| format!("without a cut: {e}\n{}", qemu::keep(&chain, power)))?
        .asked_qemu;
    Ok(tally)
}

/// Runs `operations` operations of a seed, then examines the disks that a power cut may leave, at up to `cuts` of the write
/// boundaries.
///
/// # Panics
/// When flushed data is lost, or an image has worse faults than leaks. The message contains the seed and the boundary.
pub fn run(variant: &'static Variant, seed: u64, operations: u64, cuts: usize) -> Tally {
    let workload = Workload::new(variant, seed, &Stack::default());
    let attempt = std::panic::AssertUnwindSafe(|| attempt(&workload, operations, cuts));
    let outcome = std::panic::catch_unwind(attempt);
    match outcome.unwrap_or_else(|panic| Err(crate::panic_text(&*panic))) {
        Ok(tally) => tally,
        Err(error) => panic!("{} crash on threads: {error}", workload.describe()),
    }
}
