//! The order in which chunks are written: that of the disk.
//!
//! Chunks get numbers as they are handed out. Workers read and compress them in any order, and side by side, and hand in
//! what is to be written. A target that allocates as it is written is thus laid out the same on every run, whatever the
//! number of workers. How far they read ahead is bounded by their number: each has one chunk until it has been written.
//!
//! One worker writes at a time: the one whose number is next begins, and goes on with whatever others have handed in by then.
//! Nobody has to be woken for the work to go on, so that it does not slow down where threads wait for a processor.
//!
//! A number whose [`Ticket`] is dropped has nothing to be written. A failure, or a copy that is cancelled, leaves nobody
//! waiting.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// Hands out numbers, and keeps what is to be written.
#[derive(Debug)]
pub(super) struct Order<J>(Mutex<State<J>>);

#[derive(Debug)]
struct State<J> {
    /// The next number to be handed out.
    next: u64,
    /// All lower numbers are done.
    turn: u64,
    /// Somebody writes. Otherwise nothing is handed in for `turn`, or its holder is about to look.
    writing: bool,
    /// What has been handed in; `None` where there is nothing to be written.
    ready: BTreeMap<u64, Option<J>>,
    /// Who waits, by number.
    waiting: BTreeMap<u64, Waker>,
}

impl<J> Default for Order<J> {
    fn default() -> Self {
        let (ready, waiting) = (BTreeMap::new(), BTreeMap::new());
        Self(Mutex::new(State { next: 0, turn: 0, writing: false, ready, waiting }))
    }
}

impl<J> State<J> {
    /// The number whose turn it is is done, and so are those behind it that have nothing to be written.
    fn advance(&mut self, wake: &mut Vec<Waker>) {
        loop {
            wake.extend(self.waiting.remove(&self.turn));
            self.turn = self.turn.saturating_add(1);
            if !matches!(self.ready.get(&self.turn), Some(None)) {
                return;
            }
            self.ready.remove(&self.turn);
        }
    }

    /// Nobody writes any more: the holder of the next number may.
    fn release(&mut self, wake: &mut Vec<Waker>) {
        self.writing = false;
        wake.extend(self.waiting.remove(&self.turn));
    }
}

impl<J> Order<J> {
    /// The next number. Callers see to it that numbers are taken in the order of the disk.
    pub(super) fn ticket(self: &Arc<Self>) -> Ticket<J> {
        let mut state = self.lock();
        let number = state.next;
        state.next = number.saturating_add(1);
        Ticket { order: Arc::clone(self), number }
    }

    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and wakes whom that concerns.
    fn change<T>(&self, change: impl FnOnce(&mut State<J>, &mut Vec<Waker>) -> T) -> T {
        let mut wake = Vec::new();
        let outcome = change(&mut self.lock(), &mut wake);
        wake.into_iter().for_each(Waker::wake);
        outcome
    }
}

/// A place in the order.
#[derive(Debug)]
pub(super) struct Ticket<J> {
    order: Arc<Order<J>>,
    number: u64,
}

impl<J> Ticket<J> {
    /// Hands in what is to be written, and waits until that has been done, by another worker or, if this one is the next to
    /// write, by the caller: then it is given back.
    pub(super) async fn hand_in(&self, job: J) -> Option<(J, Writer<J>)> {
        self.order.lock().ready.insert(self.number, Some(job));
        std::future::poll_fn(|context| {
            let mut state = self.order.lock();
            if state.turn > self.number {
                return Poll::Ready(None);
            }
            if state.turn == self.number && !state.writing {
                let job = state.ready.remove(&self.number).flatten();
                state.writing = job.is_some();
                let writer = |job| (job, Writer { order: Arc::clone(&self.order), writing: true });
                return Poll::Ready(job.map(writer));
            }
            state.waiting.insert(self.number, context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl<J> Drop for Ticket<J> {
    fn drop(&mut self) {
        self.order.change(|state, wake| {
            state.waiting.remove(&self.number);
            if state.turn > self.number || (state.turn == self.number && state.writing) {
                return;
            }
            if state.turn < self.number {
                state.ready.insert(self.number, None);
                return;
            }
            state.ready.remove(&self.number);
            state.advance(wake);
            state.release(wake);
        });
    }
}

/// The right to write, one number after the other.
#[derive(Debug)]
pub(super) struct Writer<J> {
    order: Arc<Order<J>>,
    writing: bool,
}

impl<J> Writer<J> {
    /// What it was given is done. Gives what has been handed in for the next number; without that the right ends.
    pub(super) fn next(&mut self) -> Option<J> {
        self.order.change(|state, wake| {
            state.advance(wake);
            let turn = state.turn;
            let job = state.ready.remove(&turn).flatten();
            if job.is_none() {
                self.writing = false;
                state.release(wake);
            }
            job
        })
    }
}

impl<J> Drop for Writer<J> {
    fn drop(&mut self) {
        if self.writing {
            self.order.change(|state, wake| {
                state.advance(wake);
                state.release(wake);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};
    use std::task::Context;

    use super::*;

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn who_is_next_writes_all_that_has_been_handed_in() {
        let order = Arc::new(Order::default());
        let [first, second, third, fourth, fifth] = std::array::from_fn(|_| order.ticket());
        let mut second_waits = pin!(second.hand_in(2));
        let mut fourth_waits = pin!(fourth.hand_in(4));
        assert!(poll(second_waits.as_mut()).is_pending());
        assert!(poll(fourth_waits.as_mut()).is_pending());
        let Poll::Ready(Some((1, mut writer))) = poll(pin!(first.hand_in(1))) else {
            panic!("it is the turn of the first")
        };
        assert_eq!(writer.next(), Some(2));
        assert!(poll(second_waits.as_mut()).is_pending(), "it is still being written");
        drop(third);
        assert_eq!(writer.next(), Some(4));
        assert!(matches!(poll(second_waits), Poll::Ready(None)));
        assert_eq!(writer.next(), None);
        assert!(matches!(poll(fourth_waits), Poll::Ready(None)));
        assert!(matches!(poll(pin!(fifth.hand_in(5))), Poll::Ready(Some((5, _)))));
    }

    #[test]
    fn a_writer_that_is_dropped_lets_the_next_one_write() {
        let order = Arc::new(Order::default());
        let [first, second, third] = std::array::from_fn(|_| order.ticket());
        let mut third_waits = Box::pin(third.hand_in(3));
        assert!(poll(third_waits.as_mut()).is_pending());
        let Poll::Ready(Some((1, writer))) = poll(pin!(first.hand_in(1))) else {
            panic!("it is the turn of the first")
        };
        drop(second);
        drop((first, writer));
        assert!(matches!(poll(third_waits.as_mut()), Poll::Ready(Some((3, _)))));
    }
}
