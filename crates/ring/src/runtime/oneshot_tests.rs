//! Tests of [`oneshot`](super::oneshot), which the loom models include without its tests.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use super::oneshot::{self, Sender};

/// A waker that owns the sender, as a waker that owns a task does.
struct Owner(
    #[expect(dead_code, reason = "only its destructor has an effect")] Mutex<Option<Sender<u32>>>,
);

impl Wake for Owner {
    fn wake(self: Arc<Self>) {}
}

#[test]
fn the_destructor_of_a_waker_may_drop_the_sender() {
    let (sender, mut receiver) = oneshot::channel();
    let mut poll =
        |waker: &Waker| Pin::new(&mut receiver).poll(&mut Context::from_waker(waker)).map(drop);
    let owner = Waker::from(Arc::new(Owner(Mutex::new(Some(sender)))));
    assert!(poll(&owner).is_pending());
    drop(owner);
    // The new waker replaces the old waker, whose destructor drops the sender.
    assert!(poll(Waker::noop()).is_pending());
    assert_eq!(poll(Waker::noop()), Poll::Ready(()));
}
