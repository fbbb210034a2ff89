//! [`Request`]: the result of an operation that runs on an I/O thread.
//!
//! A request can be awaited on any executor; without an executor, [`Request::wait`] blocks the calling thread.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use oxblk_core::{Errno, Error, ErrorKind, Result};
use oxblk_ring::{Remote, TaskGone, try_thread_index};

use crate::IoThreads;

/// A request in flight on an I/O thread.
///
/// The operation has already begun. `await` the request on any executor, or block the calling thread with
/// [`wait`](Self::wait). Dropping the request does not cancel the operation, which runs to completion.
#[must_use = "await the request or wait for it: otherwise its failure goes unnoticed"]
pub struct Request<T>(State<T>);

enum State<T> {
    Running(Remote<Result<T>>),
    /// The operation could not begin. `None`: the error has been returned.
    Failed(Option<Error>),
}

impl<T: Send + 'static> Request<T> {
    /// Starts `work` on one of the threads.
    pub(crate) fn begin<F, Fut>(threads: &IoThreads, work: F) -> Self
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<T>> + 'static,
    {
        match threads.spawn(work) {
            Some(remote) => Self(State::Running(remote)),
            None => Self::failed(ended()),
        }
    }

    /// A request that could not begin.
    pub(crate) fn failed(error: Error) -> Self {
        Self(State::Failed(Some(error)))
    }

    /// Blocks the calling thread until the request has completed.
    ///
    /// # Errors
    /// The errors of the request; `EDEADLK` on an I/O thread. On an I/O thread, await the request instead: a blocked I/O thread
    /// could never complete its own requests.
    pub fn wait(self) -> Result<T> {
        let running = match self.0 {
            State::Running(running) => running,
            State::Failed(error) => return Err(error.unwrap_or_else(ended)),
        };
        if try_thread_index().is_some() {
            let message = "An I/O thread cannot wait for a request: await it instead";
            return Err(Error::new(ErrorKind::Busy, message).errno(Errno::DEADLK));
        }
        running.wait().map_err(|TaskGone| ended())?
    }
}

impl<T> Future for Request<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::Running(remote) => match Pin::new(remote).poll(cx) {
                Poll::Ready(outcome) => Poll::Ready(outcome.map_err(|TaskGone| ended()).flatten()),
                Poll::Pending => Poll::Pending,
            },
            State::Failed(error) => Poll::Ready(Err(error.take().unwrap_or_else(ended))),
        }
    }
}

impl<T> fmt::Debug for Request<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").finish_non_exhaustive()
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Cancelled, "The I/O thread has ended")
}
