//! Progress of workers that go through a disk in pieces, told in the order of the disk.
//!
//! A piece that ends before an earlier one is held back, so that what is told is the same on every run. Pieces that are
//! held back and lie side by side are kept as one: there are never more than workers.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Pieces done, from an offset on.
#[derive(Debug)]
pub(crate) struct InOrder(Mutex<State>);

#[derive(Debug)]
struct State {
    /// All before this offset has been told.
    next: u64,
    /// Pieces behind it, start to end.
    later: BTreeMap<u64, u64>,
}

impl InOrder {
    /// Nothing is done yet.
    pub(crate) fn new(begin: u64) -> Self {
        Self(Mutex::new(State { next: begin, later: BTreeMap::new() }))
    }

    /// The piece `start..end` is done. Tells `each` the lengths of all that can be told now, one after the other.
    pub(crate) fn done(&self, start: u64, end: u64, each: impl Fn(u64)) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut piece = (start, end);
        if start != state.next {
            let before = state.later.range(..start).next_back().map(|(from, to)| (*from, *to));
            if let Some((from, _)) = before.filter(|(_, to)| *to == start) {
                state.later.remove(&from);
                piece.0 = from;
            }
            if let Some(to) = state.later.remove(&end) {
                piece.1 = to;
            }
            state.later.insert(piece.0, piece.1);
            return;
        }
        loop {
            each(piece.1.saturating_sub(piece.0));
            state.next = piece.1;
            let next = state.next;
            match state.later.remove(&next) {
                Some(to) => piece = (next, to),
                None => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn pieces_are_told_in_order_and_never_twice() {
        let progress = InOrder::new(10);
        let told = RefCell::new(Vec::new());
        let done = |start, end| progress.done(start, end, |len| told.borrow_mut().push(len));
        done(20, 30);
        done(40, 50);
        done(30, 40);
        assert!(told.borrow().is_empty());
        done(10, 20);
        assert_eq!(*told.borrow(), [10, 30]);
        done(50, 51);
        assert_eq!(*told.borrow(), [10, 30, 1]);
    }
}
