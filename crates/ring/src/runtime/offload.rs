//! Data work (compress, encrypt, hash) on a pool of worker threads sized to the cores, and blocking system calls on another.

use std::future::Future;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::pool::{Job, WorkerPool};
use super::{local, oneshot};

static DATA: WorkerPool = WorkerPool::new("oxblk-work", cores);
/// Threads that wait in system calls; their number bounds the queue depth of the `threads` backend.
pub(crate) static BLOCKING: WorkerPool = WorkerPool::new("oxblk-io", || 64);

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// How many threads [`offload`] uses at most: the number of cores unless set otherwise.
pub fn offload_threads() -> usize {
    DATA.limit()
}

/// Sets how many threads [`offload`] uses at most (at least one). Surplus threads end when they become idle.
pub fn set_offload_threads(n: usize) {
    DATA.set_limit(n);
}

/// Runs `f` on the worker pool; inside [`sim::run`](crate::sim::run) it runs at once, on the spot.
///
/// The work starts right away and runs to its end even when the future is dropped. A panic in `f` resumes in the awaiter.
pub fn offload<T: Send + 'static>(
    f: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> {
    run_on(&DATA, f)
}

/// Runs a system call that may block for long.
pub(crate) fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> {
    run_on(&BLOCKING, f)
}

fn run_on<T: Send + 'static>(
    pool: &'static WorkerPool,
    f: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> {
    let (sender, receiver) = oneshot::channel();
    let job = move || sender.send(catch_unwind(AssertUnwindSafe(f)));
    if local::is_simulated() {
        job();
    } else {
        pool.submit(Job::Call(Box::new(job)));
    }
    async move {
        match receiver.await {
            Some(Ok(value)) => value,
            Some(Err(panic)) => resume_unwind(panic),
            None => panic!("the worker pool lost a job"),
        }
    }
}
