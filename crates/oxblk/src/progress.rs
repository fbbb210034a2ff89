//! Progress of workers that go through a disk in pieces, told in the order of the disk.
//!
//! A piece that ends before an earlier one is held back, so that what is told is the same on every run. Where many are held
//! back, those that lie side by side are kept as one.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Pieces held back from which on neighbours are joined.
const MANY: usize = 64;

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

impl State {
    /// A piece and its neighbours, which are taken out.
    fn joined(&mut self, (start, end): (u64, u64)) -> (u64, u64) {
        let before = self.later.range(..start).next_back().map(|(from, to)| (*from, *to));
        let from = before.filter(|(_, to)| *to == start).map(|(from, _)| from);
        if let Some(from) = from {
            self.later.remove(&from);
        }
        (from.unwrap_or(start), self.later.remove(&end).unwrap_or(end))
    }
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
            if state.later.len() >= MANY {
                piece = state.joined(piece);
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
        assert_eq!(*told.borrow(), [10, 10, 10, 10]);
        done(50, 51);
        assert_eq!(*told.borrow(), [10, 10, 10, 10, 1]);
    }

    #[test]
    fn no_more_than_a_bounded_number_is_held_back() {
        let progress = InOrder::new(0);
        let told = RefCell::new(Vec::new());
        let done = |start, end| progress.done(start, end, |len| told.borrow_mut().push(len));
        for piece in 1..1000 {
            done(piece, piece + 1);
        }
        assert!(progress.0.lock().unwrap().later.len() <= MANY);
        done(0, 1);
        assert_eq!(told.borrow().iter().sum::<u64>(), 1000);
        assert!(told.borrow().len() <= MANY + 1);
    }
}
