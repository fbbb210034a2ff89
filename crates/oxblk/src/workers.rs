//! Runs an operation on a whole disk (copy, comparison, rebase) as several tasks (workers) on several I/O threads.
//!
//! The workers take pieces of the disk from a common state. A worker ends when no piece is left, or when the state says
//! that the operation has failed. [`Workers::run`] distributes the workers over the threads and waits until they have ended. If
//! its future is dropped, the operation is cancelled, so that workers on other threads do not continue an operation that nobody
//! awaits. If a stop is requested, the futures of all workers are dropped, also while they wait for a request.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use oxblk_ring::{IoThread, TaskGone, transfer_in_place};

use crate::stop::unless_stopped;

/// How many workers run, and where.
#[derive(Debug, Clone, Copy)]
pub struct Workers<'a> {
    /// The number of workers. At least one runs.
    pub count: usize,
    /// While the workers run, their threads execute reads and writes of up to this number of bytes on tmpfs inline, instead of
    /// in a kernel worker ([`transfer_in_place`]). `None`: the default limit.
    pub in_place: Option<usize>,
    /// The threads on which workers run, besides the current I/O thread.
    pub helpers: &'a [IoThread],
    /// Any thread may set this flag to stop the workers.
    pub stop: Option<&'a Arc<AtomicBool>>,
}

impl Workers<'_> {
    /// Runs the workers. `work` is called once for each worker, on the thread of the worker, and returns the future of the
    /// worker.
    ///
    /// `cancel` marks the operation as failed in the state, so that the workers end. It is called if the future is dropped, and
    /// if a stop was requested before all workers have ended. After a stop, writes may still be in flight when this returns.
    ///
    /// # Errors
    /// If a helper thread has ended before the workers that run on it. The workers of all other threads have ended when
    /// this returns.
    pub async fn run<S, W, F>(
        &self,
        state: &Arc<S>,
        work: W,
        cancel: fn(&S),
    ) -> Result<(), TaskGone>
    where
        S: Send + Sync + 'static,
        W: Fn(Arc<S>) -> F + Copy + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        let Self { in_place, helpers, stop, .. } = *self;
        let cancelled = Cancel { state, cancel };
        let count = self.count.max(1);
        let threads = helpers.len().saturating_add(1).min(count);
        let (each, extra) = (count / threads, count % threads);
        let group = |count| Group { count, in_place, stop: stop.cloned() };
        let mut remote = Vec::new();
        for (index, helper) in helpers.iter().take(threads - 1).enumerate() {
            let state = Arc::clone(state);
            let group = group(each + usize::from(index + 1 < extra));
            remote.push(helper.spawn(move || group.run(state, work, cancel)));
        }
        let here = group(each + usize::from(extra > 0));
        here.run(Arc::clone(state), work, cancel).await;
        let mut outcome = Ok(());
        for thread in remote {
            outcome = outcome.and(thread.await);
        }
        std::mem::forget(cancelled);
        outcome
    }
}

/// Calls `cancel` when it is dropped.
struct Cancel<'a, S> {
    state: &'a Arc<S>,
    cancel: fn(&S),
}

impl<S> Drop for Cancel<'_, S> {
    fn drop(&mut self) {
        (self.cancel)(self.state);
    }
}

/// The workers of one thread.
struct Group {
    count: usize,
    in_place: Option<usize>,
    stop: Option<Arc<AtomicBool>>,
}

