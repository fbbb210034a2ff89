//! Progress of workers that go through a disk in pieces, told in the order of the disk.
//!
//! A piece that ends before an earlier one is held back, so that what is told is the same on every run. Where many are held
//! back, those that lie side by side are kept as one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Pieces held back from which on neighbours are joined.
const MANY: usize = 64;

/// A piece of the disk that is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    /// Byte offset of its end.
    pub(crate) end: u64,
    /// How many bytes of it count as progress.
    pub(crate) counts: u64,
    /// A step of progress ends in it, this many counted bytes before its end.
    pub(crate) reports: Option<u64>,
}

impl Piece {
    /// A piece all of which counts, and which is told when it is done.
    pub(crate) fn whole(range: Range<u64>) -> Self {
        let counts = range.end.saturating_sub(range.start);
        Self { end: range.end, counts, reports: Some(0) }
    }

    /// This piece and the one right behind it as one.
    fn and(self, next: Self) -> Self {
        let earlier = self.reports.map(|behind| behind.saturating_add(next.counts));
        Self {
            end: next.end,
            counts: self.counts.saturating_add(next.counts),
            reports: next.reports.or(earlier),
        }
    }
}

/// Pieces done, from an offset on.
#[derive(Debug)]
pub(crate) struct InOrder(Mutex<State>);

#[derive(Debug)]
struct State {
    /// All before this offset has been told.
    next: u64,
    /// How many bytes of it counted.
    counted: u64,
    /// Pieces behind it, by their start.
    later: BTreeMap<u64, Piece>,
}

impl State {
    /// Keeps a piece, as one with its neighbours.
    fn join(&mut self, mut start: u64, mut piece: Piece) {
        let before = self.later.range(..start).next_back().map(|(from, to)| (*from, *to));
        if let Some((from, earlier)) = before.filter(|(_, earlier)| earlier.end == start) {
            (start, piece) = (from, earlier.and(piece));
        }
        if let Some(next) = self.later.remove(&piece.end) {
            piece = piece.and(next);
        }
        self.later.insert(start, piece);
    }
}

impl InOrder {
    /// Nothing is done yet.
    pub(crate) fn new(begin: u64) -> Self {
        Self(Mutex::new(State { next: begin, counted: 0, later: BTreeMap::new() }))
    }

    /// The piece that begins at `start` is done. For each step that ends in what can be told now, `tell` gets the number of
    /// bytes that count up to there.
    pub(crate) fn done(&self, start: u64, piece: Piece, tell: impl Fn(u64)) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if start != state.next {
            if state.later.len() >= MANY {
                state.join(start, piece);
            } else {
                state.later.insert(start, piece);
            }
            return;
        }
        let mut next = Some(piece);
        while let Some(piece) = next {
            state.counted = state.counted.saturating_add(piece.counts);
            if let Some(behind) = piece.reports {
                tell(state.counted.saturating_sub(behind));
            }
            state.next = piece.end;
            next = state.later.remove(&piece.end);
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
        let done = |start, end| {
            progress.done(start, Piece::whole(start..end), |sum| told.borrow_mut().push(sum));
        };
        done(20, 30);
        done(40, 50);
        done(30, 40);
        assert!(told.borrow().is_empty());
        done(10, 20);
        assert_eq!(*told.borrow(), [10, 20, 30, 40]);
        done(50, 51);
        assert_eq!(*told.borrow(), [10, 20, 30, 40, 41]);
    }

    #[test]
    fn a_step_ends_where_its_piece_says() {
        let progress = InOrder::new(0);
        let told = RefCell::new(Vec::new());
        let done = |start, end, counts, reports| {
            let piece = Piece { end, counts, reports };
            progress.done(start, piece, |sum| told.borrow_mut().push(sum));
        };
        done(30, 40, 10, Some(3));
        done(10, 30, 0, None);
        done(0, 10, 10, None);
        assert_eq!(*told.borrow(), [17]);
    }

    #[test]
    fn no_more_than_a_bounded_number_is_held_back() {
        let progress = InOrder::new(0);
        let told = RefCell::new(Vec::new());
        let done = |start, end| {
            progress.done(start, Piece::whole(start..end), |sum| told.borrow_mut().push(sum));
        };
        for piece in 1..1000 {
            done(piece, piece + 1);
        }
        assert!(progress.0.lock().unwrap().later.len() <= MANY);
        done(0, 1);
        assert_eq!(told.borrow().last(), Some(&1000));
        assert!(told.borrow().len() <= MANY + 1);
    }
}
