//! Concurrent tasks on several I/O threads.
//!
//! [`Tasks::wait`] collects the tasks in the order in which they end. So the panic of a task is reported immediately, even if
//! other tasks wait forever for an action of this task.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use oxblk_ring::{IoThread, Remote};

use crate::panic_text;

/// The time that tasks may take on a slow machine. If the tasks take longer, [`Tasks::wait`] assumes that a task waits forever.
/// This time is shorter than the time limit of nextest.
const TIMEOUT: Duration = Duration::from_secs(240);

/// Tasks that were started and not yet collected.
pub(crate) struct Tasks {
    /// A task that was collected leaves `None`.
    tasks: Vec<Option<Remote<()>>>,
    sender: Sender<usize>,
    ends: Receiver<usize>,
}

/// Reports the end of a task when it is dropped: after a return, a panic, or the end of the thread.
struct End {
    task: usize,
    sender: Sender<usize>,
}

impl Drop for End {
    fn drop(&mut self) {
        // The receiver is gone if `wait` has already returned an error.
        let _ = self.sender.send(self.task);
    }
}

impl Tasks {
    pub(crate) fn new() -> Self {
        let (sender, ends) = mpsc::channel();
        Self { tasks: Vec::new(), sender, ends }
    }

    /// Starts a task on a thread.
    pub(crate) fn spawn<F: Future<Output = ()> + 'static>(
        &mut self,
        thread: &IoThread,
        start: impl FnOnce() -> F + Send + 'static,
    ) {
        let end = End { task: self.tasks.len(), sender: self.sender.clone() };
        let task = thread.spawn(move || async move {
            let _end = end;
            start().await;
        });
        self.tasks.push(Some(task));
    }

    /// Waits until all tasks have ended. Returns an error as soon as a task panics, or if the tasks take longer than
    /// [`TIMEOUT`].
    pub(crate) fn wait(self) -> Result<(), String> {
        self.wait_at_most(TIMEOUT)
    }

    fn wait_at_most(mut self, patience: Duration) -> Result<(), String> {
        // Drop this sender, so that only tasks have senders.
        drop(self.sender);
        let deadline = Instant::now() + patience;
        let count = self.tasks.len();
        for ended in 0..count {
            let left = deadline.saturating_duration_since(Instant::now());
            let number = match self.ends.recv_timeout(left) {
                Ok(number) => number,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("{ended} of {count} tasks have ended, others hang"));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(format!("{ended} of {count} tasks have ended, others are gone"));
                }
            };
            let task = self.tasks[number].take().expect("a task ends once");
            catch_unwind(AssertUnwindSafe(|| task.wait()))
                .map_err(|panic| format!("a task panicked: {}", panic_text(&*panic)))?
                .map_err(|gone| gone.to_string())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use oxblk_ring::Config;

    use super::*;

    fn thread() -> IoThread {
        IoThread::start("tasks", Config::default()).expect("a thread")
    }

    #[test]
    fn a_panic_is_reported_while_other_tasks_wait_forever() {
        let thread = thread();
        let mut tasks = Tasks::new();
        tasks.spawn(&thread, std::future::pending);
        tasks.spawn(&thread, || async { panic!("the second task fails") });
        tasks.spawn(&thread, std::future::pending);
        assert_eq!(tasks.wait(), Err("a task panicked: the second task fails".to_owned()));
    }

    #[test]
    fn tasks_that_wait_forever_are_counted() {
        let thread = thread();
        let mut tasks = Tasks::new();
        tasks.spawn(&thread, std::future::pending);
        let outcome = tasks.wait_at_most(Duration::from_millis(1));
        assert_eq!(outcome, Err("0 of 1 tasks have ended, others hang".to_owned()));
    }

    #[test]
    fn all_tasks_end() {
        let thread = thread();
        let mut tasks = Tasks::new();
        for _ in 0..3 {
            tasks.spawn(&thread, oxblk_ring::yield_now);
        }
        assert_eq!(tasks.wait(), Ok(()));
    }
}
