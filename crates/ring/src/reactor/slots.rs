//! The slots of operations: a slab that only grows, and whose slots have stable addresses.
//!
//! Life of a slot: free → in flight → done → free. If the future of the operation is dropped in flight: in flight →
//! detached → free. A key contains the index and the generation of a slot, so that a late completion does not reach the
//! next operation of the slot.

use std::task::{Poll, Waker};

use smallvec::SmallVec;

use super::Target;
use super::kept::{Kept, Period, Periods};
use crate::buf::{ForeignVec, ForeignVecMut, IoBuf, IoBufMut, IoVec, IoVecMut};

/// Slots per chunk. Chunks never move.
const CHUNK: usize = 64;

/// Identifies an operation: index and generation of its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(super) slot: u32,
    pub(super) generation: u32,
}

impl Key {
    pub(super) fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    #[expect(clippy::cast_possible_truncation, reason = "splits the two halves")]
    pub(super) fn from_bits(bits: u64) -> Key {
        Key { slot: bits as u32, generation: (bits >> 32) as u32 }
    }
}

/// The kind of an operation. The buffers of the operation are in the payload of the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
        fua: bool,
    },
    Sync {
        data_only: bool,
    },
    Fallocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    /// On simulated disks only; a blocking call truncates host files.
    Truncate {
        len: u64,
    },
    /// From a socket, or at the current position of a pipe or terminal.
    Recv {
        socket: bool,
    },
    Send {
        socket: bool,
    },
    Poll {
        events: i16,
    },
    /// A blocking call of an arbitrary closure.
    Call,
}

impl Op {
    pub(crate) fn is_transfer(self) -> bool {
        matches!(self, Op::Read { .. } | Op::Write { .. })
    }

    /// Whether io_uring can execute the operation, and the operation is on a file.
    pub(super) fn is_on_file(self) -> bool {
        matches!(self, Op::Read { .. } | Op::Write { .. } | Op::Sync { .. } | Op::Fallocate { .. })
    }

    /// Whether the operation may wait for a peer without a time limit.
    fn waits_for_peer(self) -> bool {
        matches!(self, Op::Recv { .. } | Op::Send { .. } | Op::Poll { .. })
    }
}

/// The buffers of a transfer, in the form that system calls take.
pub(super) type ScatterList = SmallVec<[libc::iovec; 4]>;

/// The buffers of an operation.
#[derive(Debug, Default)]
pub(crate) enum Payload {
    #[default]
    None,
    Read(IoBufMut),
    Write(IoBuf),
    ReadV(IoVecMut),
    WriteV(IoVec),
    ReadForeign(ForeignVecMut),
    WriteForeign(ForeignVec),
}

impl Payload {
    /// Number of bytes to transfer.
    pub(crate) fn len(&self) -> usize {
        match self {
            Payload::None => 0,
            Payload::Read(buf) => buf.len(),
            Payload::Write(buf) => buf.len(),
            Payload::ReadV(bufs) => bufs.iter().map(|buf| buf.len()).sum(),
            Payload::WriteV(bufs) => bufs.iter().map(|buf| buf.len()).sum(),
            Payload::ReadForeign(memory) => memory.len(),
            Payload::WriteForeign(memory) => memory.len(),
        }
    }

    pub(super) fn iovecs(&mut self, out: &mut ScatterList) {
        fn push(out: &mut ScatterList, base: *const u8, len: usize) {
            if out.len() < MAX_IOV && len > 0 {
                out.push(libc::iovec { iov_base: base.cast_mut().cast(), iov_len: len });
            }
        }
        out.clear();
        match self {
            Payload::None => {}
            Payload::Read(buf) => push(out, buf.as_mut_ptr(), buf.len()),
            Payload::Write(buf) => push(out, buf.as_ptr(), buf.len()),
            Payload::ReadV(bufs) => bufs.iter_mut().for_each(|b| {
                push(out, b.as_mut_ptr(), b.len());
            }),
            Payload::WriteV(bufs) => bufs.iter().for_each(|b| {
                push(out, b.as_ptr(), b.len());
            }),
            Payload::ReadForeign(memory) => {
                memory.ranges().for_each(|(base, len)| push(out, base, len));
            }
            Payload::WriteForeign(memory) => {
                memory.ranges().for_each(|(base, len)| push(out, base, len));
            }
        }
    }
}

