//! Runs an operation on a whole disk (copy, comparison, rebase) as several tasks (workers) on several I/O threads.
//!
//! The workers take pieces of the disk from a common state. A worker ends when no piece is left, or when the state says
//! that the operation has failed. [`run`] distributes the workers over the threads and waits until they have ended. If
//! the future of [`run`] is dropped, the operation is cancelled, so that workers on other threads do not continue an
//! operation that nobody awaits.

use std::sync::Arc;

use oxblk_ring::{IoThread, TaskGone, transfer_in_place};

/// Runs `count` workers, at least one, on the current I/O thread and on `helpers`. `work` is called once for each worker, on
/// the thread of the worker, and returns the future of the worker.
///
/// While the workers run, their threads execute reads and writes of up to `in_place` bytes on tmpfs inline, instead of in a
/// kernel worker ([`transfer_in_place`]). `None`: the default limit.
///
/// If the future is dropped, `cancel` is called. `cancel` marks the operation as failed in the state, so that the
/// workers end.
///
/// # Errors
/// If a helper thread has ended before the workers that run on it. The workers of all other threads have ended when
/// this returns.
pub async fn run<S, W, F>(
    state: &Arc<S>,
    count: usize,
    in_place: Option<usize>,
    helpers: &[IoThread],
    work: W,
    cancel: fn(&S),
) -> Result<(), TaskGone>
where
    S: Send + Sync + 'static,
    W: Fn(Arc<S>) -> F + Copy + Send + 'static,
    F: Future<Output = ()> + 'static,
{
    let cancelled = Cancel { state, cancel };
    let count = count.max(1);
    let threads = helpers.len().saturating_add(1).min(count);
    let (each, extra) = (count / threads, count % threads);
    let mut remote = Vec::new();
    for (index, helper) in helpers.iter().take(threads - 1).enumerate() {
        let state = Arc::clone(state);
        let count = each + usize::from(index + 1 < extra);
        remote.push(helper.spawn(move || on_one_thread(state, count, in_place, work)));
    }
    on_one_thread(Arc::clone(state), each + usize::from(extra > 0), in_place, work).await;
    let mut outcome = Ok(());
    for thread in remote {
        outcome = outcome.and(thread.await);
    }
    std::mem::forget(cancelled);
    outcome
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

async fn on_one_thread<S, W, F>(state: Arc<S>, count: usize, in_place: Option<usize>, work: W)
where
    W: Fn(Arc<S>) -> F,
    F: Future<Output = ()> + 'static,
{
    let _in_place = in_place.map(transfer_in_place);
    let start = |_| oxblk_ring::spawn(work(Arc::clone(&state)));
    let tasks: Vec<_> = (0..count).map(start).collect();
    for task in tasks {
        task.await;
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

    fn counts_of(workers: usize, helpers: &[IoThread]) -> Vec<usize> {
        let counts = Counts::default();
        let ran = block_on_with(
            Config::default(),
            run(
                &counts,
                workers,
                None,
                helpers,
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
            let mut running =
                Box::pin(run(&state, 2, None, helpers, work, |state| state.1.store(1, Relaxed)));
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
            run(
                &count,
                2,
                None,
                &helpers,
                |count| async move {
                    count.fetch_add(1, Relaxed);
                },
                |_| (),
            ),
        );
        assert_eq!(ran.unwrap(), Err(TaskGone));
        assert_eq!(count.load(Relaxed), 1);
    }
}
