//! Writes of chunks in the order of their guest offsets, while several workers read and compress chunks in parallel.
//!
//! Each chunk gets a number when a worker takes it. Workers read and compress chunks in parallel and in any order, and then
//! hand in a write job with the chunk's number. Jobs are written in the order of the numbers. So a target that allocates
//! clusters has the same layout on every run and for every number of workers. Each worker waits until its job is written before
//! it takes another chunk, so the number of chunks in memory is limited.
//!
//! One worker writes at a time. The worker with the next number writes its own job, and then also the following jobs that other
//! workers have already handed in. So consecutive jobs can be written without waking another thread, which would be slow on a
//! busy machine.
//!
//! If a [`Ticket`] is dropped, its number counts as written. So no worker waits forever after a failure or a cancellation.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// Assigns numbers and collects the jobs to be written.
#[derive(Debug)]
pub(super) struct Order<J>(Mutex<State<J>>);

#[derive(Debug)]
struct State<J> {
    /// The next number to be assigned.
    next: u64,
    /// The next number to be written. All lower numbers are written or dropped.
    turn: u64,
    /// Whether a [`Writer`] exists. If not, either no job is handed in for `turn`, or the worker with this number is running
    /// or woken, and becomes the writer.
    writing: bool,
    /// The jobs that have been handed in, by number. `None`: the ticket was dropped, and nothing is written for this number.
    ready: BTreeMap<u64, Option<J>>,
    /// The waiting workers, by number.
    waiting: BTreeMap<u64, Waker>,
}

impl<J> Default for Order<J> {
    fn default() -> Self {
        let (ready, waiting) = (BTreeMap::new(), BTreeMap::new());
        Self(Mutex::new(State { next: 0, turn: 0, writing: false, ready, waiting }))
    }
}

impl<J> State<J> {
    /// Marks the number `turn` as done, and also the directly following numbers for which nothing is written.
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

    /// Records that no worker writes, and wakes the worker with the number `turn`.
    fn release(&mut self, wake: &mut Vec<Waker>) {
        self.writing = false;
        wake.extend(self.waiting.remove(&self.turn));
    }
}

impl<J> Order<J> {
    /// Assigns the next number. Callers take numbers in the order of the guest offsets.
    pub(super) fn ticket(self: &Arc<Self>) -> Ticket<J> {
        let mut state = self.lock();
        let number = state.next;
        state.next = number.saturating_add(1);
        Ticket { order: Arc::clone(self), number }
    }

    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and then wakes the workers that `change` has collected.
    fn change<T>(&self, change: impl FnOnce(&mut State<J>, &mut Vec<Waker>) -> T) -> T {
        let mut wake = Vec::new();
        let outcome = change(&mut self.lock(), &mut wake);
        wake.into_iter().for_each(Waker::wake);
        outcome
    }
}

/// The number of one chunk.
#[derive(Debug)]
pub(super) struct Ticket<J> {
    order: Arc<Order<J>>,
    number: u64,
}

impl<J> Ticket<J> {
    /// Submits a job and waits until another worker has written it. If this worker becomes the writer instead, the job is
    /// returned together with the [`Writer`], and the caller writes it.
    pub(super) async fn submit(&self, job: J) -> Option<(J, Writer<J>)> {
        self.order.lock().ready.insert(self.number, Some(job));
        std::future::poll_fn(|context| {
            // The functions of a waker are called only while the state is unlocked: they may poll another worker.
            let waker = context.waker().clone();
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
            let old = state.waiting.insert(self.number, waker);
            drop(state);
            drop(old);
            Poll::Pending
        })
        .await
    }
}

impl<J> Drop for Ticket<J> {
    fn drop(&mut self) {
        let waker = self.order.change(|state, wake| {
            let waker = state.waiting.remove(&self.number);
            if state.turn > self.number || (state.turn == self.number && state.writing) {
                return waker;
            }
            if state.turn < self.number {
                state.ready.insert(self.number, None);
                return waker;
            }
            state.ready.remove(&self.number);
            state.advance(wake);
            state.release(wake);
            waker
        });
        drop(waker);
    }
}

/// The exclusive right to write jobs, in the order of their numbers.
#[derive(Debug)]
pub(super) struct Writer<J> {
    order: Arc<Order<J>>,
    writing: bool,
}

impl<J> Writer<J> {
    /// Marks the current job as written and returns the job with the next number. If the next job has not been handed in, this
    /// returns `None`, and the right to write ends.
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
    fn the_worker_with_the_next_number_writes_all_jobs_handed_in() {
        let order = Arc::new(Order::default());
        let [first, second, third, fourth, fifth] = std::array::from_fn(|_| order.ticket());
        let mut second_waits = pin!(second.submit(2));
        let mut fourth_waits = pin!(fourth.submit(4));
        assert!(poll(second_waits.as_mut()).is_pending());
        assert!(poll(fourth_waits.as_mut()).is_pending());
        let Poll::Ready(Some((1, mut writer))) = poll(pin!(first.submit(1))) else {
            panic!("the first job is the next to be written")
        };
        assert_eq!(writer.next(), Some(2));
        assert!(poll(second_waits.as_mut()).is_pending(), "the second job is still being written");
        drop(third);
        assert_eq!(writer.next(), Some(4));
        assert!(matches!(poll(second_waits), Poll::Ready(None)));
        assert_eq!(writer.next(), None);
        assert!(matches!(poll(fourth_waits), Poll::Ready(None)));
        assert!(matches!(poll(pin!(fifth.submit(5))), Poll::Ready(Some((5, _)))));
    }

    #[test]
    fn after_a_writer_is_dropped_the_worker_with_the_next_job_writes() {
        let order = Arc::new(Order::default());
        let [first, second, third] = std::array::from_fn(|_| order.ticket());
        let mut third_waits = Box::pin(third.submit(3));
        assert!(poll(third_waits.as_mut()).is_pending());
        let Poll::Ready(Some((1, writer))) = poll(pin!(first.submit(1))) else {
            panic!("the first job is the next to be written")
        };
        drop(second);
        drop((first, writer));
        assert!(matches!(poll(third_waits.as_mut()), Poll::Ready(Some((3, _)))));
    }
}
