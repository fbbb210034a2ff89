//! Worker threads that take jobs from a queue. The pool starts threads on demand, up to a limit.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::room;
use crate::perturb;
use crate::reactor::BlockingOp;

/// A job for a worker.
pub(crate) enum Job {
    /// Any closure.
    Call(Box<dyn FnOnce() + Send>),
    /// A blocking file operation. The slot of the operation owns the buffers.
    Io(BlockingOp),
}

impl Job {
    fn run(self) {
        match self {
            Job::Call(f) => f(),
            Job::Io(op) => op.run(),
        }
    }
}

struct State {
    jobs: VecDeque<Job>,
    /// Number of threads.
    threads: usize,
    /// Number of threads that wait for a job.
    idle: usize,
    /// Maximum number of threads; 0 until the limit is first read or set.
    limit: usize,
}

/// A pool of worker threads.
pub(crate) struct WorkerPool {
    name: &'static str,
    state: Mutex<State>,
    work: Condvar,
    default_limit: fn() -> usize,
    /// Bytes of stack of each thread.
    stack: usize,
}

/// How long a worker stays idle before it ends.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

impl WorkerPool {
    pub(crate) const fn new(
        name: &'static str,
        default_limit: fn() -> usize,
        stack: usize,
    ) -> WorkerPool {
        let state = State { jobs: VecDeque::new(), threads: 0, idle: 0, limit: 0 };
        WorkerPool { name, state: Mutex::new(state), work: Condvar::new(), default_limit, stack }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn limit(&self) -> usize {
        let mut state = self.lock();
        if state.limit == 0 {
            state.limit = (self.default_limit)().max(1);
        }
        state.limit
    }

    pub(crate) fn set_limit(&self, n: usize) {
        self.lock().limit = n.max(1);
        self.work.notify_all();
    }

    pub(crate) fn submit(&'static self, job: Job) {
        let limit = self.limit();
        let mut state = self.lock();
        state.jobs.push_back(job);
        // `idle` includes threads that are already notified but have not yet taken their job, and `jobs` includes
        // those jobs.
        if state.idle >= state.jobs.len() || state.threads >= limit {
            drop(state);
            perturb::point();
            self.work.notify_one();
            return;
        }
        let number = state.threads;
        state.threads += 1;
        drop(state);
        perturb::point();
        let name = format!("{}{number}", self.name);
        if room::start_thread(name, self.stack, || self.run()).is_err() {
            self.run_jobs_here();
        }
    }

    /// Handles a thread that is included in `threads` but could not be started. If no other thread exists, the caller
    /// runs all queued jobs, so that no job is lost. Other callers may have queued jobs because `threads` included
    /// the missing thread.
    fn run_jobs_here(&self) {
        let mut state = self.lock();
        state.threads -= 1;
        while state.threads == 0 {
            let Some(job) = state.jobs.pop_front() else { break };
            drop(state);
            perturb::point();
            job.run();
            state = self.lock();
        }
    }

    fn run(&self) {
        let mut state = self.lock();
        while state.threads <= state.limit {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                perturb::point();
                job.run();
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let (again, waited) =
                self.work.wait_timeout(state, IDLE_TIMEOUT).unwrap_or_else(PoisonError::into_inner);
            state = again;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                break;
            }
        }
        state.threads -= 1;
        drop(state);
        // This thread may have received a notification for a new job. So it notifies another worker.
        self.work.notify_one();
    }
}
