//! Requests that are held after an error, until they are resumed or failed.
//!
//! A held request has ended its attempt before it is held: it is not in flight, and is in no epoch. So a drain never waits for a
//! held request, like in QEMU, whose devices keep these requests in queues of their own.
//!
//! Resumed requests begin again in the order in which they were held. The first request gets the [`Turn`]. It passes the turn on
//! when its new attempt has been started, or when it is dropped.
//!
//! When the medium is removed, or the device or the backend goes away, all held requests fail, and a new round begins. A request
//! of an earlier round is not held any more, and makes no further attempt: otherwise it could be written to another medium. So a
//! resumed request compares the round after its admission, because it may wait for the end of a drained section there.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Release},
};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

struct Entry {
    ticket: u64,
    is_resumed: bool,
    waker: Option<Waker>,
}

#[derive(Default)]
struct State {
    next_ticket: u64,
    /// Whether there is a [`Turn`].
    has_turn: bool,
    /// The held requests in order. The requests that are resumed come first.
    entries: VecDeque<Entry>,
}

impl State {
    /// The waker of the request that may begin next.
    fn next_waker(&mut self) -> Option<Waker> {
        match self.entries.front_mut() {
            Some(first) if first.is_resumed && !self.has_turn => first.waker.take(),
            _ => None,
        }
    }

    fn position(&self, ticket: u64) -> Option<usize> {
        self.entries.iter().position(|entry| entry.ticket == ticket)
    }
}

/// The held requests of a backend.
#[derive(Default)]
pub(super) struct HeldRequests {
    /// Changed only while `state` is locked.
    round: AtomicU64,
    state: Mutex<State>,
}

/// A round of requests; see the documentation of the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Round(u64);

impl HeldRequests {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current round. A request reads it before its first attempt.
    pub(super) fn round(&self) -> Round {
        Round(self.round.load(Acquire))
    }

    /// Number of requests that are held and not resumed.
    pub(super) fn len(&self) -> usize {
        self.lock().entries.iter().filter(|entry| !entry.is_resumed).count()
    }

    /// Holds a request that began in `round`. `None` if the round has ended.
    pub(super) fn hold(&self, round: Round) -> Option<Held<'_>> {
        let mut state = self.lock();
        if self.round() != round {
            return None;
        }
        let ticket = state.next_ticket;
        state.next_ticket = ticket.wrapping_add(1);
        state.entries.push_back(Entry { ticket, is_resumed: false, waker: None });
        Some(Held { requests: self, ticket })
    }

    /// Lets all requests that are held now begin again, once the caller wakes them.
    pub(super) fn resume(&self) -> Wakers {
        let mut state = self.lock();
        state.entries.iter_mut().for_each(|entry| entry.is_resumed = true);
        Wakers(state.next_waker().into_iter().collect())
    }

    /// Makes all held requests fail, once the caller wakes them, and begins a new round.
    pub(super) fn fail(&self) -> Wakers {
        let mut state = self.lock();
        self.round.fetch_add(1, Release);
        let failed = std::mem::take(&mut state.entries);
        drop(state);
        Wakers(failed.into_iter().filter_map(|entry| entry.waker).collect())
    }
}

/// The wakers of requests that may continue. The caller wakes them when it holds no lock, because this may run code of an
/// executor.
#[must_use]
pub(super) struct Wakers(Vec<Waker>);

impl Wakers {
    pub(super) fn wake(self) {
        self.0.into_iter().for_each(Waker::wake);
    }
}

fn wake_next(mut state: MutexGuard<'_, State>) {
    let waker = state.next_waker();
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// A held request. The future ends with the [`Turn`] when the request may begin again, and with `None` if the request fails.
/// Dropping the future cancels the request.
pub(super) struct Held<'a> {
    requests: &'a HeldRequests,
    ticket: u64,
}

impl<'a> Future for Held<'a> {
    type Output = Option<Turn<'a>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.requests.lock();
        let has_turn = state.has_turn;
        match state.position(self.ticket) {
            None => Poll::Ready(None),
            Some(0) if !has_turn && state.entries.front().is_some_and(|entry| entry.is_resumed) => {
                state.entries.pop_front();
                state.has_turn = true;
                Poll::Ready(Some(Turn(self.requests)))
            }
            Some(at) => {
                let waker = context.waker();
                let replaced = match state.entries.get_mut(at) {
                    Some(entry)
                        if !entry.waker.as_ref().is_some_and(|old| old.will_wake(waker)) =>
                    {
                        entry.waker.replace(waker.clone())
                    }
                    _ => None,
                };
                drop(state);
                // The drop of a waker may run code of an executor.
                drop(replaced);
                Poll::Pending
            }
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.requests.lock();
        if let Some(at) = state.position(self.ticket) {
            let entry = state.entries.remove(at);
            wake_next(state);
            // The drop of a waker may run code of an executor.
            drop(entry);
        }
    }
}

/// The right to begin a resumed request. Dropping this value passes the right on to the next request.
pub(super) struct Turn<'a>(&'a HeldRequests);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.has_turn = false;
        wake_next(state);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::FutureExt;

    use super::*;

    fn hold(requests: &HeldRequests) -> Held<'_> {
        requests.hold(requests.round()).unwrap()
    }

    #[test]
    fn requests_resume_one_after_the_other_in_order() {
        let requests = HeldRequests::default();
        let (mut one, mut two, mut three) = (hold(&requests), hold(&requests), hold(&requests));
        assert!((&mut one).now_or_never().is_none());
        requests.resume().wake();
        let mut four = hold(&requests);
        assert!((&mut two).now_or_never().is_none());
        let turn = (&mut one).now_or_never().unwrap();
        assert!((&mut two).now_or_never().is_none());
        drop(turn);
        assert!((&mut three).now_or_never().is_none());
        drop(two);
        assert!((&mut three).now_or_never().is_some_and(|turn| turn.is_some()));
        // The fourth request was held after the resume.
        assert!((&mut four).now_or_never().is_none());
        assert_eq!(requests.len(), 1);
    }

    /// Counts its wakes.
    #[derive(Default)]
    struct Wakes(AtomicU64);

    impl std::task::Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Release);
        }
    }

    /// Polls a held request that may not begin yet. Returns the count of its wakes.
    fn wait(held: &mut Held<'_>) -> Arc<Wakes> {
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        assert!(Pin::new(held).poll(&mut Context::from_waker(&waker)).is_pending());
        wakes
    }

    #[test]
    fn the_next_request_is_woken_when_one_begins_or_is_dropped() {
        let requests = HeldRequests::default();
        let mut held = [hold(&requests), hold(&requests), hold(&requests)];
        let wakes = held.each_mut().map(wait);
        let count = || wakes.each_ref().map(|wakes| wakes.0.load(Acquire));
        requests.resume().wake();
        assert_eq!(count(), [1, 0, 0]);
        let [first, mut second, third] = held;
        // The first request was woken and is dropped before it runs.
        drop(first);
        assert_eq!(count(), [1, 1, 0]);
        let turn = (&mut second).now_or_never().unwrap();
        assert_eq!(count(), [1, 1, 0]);
        drop(turn);
        assert_eq!(count(), [1, 1, 1]);
        drop(third);
    }

    #[test]
    fn requests_of_an_earlier_round_are_not_held() {
        let requests = HeldRequests::default();
        let round = requests.round();
        let held = hold(&requests);
        requests.fail().wake();
        assert!(held.now_or_never().is_some_and(|turn| turn.is_none()));
        assert!(requests.hold(round).is_none());
        assert!(requests.hold(requests.round()).is_some());
    }
}
