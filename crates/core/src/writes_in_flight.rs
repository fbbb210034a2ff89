//! The ranges of the aligned writes in flight at a node, so that a serialising request waits only for the writes that overlap
//! it.
//!
//! A write enters its range, then checks whether a serialising request is in progress, and writes only if there is none. A
//! serialising request first announces itself (`begin_serialising`) and then waits for the overlapping ranges. So one of the
//! two sees the other. Both have a sequentially consistent fence between the two steps, because a store may otherwise become
//! visible after a later load.
//!
//! Each I/O thread has slots of its own, so writers share no cache line. If all slots of a thread are in use, the write takes
//! the range lock of the node instead. The slots are allocated by the first write of a thread.

use std::ops::Range;

use super::atomics::{AtomicU64, AtomicUsize, Ordering, fence};

/// The number of writes in flight that a thread can enter at a node.
pub(crate) const SLOTS: usize = 128;

/// The state of a slot: a use count above these two bits.
const CLAIMED: u64 = 1;
const VISIBLE: u64 = 2;
const USE: u64 = 4;

/// A range in flight, or a free place for one.
#[derive(Debug)]
struct Slot {
    /// The number of the use, and whether the slot is free, claimed by a writer, or visible.
    state: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
}

impl Slot {
    /// The state and the range, if a range is visible.
    fn visible(&self) -> Option<(u64, Range<u64>)> {
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state & VISIBLE == 0 {
                return None;
            }
            let range = self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed);
            fence(Ordering::Acquire);
            if self.state.load(Ordering::Relaxed) == state {
                return Some((state, range));
            }
            // The write has ended, and the slot has another use.
        }
    }
}

/// The slots of one thread.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    /// Where the next write begins to look for a free slot.
    next: AtomicUsize,
}

/// A range that was entered: its slot, and the state of the slot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entered {
    slot: usize,
    state: u64,
}

impl Slots {
    pub(crate) fn new(count: usize) -> Self {
        let slot =
            || Slot { state: AtomicU64::new(0), start: AtomicU64::new(0), end: AtomicU64::new(0) };
        Self { slots: (0..count).map(|_| slot()).collect(), next: AtomicUsize::new(0) }
    }

    /// Enters a range. Returns `None` if no slot is free. Afterwards, the caller checks for serialising requests.
    pub(crate) fn enter(&self, range: &Range<u64>) -> Option<Entered> {
        let next = self.next.load(Ordering::Relaxed);
        let slots = self.slots.iter().enumerate();
        for (at, slot) in slots.clone().skip(next).chain(slots.take(next)) {
            let state = slot.state.load(Ordering::Relaxed);
            let (claimed, visible) = (state | CLAIMED, state | VISIBLE);
            if state & (CLAIMED | VISIBLE) != 0
                || slot
                    .state
                    .compare_exchange(state, claimed, Ordering::Acquire, Ordering::Relaxed)
                    .is_err()
            {
                continue;
            }
            // A reader that sees the new range also sees that the slot was claimed.
            fence(Ordering::Release);
            slot.start.store(range.start, Ordering::Relaxed);
            slot.end.store(range.end, Ordering::Relaxed);
            slot.state.store(visible, Ordering::Release);
            self.next.store(at.saturating_add(1), Ordering::Relaxed);
            fence(Ordering::SeqCst);
            return Some(Entered { slot: at, state: visible });
        }
        None
    }

    /// Ends a write. A serialising request that sees this also sees the data of the write.
    pub(crate) fn leave(&self, entered: Entered) {
        if let Some(slot) = self.slots.get(entered.slot) {
            let free = (entered.state & !VISIBLE).wrapping_add(USE);
            slot.state.store(free, Ordering::Release);
        }
    }

    /// The entered ranges that overlap `range`. The caller has announced the serialising request, and a sequentially
    /// consistent fence comes before this call. A write that enters later sees the request.
    pub(crate) fn overlapping(&self, range: &Range<u64>) -> impl Iterator<Item = Entered> {
        self.slots.iter().enumerate().filter_map(|(at, slot)| {
            let (state, found) = slot.visible()?;
            let overlaps = found.start.max(range.start) < found.end.min(range.end);
            overlaps.then_some(Entered { slot: at, state })
        })
    }

    /// Whether the write is still in flight.
    pub(crate) fn is_in_flight(&self, entered: Entered) -> bool {
        self.slots
            .get(entered.slot)
            .is_some_and(|slot| slot.state.load(Ordering::Acquire) == entered.state)
    }
}