/// The largest number of buffers that the kernel accepts in one transfer. A transfer with more buffers is short.
const MAX_IOV: usize = 1024;

enum State {
    Free,
    InFlight,
    Done(i32),
    Detached,
}

/// One operation, and all memory that must stay in place while the operation is in flight.
pub(crate) struct Slot {
    generation: u32,
    state: State,
    waker: Option<Waker>,
    pub(crate) op: Op,
    pub(crate) payload: Payload,
    pub(crate) target: Option<Target>,
    pub(super) iovecs: ScatterList,
    pub(super) message: libc::msghdr,
    /// Whether [`Slots::soon`] includes the operation.
    soon: bool,
    /// The period of the operation in [`Slots::periods`].
    period: Option<Period>,
}

impl Slot {
    fn empty() -> Slot {
        Slot {
            generation: 0,
            state: State::Free,
            waker: None,
            op: Op::Poll { events: 0 },
            payload: Payload::None,
            target: None,
            iovecs: ScatterList::new(),
            // SAFETY: all zero is a valid message header (null pointers with zero lengths).
            message: unsafe { std::mem::zeroed() },
            soon: false,
            period: None,
        }
    }

    /// Fills in the scatter list and the message header that points to the list. The kernel reads both, so the slot
    /// must stay at its address. (For worker threads, see [`BlockingOp`](super::BlockingOp).)
    pub(super) fn prepare_vectors(&mut self) {
        self.payload.iovecs(&mut self.iovecs);
        self.message.msg_iov = self.iovecs.as_mut_ptr();
        self.message.msg_iovlen = self.iovecs.len();
    }
}

/// The content of a slot that has become free. The caller drops it while no `RefCell` is borrowed.
pub(super) type Content = (Payload, Option<Target>);

/// The output for the future: the result, and the content of the slot.
pub(super) type Outcome = (i32, Payload, Option<Target>);

/// What to do after a completion.
pub(super) enum Done {
    Wake(Waker),
    Free(Content),
    Nothing,
}

/// All slots of an I/O thread.
#[derive(Default)]
pub(super) struct Slots {
    chunks: Vec<Box<[Slot]>>,
    free: Vec<u32>,
    in_flight: usize,
    soon: usize,
    /// The operations in flight that do not wait for a peer, and the values that are kept until these operations have
    /// completed.
    periods: Periods,
}

/// Memory of operations in flight is leaked and not freed, because the kernel or a worker may still use it. A thread
/// that closes waits for its operations, so this happens only on a thread that ends without closing (`exit` within
/// `block_on`).
impl Drop for Slots {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            std::mem::forget(std::mem::take(&mut self.chunks));
        }
    }
}

impl Slots {
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Number of operations in flight that complete within a short time, without any action of another thread or a
    /// peer.
    pub(super) fn soon(&self) -> usize {
        self.soon
    }

    /// Marks a new operation as an operation that completes soon.
    pub(super) fn ends_soon(&mut self, key: Key) {
        let slot = self.get_mut(key);
        if !slot.soon {
            slot.soon = true;
            self.soon += 1;
        }
    }

    /// Removes the mark of [`ends_soon`](Self::ends_soon).
    pub(super) fn takes_long(&mut self, key: Key) {
        if let Some(slot) = self.try_get_mut(key) {
            self.soon -= usize::from(std::mem::take(&mut slot.soon));
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "four thousand million operations do not fit in memory"
    )]
    fn grow(&mut self) {
        let first = self.chunks.len() * CHUNK;
        self.chunks.push((0..CHUNK).map(|_| Slot::empty()).collect());
        self.free.extend((first..first + CHUNK).rev().map(|i| i as u32));
    }

    fn slot(&mut self, index: u32) -> Option<&mut Slot> {
        let index = index as usize;
        self.chunks.get_mut(index / CHUNK)?.get_mut(index % CHUNK)
    }

