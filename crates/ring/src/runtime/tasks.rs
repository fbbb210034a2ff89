//! The tasks of an I/O thread: starts tasks, and drops all tasks when the thread ends.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::mem::ManuallyDrop;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use async_task::{Runnable, Task};

use super::foreign::contained;
use super::local::{Local, current, try_with};
use super::shared::{Message, Shared};
use crate::perturb;

/// The tasks of an I/O thread.
#[derive(Default)]
pub(super) struct Tasks {
    pub(super) ready: RefCell<VecDeque<Runnable>>,
    /// The wakers of all existing tasks. When the loop ends, they are used to drop the tasks.
    living: RefCell<Living>,
}

#[derive(Default)]
struct Living {
    wakers: Vec<Option<Waker>>,
    free: Vec<usize>,
    count: usize,
}

impl Tasks {
    /// The number of existing tasks.
    pub(super) fn living(&self) -> usize {
        self.living.borrow().count
    }

    /// Wakes all tasks, and drops the tasks that are ready. The caller repeats this while tasks exist, because a
    /// waker on another thread may have a runnable that it has not yet sent.
    pub(super) fn drop_some(&self) {
        // Waking a task puts its runnable in the queue. Dropping the runnable drops the future.
        let wakers: Vec<Waker> =
            self.living.borrow_mut().wakers.iter_mut().filter_map(Option::take).collect();
        for waker in wakers {
            waker.wake();
        }
        loop {
            let task = self.ready.borrow_mut().pop_front();
            let Some(task) = task else { break };
            contained(|| drop(task));
        }
    }
}

/// Counts a task in `Living::count` while the future of the task exists.
struct LivingTask {
    local: Rc<Local>,
    id: usize,
}

impl LivingTask {
    fn new(local: Rc<Local>) -> LivingTask {
        let mut living = local.tasks.living.borrow_mut();
        living.count += 1;
        let id = living.free.pop().unwrap_or_else(|| {
            living.wakers.push(None);
            living.wakers.len() - 1
        });
        drop(living);
        LivingTask { local, id }
    }
}

impl Drop for LivingTask {
    fn drop(&mut self) {
        let mut living = self.local.tasks.living.borrow_mut();
        living.count -= 1;
        living.free.push(self.id);
        let waker = living.wakers[self.id].take();
        drop(living);
        drop(waker);
    }
}

/// A future whose destructor does not unwind. If the destructor unwound, `async_task` would abort the process.
struct Shielded<F>(ManuallyDrop<F>);

impl<F: Future> Future for Shielded<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        // SAFETY: the future is pinned together with this value: the future is never moved out, and is dropped in
        // place.
        let inner = unsafe { self.map_unchecked_mut(|shielded| &mut *shielded.0) };
        inner.poll(cx)
    }
}

impl<F> Drop for Shielded<F> {
    fn drop(&mut self) {
        // SAFETY: dropped once, here, and not used afterwards.
        contained(|| unsafe { ManuallyDrop::drop(&mut self.0) });
    }
}

/// Puts a task in the queue of its thread, or in the mailbox of its thread if the caller is on another thread.
fn schedule(shared: &Arc<Shared>, task: Runnable) {
    let mut task = Some(task);
    try_with(|local| {
        if Arc::ptr_eq(&local.shared, shared)
            && let Some(task) = task.take()
        {
            local.tasks.ready.borrow_mut().push_back(task);
        }
    });
    if let Some(task) = task {
        perturb::point();
        // The mailbox is open, because a thread closes its mailbox only when none of its tasks is left (see `spawn`).
        shared.send(Message::Run(task));
    }
}

/// Starts a task on the current I/O thread. Dropping the handle cancels the task. A panic of the task resumes where
/// the handle is awaited.
///
/// # Panics
/// If the caller is not on an I/O thread.
pub fn spawn<F: Future + 'static>(future: F) -> Task<F::Output> {
    let local = current();
    let shared = Arc::clone(&local.shared);
    let guard = LivingTask::new(Rc::clone(&local));
    let id = guard.id;
    let future = Shielded(ManuallyDrop::new(future));
    let body = async move {
        let guard = guard;
        let output = future.await;
        drop(guard);
        output
    };
    let schedule = move |task| schedule(&shared, task);
    // SAFETY: the future is not `Send`, so its runnable must be run and dropped only on this thread. `schedule` puts
    // the runnable in the queue or the mailbox of this thread. Only this thread empties the queue and the mailbox.
    // The thread remains an I/O thread, and its mailbox open, until all futures are dropped (`Entered`). So a message
    // that a closed mailbox refuses, and that the sender drops, is never a living task. The future and the schedule
    // function are `'static`, and the schedule function is `Send + Sync`.
    let (task, handle) = unsafe {
        async_task::Builder::new().propagate_panic(true).spawn_unchecked(|()| body, schedule)
    };
    local.tasks.living.borrow_mut().wakers[id] = Some(task.waker());
    task.schedule();
    handle
}

/// Lets other tasks run.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