impl Group {
    async fn run<S, W, F>(self, state: Arc<S>, work: W, cancel: fn(&S))
    where
        W: Fn(Arc<S>) -> F,
        F: Future<Output = ()> + 'static,
    {
        let _in_place = self.in_place.map(transfer_in_place);
        let start = |_| oxblk_ring::spawn(work(Arc::clone(&state)));
        let tasks: Vec<_> = (0..self.count).map(start).collect();
        let ended = async {
            for task in tasks {
                task.await;
            }
        };
        match &self.stop {
            None => ended.await,
            Some(stop) => {
                if unless_stopped(stop, ended).await.is_none() {
                    cancel(&state);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use oxblk_ring::{Config, block_on_with, try_thread_index};

    use super::*;
    use crate::IoThreads;

    /// The workers that each thread has run, by the index of the thread.
    type Counts = Arc<Mutex<Vec<(Option<usize>, usize)>>>;

    fn workers(count: usize, helpers: &[IoThread]) -> Workers<'_> {
        Workers { count, in_place: None, helpers, stop: None }
    }

    fn counts_of(count: usize, helpers: &[IoThread]) -> Vec<usize> {
        let counts = Counts::default();
        let ran = block_on_with(
            Config::default(),
            workers(count, helpers).run(
                &counts,
                |counts| async move {
                    let thread = try_thread_index();
                    let mut counts = counts.lock().unwrap();
                    match counts.iter_mut().find(|(index, _)| *index == thread) {
                        Some((_, count)) => *count += 1,
                        None => counts.push((thread, 1)),
                    }
                },
                |_| (),
            ),
        );
        ran.unwrap().unwrap();
        let mut counts: Vec<_> = counts.lock().unwrap().iter().map(|(_, count)| *count).collect();
        counts.sort_unstable();
        counts
    }

    #[test]
    fn workers_are_distributed_evenly_over_the_threads() {
        let threads = IoThreads::start(2).unwrap();
        let helpers = threads.threads();
        assert_eq!(counts_of(8, helpers), [2, 3, 3]);
        assert_eq!(counts_of(2, helpers), [1, 1]);
        assert_eq!(counts_of(0, helpers), [1]);
        assert_eq!(counts_of(3, &[]), [3]);
    }

    #[test]
    fn workers_on_other_threads_are_cancelled_with_the_future() {
        let threads = IoThreads::start(1).unwrap();
        let (begun, cancelled) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
        let state = Arc::new((begun, cancelled));
        let ran = block_on_with(Config::default(), async {
            let helpers = threads.threads();
            let work = |state: Arc<(Arc<AtomicUsize>, AtomicUsize)>| async move {
                state.0.fetch_add(1, Relaxed);
                while state.1.load(Relaxed) == 0 {
                    oxblk_ring::yield_now().await;
                }
                state.0.fetch_sub(1, Relaxed);
            };
            let workers = workers(2, helpers);
            let mut running =
                Box::pin(workers.run(&state, work, |state| state.1.store(1, Relaxed)));
            while state.0.load(Relaxed) < 2 {
                assert!(futures_util::poll!(&mut running).is_pending());
                oxblk_ring::yield_now().await;
            }
            drop(running);
        });
        ran.unwrap();
        threads.join();
        // The worker on this thread was dropped before it could count down.
        assert_eq!(state.0.load(Relaxed), 1, "the worker on the other thread still runs");
    }

    #[test]
    fn a_helper_that_has_ended_is_reported_and_the_other_workers_run() {
        let ended = block_on_with(Config::default(), async { IoThread::current() });
        let helpers = [ended.unwrap().unwrap()];
        let count = Arc::new(AtomicUsize::new(0));
        let ran = block_on_with(
            Config::default(),
            workers(2, &helpers).run(
                &count,
                |count| async move {
                    count.fetch_add(1, Relaxed);
                },
                |_| (),
            ),
        );
        assert_eq!(ran.unwrap(), Err(TaskGone));
        assert_eq!(count.load(Relaxed), 1);
    }

    #[test]
    fn a_stop_ends_workers_that_wait_on_any_thread() {
        let threads = IoThreads::start(1).unwrap();
        let stop = Arc::<AtomicBool>::default();
        let (begun, cancelled) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let state = Arc::new((begun, cancelled, Arc::clone(&stop)));
        let ran = block_on_with(Config::default(), async {
            let work = |state: Arc<(AtomicUsize, AtomicUsize, Arc<AtomicBool>)>| async move {
                if state.0.fetch_add(1, Relaxed) == 3 {
                    state.2.store(true, Relaxed);
                }
                std::future::pending::<()>().await;
            };
            let workers = Workers { stop: Some(&stop), ..workers(4, threads.threads()) };
            workers.run(&state, work, |state| state.1.store(1, Relaxed)).await
        });
        assert_eq!(ran.unwrap(), Ok(()));
        threads.join();
        assert_eq!(state.1.load(Relaxed), 1);
    }
}
