//! The requests in flight of one connection, as futures in reusable slots.
//!
//! A slot is an allocation for one future, with a waker that is made once. The waker sets the bit of the slot and wakes
//! the connection's task. The task then polls only the futures whose bits are set. If a free slot exists, a request
//! needs no allocation. A new slot is made only if all existing slots are in use.

use futures_util::task::AtomicWaker;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// Maximum number of futures in flight.
pub(super) const CAPACITY: usize = 256;
const WORDS: usize = CAPACITY / 64;

/// The slots that were woken, and the task to wake.
#[derive(Debug, Default)]
struct Woken {
    bits: [AtomicU64; WORDS],
    task: AtomicWaker,
}

struct SlotWaker {
    woken: Arc<Woken>,
    word: usize,
    bit: u64,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Some(word) = self.woken.bits.get(self.word) {
            word.fetch_or(self.bit, Ordering::Release);
        }
        self.woken.task.wake();
    }
}

struct Slot<F> {
    future: Pin<Box<Option<F>>>,
    waker: Waker,
}

impl<F: Future> Slot<F> {
    /// Polls the future. Returns `None` if the future is pending, or if the slot is empty because its future has completed
    /// before the wake-up.
    fn poll(&mut self) -> Option<F::Output> {
        let future = self.future.as_mut().as_pin_mut()?;
        match future.poll(&mut Context::from_waker(&self.waker)) {
            Poll::Ready(output) => {
                self.future.set(None);
                Some(output)
            }
            Poll::Pending => None,
        }
    }
}

pub(super) struct Slots<F> {
    slots: Vec<Slot<F>>,
    free: Vec<usize>,
    woken: Arc<Woken>,
}

impl<F: Future> Slots<F> {
    pub(super) fn new() -> Slots<F> {
        Slots { slots: Vec::new(), free: Vec::new(), woken: Arc::default() }
    }

    /// The number of futures in flight.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Sets the task that the wakers of all futures wake. Call this before [`Slots::poll_woken`].
    pub(super) fn register(&self, cx: &Context<'_>) {
        self.woken.task.register(cx.waker());
    }

    /// Polls a new future immediately, and returns its output if it has completed. The caller ensures that at most [`CAPACITY`]
    /// futures are in flight.
    pub(super) fn start(&mut self, future: F) -> Option<F::Output> {
        let index = self.free.pop().unwrap_or_else(|| self.add());
        let slot = self.slots.get_mut(index)?;
        slot.future.set(Some(future));
        let output = slot.poll();
        if output.is_some() {
            self.free.push(index);
        }
        output
    }

    fn add(&mut self) -> usize {
        let index = self.slots.len();
        assert!(index < CAPACITY, "more requests in flight than slots");
        let waker =
            SlotWaker { woken: Arc::clone(&self.woken), word: index / 64, bit: 1 << (index % 64) };
        let waker = Waker::from(Arc::new(waker));
        self.slots.push(Slot { future: Box::pin(None), waker });
        index
    }

    /// Polls the futures that were woken and passes their outputs to `finished`.
    pub(super) fn poll_woken(&mut self, mut finished: impl FnMut(F::Output)) {
        for (word, bits) in self.woken.bits.iter().enumerate() {
            if bits.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut set = bits.swap(0, Ordering::Acquire);
            while set != 0 {
                let index = word * 64 + set.trailing_zeros() as usize;
                set &= set - 1;
                if let Some(output) = self.slots.get_mut(index).and_then(Slot::poll) {
                    self.free.push(index);
                    finished(output);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// A future that the test completes with [`Gate::open`].
    #[derive(Clone, Default)]
    struct Gate(Rc<RefCell<(Option<u32>, Option<Waker>)>>);

    impl Gate {
        fn open(&self, value: u32) {
            let waker = {
                let mut gate = self.0.borrow_mut();
                gate.0 = Some(value);
                gate.1.take()
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    impl Future for Gate {
        type Output = u32;

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<u32> {
            let mut gate = self.0.borrow_mut();
            gate.1 = Some(cx.waker().clone());
            gate.0.map_or(Poll::Pending, Poll::Ready)
        }
    }

    #[test]
    fn a_ready_future_does_not_occupy_a_slot() {
        let mut slots = Slots::new();
        let gate = Gate::default();
        gate.open(7);
        assert_eq!(slots.start(gate), Some(7));
        assert_eq!(slots.len(), 0);
    }

    #[test]
    fn only_woken_futures_finish_and_slots_are_used_again() {
        let mut slots = Slots::new();
        let gates: Vec<_> = (0..CAPACITY).map(|_| Gate::default()).collect();
        for gate in &gates {
            assert_eq!(slots.start(gate.clone()), None);
        }
        assert_eq!(slots.len(), CAPACITY);
        let mut outputs = Vec::new();
        slots.poll_woken(|output| outputs.push(output));
        assert!(outputs.is_empty());
        for (value, gate) in (0..).zip(&gates).step_by(63) {
            gate.open(value);
        }
        slots.poll_woken(|output| outputs.push(output));
        assert_eq!(outputs, [0, 63, 126, 189, 252]);
        for _ in 0..outputs.len() {
            assert_eq!(slots.start(Gate::default()), None);
        }
        assert_eq!(slots.slots.len(), CAPACITY);
    }

    #[test]
    fn a_wake_up_after_completion_is_harmless() {
        let mut slots = Slots::new();
        let gate = Gate::default();
        slots.start(gate.clone());
        gate.0.borrow_mut().0 = Some(1);
        let waker = gate.0.borrow().1.clone().unwrap();
        waker.wake_by_ref();
        slots.poll_woken(drop);
        waker.wake();
        slots.poll_woken(|_| panic!("finished twice"));
        assert_eq!(slots.len(), 0);
    }
}
