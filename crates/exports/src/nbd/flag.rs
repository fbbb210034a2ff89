//! A flag for which tasks of several threads can wait.

use oxblk_ring::Event;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

/// A flag that is never cleared after it has been set.
#[derive(Default)]
pub(super) struct Flag {
    set: AtomicBool,
    event: Event,
}

impl Flag {
    pub(super) fn set(&self) {
        self.set.store(true, Ordering::SeqCst);
        self.event.notify(usize::MAX);
    }

    pub(super) fn is_set(&self) -> bool {
        self.set.load(Ordering::SeqCst)
    }

    /// Waits until the flag is set. Only the task that polls the future first is woken. Each later poll costs one
    /// atomic load. A poll must be cheap, because connections poll the future with every request.
    pub(super) fn wait(&self) -> impl Future<Output = ()> {
        let mut listener = None;
        poll_fn(move |cx| {
            if listener.is_none() {
                let mut new = self.event.listen();
                let _ = Pin::new(&mut new).poll(cx);
                listener = Some(new);
            }
            if self.is_set() { Poll::Ready(()) } else { Poll::Pending }
        })
    }
}