    pub(super) fn insert(&mut self, op: Op, target: Target, payload: Payload) -> Key {
        let index = loop {
            match self.free.pop() {
                Some(index) => break index,
                None => self.grow(),
            }
        };
        self.in_flight += 1;
        let period = (!op.waits_for_peer()).then(|| self.periods.begin());
        let slot = &mut self.chunks[index as usize / CHUNK][index as usize % CHUNK];
        slot.state = State::InFlight;
        slot.period = period;
        slot.op = op;
        slot.target = Some(target);
        slot.payload = payload;
        Key { slot: index, generation: slot.generation }
    }

    /// The slot of an existing operation.
    pub(super) fn get_mut(&mut self, key: Key) -> &mut Slot {
        match self.try_get_mut(key) {
            Some(slot) => slot,
            None => panic!("operation {key:?} does not exist"),
        }
    }

    pub(super) fn try_get(&self, key: Key) -> Option<&Slot> {
        let index = key.slot as usize;
        let slot = self.chunks.get(index / CHUNK)?.get(index % CHUNK)?;
        (slot.generation == key.generation).then_some(slot)
    }

    pub(super) fn try_get_mut(&mut self, key: Key) -> Option<&mut Slot> {
        self.slot(key.slot).filter(|slot| slot.generation == key.generation)
    }

    /// Records that an operation has completed. Returns the next action, and the values that no operation needs any
    /// more.
    pub(super) fn complete(&mut self, key: Key, result: i32) -> (Done, Vec<Kept>) {
        let nothing = || (Done::Nothing, Vec::new());
        let Some(slot) = self.try_get_mut(key) else { return nothing() };
        let detached = match slot.state {
            State::InFlight => false,
            State::Detached => true,
            State::Free | State::Done(_) => return nothing(),
        };
        let (soon, period) = (std::mem::take(&mut slot.soon), slot.period.take());
        slot.state = State::Done(result);
        let waker = slot.waker.take();
        self.soon -= usize::from(soon);
        self.in_flight -= 1;
        let kept = period.map_or_else(Vec::new, |period| self.periods.end(period));
        let done = if detached {
            Done::Free(self.release(key))
        } else {
            waker.map_or(Done::Nothing, Done::Wake)
        };
        (done, kept)
    }

    /// Keeps a value until all operations now in flight have completed, except operations that may wait for a peer
    /// without a time limit. Returns the value if no such operation is in flight.
    pub(super) fn keep(&mut self, value: Kept) -> Option<Kept> {
        self.periods.keep(value)
    }

    fn release(&mut self, key: Key) -> Content {
        let slot = self.get_mut(key);
        slot.state = State::Free;
        slot.generation = slot.generation.wrapping_add(1) & 0x7fff_ffff;
        let content = (std::mem::take(&mut slot.payload), slot.target.take());
        self.free.push(key.slot);
        content
    }

    /// Returns the outcome if the operation is done. Otherwise returns whether the stored waker wakes the same task
    /// as `waker`; if it does not, the caller [sets](Self::set_waker) `waker`.
    pub(super) fn poll(&mut self, key: Key, waker: &Waker) -> (Poll<Outcome>, bool) {
        let slot = self.get_mut(key);
        if let State::Done(result) = slot.state {
            let (payload, target) = self.release(key);
            return (Poll::Ready((result, payload, target)), true);
        }
        (Poll::Pending, slot.waker.as_ref().is_some_and(|old| old.will_wake(waker)))
    }

    /// Stores a waker. Returns the previous waker, which the caller drops while no `RefCell` is borrowed.
    pub(super) fn set_waker(&mut self, key: Key, waker: Waker) -> Option<Waker> {
        self.get_mut(key).waker.replace(waker)
    }

    /// Records that the future was dropped. Returns the values to drop, and whether the operation should be
    /// cancelled.
    pub(super) fn detach(&mut self, key: Key) -> ((Option<Content>, Option<Waker>), bool) {
        let slot = self.get_mut(key);
        let waker = slot.waker.take();
        if let State::Done(_) = slot.state {
            return ((Some(self.release(key)), waker), false);
        }
        slot.state = State::Detached;
        let cancel = slot.op.waits_for_peer();
        ((None, waker), cancel)
    }

