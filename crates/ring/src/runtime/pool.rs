//! Worker threads that take jobs from a queue, grown on demand up to a limit.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::room;
use crate::perturb;
use crate::reactor::BlockingOp;

/// Something to run on a worker.
pub(crate) enum Job {
    /// Any closure.
    Call(Box<dyn FnOnce() + Send>),
    /// A blocking file operation whose memory is owned by its slot.
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
    /// Threads that exist, and those of them that wait for work.
    threads: usize,
    idle: usize,
    /// Most threads; 0 until it is first needed.
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

/// How long an idle worker stays.
const LINGER: Duration = Duration::from_secs(10);

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
        // `idle` counts those on their way to a job as well, and `jobs` the jobs that they are on their way to.
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
            self.do_without();
        }
    }

    /// A thread that was counted could not be started. With no thread at all the work is done here rather than never: all
    /// of it, since others may have left theirs to the thread that was counted.
    fn do_without(&self) {
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
                self.work.wait_timeout(state, LINGER).unwrap_or_else(PoisonError::into_inner);
            state = again;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                break;
            }
        }
        state.threads -= 1;
        drop(state);
        // Whoever was meant to be woken by a notification that came here finds the queue itself.
        self.work.notify_one();
    }
}
