//! The scheduler of a simulation: chooses the order of tasks, and keeps the virtual time and the events.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Duration;

use super::Disk;
use super::disk::Started;
use super::rng::Rng;
use crate::reactor::{Key, Slot};

/// An operation in flight. It is executed and completed at a later virtual time.
pub(crate) struct Event {
    pub(crate) key: Key,
    pub(super) disk: Disk,
    pub(super) started: Started,
}

impl Event {
    /// Executes the operation. Returns a count or a negative errno.
    pub(crate) fn perform(&self, slot: &mut Slot) -> i32 {
        self.disk.perform(self.started, slot)
    }
}

/// Chooses the next task or event.
pub(crate) struct Scheduler {
    now: Cell<Duration>,
    rng: RefCell<Rng>,
    events: RefCell<BTreeMap<(Duration, u64), Event>>,
    next_event: Cell<u64>,
}

impl Scheduler {
    pub(super) fn new(seed: u64) -> Scheduler {
        Scheduler {
            now: Cell::new(Duration::ZERO),
            rng: RefCell::new(Rng::new(seed)),
            events: RefCell::default(),
            next_event: Cell::new(0),
        }
    }

    pub(crate) fn now(&self) -> Duration {
        self.now.get()
    }

    /// Picks which of `len` ready tasks runs next.
    pub(crate) fn pick(&self, len: usize) -> usize {
        self.rng.borrow_mut().index(len)
    }

    pub(super) fn schedule(&self, delay: Duration, event: Event) {
        let number = self.next_event.get();
        self.next_event.set(number + 1);
        self.events.borrow_mut().insert((self.now().saturating_add(delay), number), event);
    }

    /// Advances the virtual time to the next event, or to `timer` if `timer` is earlier. Returns the event; `None` if
    /// the timer is earlier, or if there is no event.
    pub(crate) fn next_event(&self, timer: Option<Duration>) -> Option<Event> {
        let mut events = self.events.borrow_mut();
        let first = events.first_entry();
        match (first, timer) {
            (Some(entry), timer) if timer.is_none_or(|at| entry.key().0 <= at) => {
                self.now.set(self.now().max(entry.key().0));
                Some(entry.remove())
            }
            (_, Some(at)) => {
                self.now.set(self.now().max(at));
                None
            }
            (_, None) => None,
        }
    }
}
