//! Passes one value from one thread to another.
//!
//! The receiver is a future for any executor, or a thread that blocks. If the code that makes the value panics, the
//! panic is sent instead, and the caller that awaits the value resumes the panic.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::atomics::{Arc, Condvar, Mutex, lock};

enum State<T> {
    Empty(Option<Waker>),
    Full(std::thread::Result<T>),
    /// The sender was dropped without a value, or the value was taken.
    Closed,
}

struct Inner<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
}

pub(crate) struct Sender<T>(Option<Arc<Inner<T>>>);
pub(crate) struct Receiver<T>(Arc<Inner<T>>);

pub(crate) fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let inner = Arc::new(Inner { state: Mutex::new(State::Empty(None)), arrived: Condvar::new() });
    (Sender(Some(Arc::clone(&inner))), Receiver(inner))
}

impl<T> Sender<T> {
    pub(crate) fn send(mut self, value: std::thread::Result<T>) {
        if let Some(inner) = self.0.take() {
            inner.settle(State::Full(value));
        }
    }
}

impl<T> Inner<T> {
    fn settle(&self, new: State<T>) {
        let old = std::mem::replace(&mut *lock(&self.state), new);
        crate::perturb::point();
        self.arrived.notify_all();
        if let State::Empty(Some(waker)) = old {
            waker.wake();
        }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if let Some(inner) = self.0.take() {
            inner.settle(State::Closed);
        }
    }
}

impl<T> Receiver<T> {
    /// Blocks until the value arrives; `None` if the sender was dropped.
    pub(crate) fn wait(self) -> Option<std::thread::Result<T>> {
        let mut state = lock(&self.0.state);
        loop {
            match std::mem::replace(&mut *state, State::Closed) {
                State::Full(value) => return Some(value),
                State::Closed => return None,
                State::Empty(waker) => *state = State::Empty(waker),
            }
            state = self.0.arrived.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

impl<T> Future for Receiver<T> {
    type Output = Option<std::thread::Result<T>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // The functions of a waker are code of other modules, and a destructor may use this channel again. So these
        // functions are called only while the state is unlocked.
        let mut waker = Some(cx.waker().clone());
        let mut state = lock(&self.0.state);
        let outcome = match std::mem::replace(&mut *state, State::Closed) {
            State::Full(value) => Poll::Ready(Some(value)),
            State::Closed => Poll::Ready(None),
            State::Empty(old) => {
                *state = State::Empty(std::mem::replace(&mut waker, old));
                Poll::Pending
            }
        };
        drop(state);
        drop(waker);
        outcome
    }
}