    /// Operations in flight that may wait without a time limit.
    pub(super) fn cancellable(&self) -> Vec<Key> {
        let slots = self.chunks.iter().flat_map(|chunk| chunk.iter());
        let in_flight = slots.zip(0u32..).filter(|(slot, _)| {
            matches!(slot.state, State::InFlight | State::Detached) && slot.op.waits_for_peer()
        });
        in_flight.map(|(slot, index)| Key { slot: index, generation: slot.generation }).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::Wake;

    use super::*;

    struct Counter(AtomicU32);

    impl Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read(slots: &mut Slots) -> Key {
        slots.insert(Op::Read { offset: 0 }, Target::Elsewhere, Payload::Read(IoBufMut::new(8)))
    }

    #[test]
    fn a_completion_wakes_its_future_and_the_slot_is_used_again() {
        let mut slots = Slots::default();
        let counter = Arc::new(Counter(AtomicU32::new(0)));
        let waker = Waker::from(Arc::clone(&counter));
        let key = read(&mut slots);
        assert!(matches!(slots.poll(key, &waker), (Poll::Pending, false)));
        assert!(slots.set_waker(key, waker.clone()).is_none());
        assert!(matches!(slots.poll(key, &waker), (Poll::Pending, true)));
        let Done::Wake(waiter) = slots.complete(key, 8).0 else { panic!("no waker was returned") };
        waiter.wake();
        assert_eq!(counter.0.load(Ordering::Relaxed), 1);
        assert!(matches!(slots.poll(key, &waker).0, Poll::Ready((8, Payload::Read(_), _))));
        let next = read(&mut slots);
        assert_eq!(next.slot, key.slot);
        assert_ne!(next.generation, key.generation);
        assert_eq!(slots.in_flight(), 1);
    }

    #[test]
    fn a_late_completion_does_not_reach_the_next_operation_of_its_slot() {
        let mut slots = Slots::default();
        let old = read(&mut slots);
        assert!(matches!(slots.complete(old, 0).0, Done::Nothing));
        assert!(
            slots.detach(old).0.0.is_some(),
            "a completed slot is freed when its future is dropped"
        );
        let new = read(&mut slots);
        assert!(matches!(slots.complete(old, 0).0, Done::Nothing));
        assert!(slots.poll(new, Waker::noop()).0.is_pending());
    }

    #[test]
    fn a_detached_operation_keeps_its_memory_until_its_completion() {
        let mut slots = Slots::default();
        let key = read(&mut slots);
        let ((content, _), cancel) = slots.detach(key);
        assert!(content.is_none() && !cancel);
        assert!(slots.try_get_mut(key).is_some());
        assert_eq!(slots.in_flight(), 1);
        assert!(matches!(slots.complete(key, 8).0, Done::Free((Payload::Read(_), _))));
        assert_eq!(slots.in_flight(), 0);
        assert!(slots.try_get_mut(key).is_none());
    }

    #[test]
    fn an_operation_marked_as_soon_is_counted_until_its_completion() {
        let mut slots = Slots::default();
        let (one, other) = (read(&mut slots), read(&mut slots));
        slots.ends_soon(one);
        slots.ends_soon(other);
        assert_eq!(slots.soon(), 2);
        drop(slots.complete(one, 8));
        drop(slots.complete(one, 8));
        assert_eq!(slots.soon(), 1);
        drop(slots.detach(other));
        assert_eq!(slots.soon(), 1);
        drop(slots.complete(other, 8));
        assert_eq!(slots.soon(), 0);
        let _ = read(&mut slots);
        assert_eq!(slots.soon(), 0);
    }

    #[test]
    fn slots_keep_their_addresses_while_the_slab_grows() {
        let mut slots = Slots::default();
        let first = read(&mut slots);
        let address = &raw const *slots.get_mut(first);
        let keys: Vec<Key> = (0..1000).map(|_| read(&mut slots)).collect();
        assert_eq!(address, &raw const *slots.get_mut(first));
        let distinct: std::collections::BTreeSet<u32> = keys.iter().map(|k| k.slot).collect();
        assert_eq!(distinct.len(), 1000);
    }

    #[test]
    fn a_key_is_restored_from_its_user_data_bits() {
        let key = Key { slot: 0x89ab_cdef, generation: 0x7fff_ffff };
        assert_eq!(Key::from_bits(key.to_bits()), key);
    }
}
