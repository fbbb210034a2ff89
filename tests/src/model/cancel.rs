//! Cancelled requests on real files from four I/O threads.
//!
//! About half of the requests are cancelled: their futures are dropped after some polls or some microseconds, at any step. The
//! range of a cancelled request is used again after all of its remaining operations have ended ([`Backend::quiesce`]). These
//! properties must hold: no request waits forever; every completed request has its effect; each sector of a cancelled request
//! has its old or its new content; the image closes, and its check finds no fault, not even a leak.

use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use oxblk_core::Backend;

use super::files::Access;
use super::ops::{Op, Shape};
use super::pool::{Next, Pool};
use super::run::{Seen, execute};
use super::threads::{Extent, Run};
use crate::crash::oracle::CrashOracle;
use crate::filters::Stack;
use crate::formats::Variant;
use crate::perturbed::Perturbed;
use crate::random::Random;
use crate::scratch;
use crate::tally::Tally;
use crate::tasks::Tasks;

/// The moment at which a request is cancelled.
#[derive(Clone, Copy, Debug)]
enum Patience {
    /// Never.
    Endless,
    /// After this number of polls, if the request is still pending.
    Polls(u64),
    /// After this time.
    Time(Duration),
}

impl Patience {
    fn random(random: &mut Random) -> Self {
        match random.below(4) {
            0 => Patience::Polls(random.within(1, 6)),
            1 => Patience::Time(Duration::from_micros(random.below(400))),
            _ => Patience::Endless,
        }
    }
}

/// Polls a future until it is complete or the patience has ended. If the patience has ended, the future is dropped.
async fn with_patience<F: Future>(patience: Patience, future: F) -> Option<F::Output> {
    match patience {
        Patience::Endless => Some(future.await),
        Patience::Time(time) => oxblk_ring::timeout(time, future).await.ok(),
        Patience::Polls(polls) => {
            let mut future = pin!(future);
            let mut left = polls;
            std::future::poll_fn(move |context| match future.as_mut().poll(context) {
                Poll::Ready(output) => Poll::Ready(Some(output)),
                Poll::Pending if left <= 1 => Poll::Ready(None),
                Poll::Pending => {
                    left -= 1;
                    Poll::Pending
                }
            })
            .await
        }
    }
}

/// The state that the tasks of a phase share.
#[derive(Clone)]
struct Shared {
    pool: Pool,
    oracle: Arc<Mutex<CrashOracle>>,
    cancelled: Arc<Mutex<u64>>,
    /// Cancelled operations that may still be in progress.
    lingering: Arc<Mutex<Vec<Op>>>,
}

/// If this number of cancelled operations are in progress, a task waits for their end.
const LINGERING: usize = 12;

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Executes one operation, which may be cancelled. Returns whether it completed.
    async fn carry_out(&self, disk: &Backend, op: &Op, patience: Patience) -> Result<bool, String> {
        let ticket = lock(&self.oracle).issue(op);
        let Some(outcome) = with_patience(patience, execute(disk, op)).await else {
            return Ok(false);
        };
        let seen = outcome.map_err(|error| format!("{op:?}: {error}"))?;
        let mut oracle = lock(&self.oracle);
        match seen {
            Seen::Bytes(bytes) => oracle.observe(op.range().start, &bytes),
            Seen::Done | Seen::Extents(_) => {
                oracle.complete_for_good(op, ticket);
                Ok(())
            }
        }
        .map(|()| true)
        .map_err(|error| format!("{op:?}: {error}"))
    }

    /// Waits until all cancelled operations have ended. After the wait, their ranges may be used again.
    async fn wait_for_lingering(&self, disk: &Backend) {
        let gone = std::mem::take(&mut *lock(&self.lingering));
        if !gone.is_empty() {
            drop(disk.quiesce().await);
        }
        for op in gone {
            self.pool.done(&op, Ok(()));
        }
    }

    /// One task: executes operations until the pool is empty or a check fails.
    async fn task(self, disk: Backend, seed: u64) {
        let mut random = Random::new(seed);
        loop {
            let op = match self.pool.take() {
                Next::Do(op) => op,
                Next::Wait => {
                    self.wait_for_lingering(&disk).await;
                    oxblk_ring::yield_now().await;
                    continue;
                }
                Next::End => return,
            };
            let patience = Patience::random(&mut random);
            match self.carry_out(&disk, &op, patience).await {
                Ok(true) => self.pool.done(&op, Ok(())),
                Ok(false) => {
                    *lock(&self.cancelled) += 1;
                    lock(&self.lingering).push(op);
                }
                Err(error) => self.pool.done(&op, Err(format!("{patience:?}: {error}"))),
            }
            if lock(&self.lingering).len() >= LINGERING {
                self.wait_for_lingering(&disk).await;
            }
        }
    }
}

