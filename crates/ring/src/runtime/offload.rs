//! Three pools of worker threads. The first pool is for data work (compress, encrypt, hash); by default it has at most
//! one thread per core. The second pool executes blocking system calls on files. The third pool executes calls that
//! wait for peers.

use std::future::Future;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::pool::{Job, WorkerPool};
use super::{local, oneshot};
use crate::reactor::start_call;

/// Bytes of stack of a thread that only makes system calls.
const SMALL_STACK: usize = 512 << 10;

static DATA: WorkerPool = WorkerPool::new("oxblk-work", cores, 2 << 20);
/// Threads that execute system calls on files. The number of threads limits the queue depth of the `threads` backend.
pub(crate) static BLOCKING: WorkerPool = WorkerPool::new("oxblk-io", || 64, SMALL_STACK);
/// Threads that wait for peers, possibly for a long time. The pool is separate, because a closing thread waits for
/// its operations on files, and these operations must not wait behind a slow peer.
static WAITING: WorkerPool = WorkerPool::new("oxblk-wait", || 64, SMALL_STACK);

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Maximum number of threads that [`offload`] uses. The default is the number of cores that the process may use.
pub fn offload_threads() -> usize {
    DATA.limit()
}

/// Sets the maximum number of threads that [`offload`] uses (at least one). Surplus threads end after their current
/// jobs.
pub fn set_offload_threads(n: usize) {
    DATA.set_limit(n);
}

/// Runs `f` on the worker pool; inside [`sim::run`](crate::sim::run) `f` runs immediately on the calling thread.
///
/// The work starts immediately and runs to completion even if the future is dropped. A panic in `f` resumes in the
/// task that awaits the future.
pub fn offload<T: Send + 'static>(
    f: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> {
    run_on(&DATA, f)
}

/// Runs a blocking call on a file. The call is an operation of the current I/O thread: [`settled`](super::settled)
/// waits for the call, and the I/O thread does not end before the call has completed.
///
/// # Panics
/// If the caller is not on an I/O thread.
pub(crate) fn on_file<T: Send + 'static>(
    f: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> {
    let (sender, receiver) = oneshot::channel();
    let pending = start_call(Box::new(move || sender.send(catch_unwind(AssertUnwindSafe(f)))));
    async move {
        pending.await;
        taken(receiver.await)
    }
}

/// Runs a system call that may wait for a peer for a long time. A closing thread does not wait for the call.
pub(crate) fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> {
    run_on(&WAITING, f)
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
    async move { taken(receiver.await) }
}

fn taken<T>(outcome: Option<std::thread::Result<T>>) -> T {
    match outcome {
        Some(Ok(value)) => value,
        Some(Err(panic)) => resume_unwind(panic),
        None => panic!("the worker pool lost a job"),
    }
}
