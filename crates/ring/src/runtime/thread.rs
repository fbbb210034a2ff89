//! Handles: [`IoThread`] starts work on another thread, [`Remote`] is its result.

use std::fmt;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use super::local::{self, Config};
use super::oneshot;
use super::shared::{Message, Shared};
use super::{room, tasks};

/// Bytes of stack of a started I/O thread. The stack must be large, because the futures of a request are nested as
/// deeply as the backing chain is long.
const STACK: usize = 2 << 20;

/// A handle to an I/O thread. When the last handle to a thread from [`IoThread::start`] is dropped, the thread drops
/// its tasks and ends.
#[derive(Clone)]
pub struct IoThread(Arc<Handle>);

pub(crate) struct Handle {
    shared: Arc<Shared>,
    /// `None` for a thread in `block_on`, and after [`IoThread::join`].
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
    owned: bool,
}

impl Handle {
    /// The handle of a thread that is an I/O thread only during `block_on`.
    pub(crate) fn borrowed(shared: Arc<Shared>) -> Arc<Handle> {
        Arc::new(Handle { shared, thread: Arc::default(), owned: false })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.owned {
            self.shared.request_stop();
        }
    }
}

impl IoThread {
    /// Starts an I/O thread. Inside [`sim::run`](crate::sim::run), the handle refers to the simulated thread, and no
    /// thread is started.
    ///
    /// # Errors
    /// If the thread or its ring cannot be created: `ENOMEM` if too little address space is left, `EMFILE` if too few
    /// descriptors are left, or an error if [`MAX_IO_THREADS`](super::MAX_IO_THREADS) threads exist.
    pub fn start(name: &str, config: Config) -> io::Result<IoThread> {
        if local::is_simulated() {
            let shared =
                local::try_with(|local| Arc::clone(&local.shared)).ok_or(io::ErrorKind::Other)?;
            return Ok(IoThread(Handle::borrowed(shared)));
        }
        room::check_descriptors()?;
        let (sender, receiver) = mpsc::channel::<io::Result<Arc<Handle>>>();
        let body = move || {
            let announce = sender.clone();
            let ready = move |shared| {
                let handle = Arc::new(Handle { shared, thread: Arc::default(), owned: true });
                let weak = Arc::downgrade(&handle);
                let _ = announce.send(Ok(handle));
                weak
            };
            if let Err(error) = local::serve(&config, ready) {
                let _ = sender.send(Err(error));
            }
        };
        let join = room::start_thread(name.to_owned(), STACK, body)?;
        let handle =
            receiver.recv().map_err(|_| io::Error::other("the I/O thread ended at once"))??;
        *handle.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(join);
        Ok(IoThread(handle))
    }

    /// Calls `f` on the thread, and runs there the future that `f` returns. The future also runs if the result is not
    /// awaited. The future is dropped if the thread ends before the future has completed.
    pub fn spawn<F, Fut, T>(&self, f: F) -> Remote<T>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let start = move || {
            tasks::spawn(async move {
                let result = CatchUnwind(Box::pin(async move { f().await })).await;
                sender.send(result);
            })
            .detach();
        };
        self.0.shared.send(Message::Call(Box::new(start)));
        Remote(receiver)
    }

    /// The current I/O thread; `None` if the caller is not on an I/O thread.
    pub fn current() -> Option<IoThread> {
        local::try_with(|local| local.handle()).flatten().map(IoThread)
    }

    /// The dense index of the thread; see [`thread_index`](super::thread_index).
    pub fn index(&self) -> usize {
        self.0.shared.index()
    }

    /// Whether the thread has ended, or has begun to close. New tasks of such a thread never run: their results are
    /// [`TaskGone`]. A thread closes for as long as its operations in flight take.
    pub fn is_closing(&self) -> bool {
        self.0.shared.is_closing()
    }

    /// Drops this handle and waits for the thread to end. The thread ends when no other handle is left.
    ///
    /// Returns immediately if the thread is in `block_on`, if it is the calling thread, or if another handle of the
    /// thread was joined before.
    pub fn join(self) {
        let slot = Arc::clone(&self.0.thread);
        drop(self);
        let thread = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for IoThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IoThread").field(&self.index()).finish()
    }
}

/// Catches a panic of the inner future and returns the panic as a value.
struct CatchUnwind<F>(Pin<Box<F>>);

impl<F: Future> Future for CatchUnwind<F> {
    type Output = std::thread::Result<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match catch_unwind(AssertUnwindSafe(|| self.0.as_mut().poll(cx))) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(panic)),
        }
    }
}

/// The task was dropped with its I/O thread before it completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskGone;

impl fmt::Display for TaskGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the task's I/O thread has ended")
    }
}

impl std::error::Error for TaskGone {}

/// The result of a task on another thread, as a future for any executor. Dropping this value does not cancel the
/// task.
///
/// A panic of the task resumes where the result is awaited.
#[must_use = "the task runs anyway, but its result and its panic are lost"]
pub struct Remote<T>(oneshot::Receiver<T>);

impl<T> Remote<T> {
    /// Blocks the calling thread until the result is available. Do not call it on an I/O thread, because the tasks of
    /// the thread would be blocked too.
    ///
    /// # Errors
    /// [`TaskGone`] if the thread ended before the task completed.
    pub fn wait(self) -> Result<T, TaskGone> {
        settle(self.0.wait())
    }
}

fn settle<T>(outcome: Option<std::thread::Result<T>>) -> Result<T, TaskGone> {
    match outcome {
        Some(Ok(value)) => Ok(value),
        Some(Err(panic)) => resume_unwind(panic),
        None => Err(TaskGone),
    }
}

impl<T> Future for Remote<T> {
    type Output = Result<T, TaskGone>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(settle)
    }
}