impl Run {
    /// Sends requests to the open image from all threads and cancels some of them.
    fn work_impatiently(
        &mut self,
        disk: &Backend,
        oracle: &Arc<Mutex<CrashOracle>>,
        stack: &Stack,
        operations: u64,
    ) -> Result<(), String> {
        let _perturbed = Perturbed::new(self.seed, self.variant.name);
        let compress = stack.passes_compressed(self.variant);
        let shape = Shape { alignment: 512, compress, ..self.shape.clone() };
        let shared = Shared {
            pool: Pool::new(shape, self.random.fork(), operations),
            oracle: Arc::clone(oracle),
            cancelled: Arc::default(),
            lingering: Arc::default(),
        };
        let mut tasks = Tasks::new();
        for thread in self.files.thread_of_each_task() {
            let (disk, shared) = (disk.clone(), shared.clone());
            let seed = self.random.next_u64();
            tasks.spawn(thread, move || shared.task(disk, seed));
        }
        tasks.wait()?;
        let lingering = disk.clone();
        self.files.on_thread(move || async move {
            drop(lingering.quiesce().await);
            Ok(())
        })?;
        self.tally.operations += operations;
        self.tally.cancelled += *lock(&shared.cancelled);
        shared.pool.outcome()
    }

    /// Reads the disk. The contents must be possible. After the read, they are the only possible contents.
    fn observe_all(
        &self,
        disk: &Backend,
        oracle: &Arc<Mutex<CrashOracle>>,
    ) -> Result<Vec<u8>, String> {
        let (disk, op) = (disk.clone(), Op::Read { offset: 0, len: self.shape.size });
        let bytes = self.files.on_thread(move || async move {
            match execute(&disk, &op).await {
                Ok(Seen::Bytes(bytes)) => Ok(bytes.to_vec()),
                other => Err(format!("{op:?}: {other:?}")),
            }
        })?;
        lock(oracle).observe(0, &bytes)?;
        Ok(bytes)
    }

    fn cancel_phases(&mut self, extent: Extent, on_disk: bool) -> Result<(), String> {
        let oracle = Arc::new(Mutex::new(CrashOracle::new(self.content())));
        for number in 0..extent.phases {
            let aio = self.random.pick(&["io_uring", "threads"]);
            let direct = on_disk && self.random.one_in(2);
            let copy_on_read = self.random.one_in(3);
            let stack = self.random_stack(extent.filters);
            let access = Access { aio, direct, copy_on_read, stack: stack.clone() };
            let shown = format!("phase {number}, {access:?}");
            let fail = |error| format!("{shown}: {error}");
            let disk = self.files.open(access, self.shape.size).map_err(fail)?;
            self.work_impatiently(&disk, &oracle, &stack, extent.operations).map_err(fail)?;
            let bytes = self.observe_all(&disk, &oracle).map_err(fail)?;
            self.files.close(disk).map_err(fail)?;
            self.tally.checked_by_qemu += self.files.check_by_qemu(self.variant).map_err(fail)?;
            self.files.compare_by_qemu(&bytes).map_err(fail)?;
        }
        Ok(())
    }
}

/// Runs the operations of a seed on a new chain of image files, and cancels about half of the operations. The seed chooses
/// whether the files are on tmpfs or on a slower disk.
///
/// # Panics
/// When a request waits forever, the contents are not possible, or QEMU's check of an image fails. The message contains the
/// seed.
pub fn run(variant: &'static Variant, seed: u64, extent: Extent) -> Tally {
    let on_disk = seed / 4 % 2 == 1;
    let directory = if on_disk { scratch::on_disk() } else { scratch::in_memory() };
    let mut run = Run::new(variant, seed, directory);
    let outcome = run.build().and_then(|()| run.cancel_phases(extent, on_disk));
    match outcome {
        Ok(()) => run.tally,
        Err(error) => {
            let kept = run.files.keep();
            panic!("{} cancel seed {seed}: {error}\n{kept}", variant.name)
        }
    }
}
