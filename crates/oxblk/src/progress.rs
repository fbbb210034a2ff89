//! Progress of several workers that process a disk in pieces, reported in the order of the disk.
//!
//! If a piece completes before a piece at a lower offset, its report is held back. So the reported numbers are the same on
//! every run. If many reports are held back, adjacent pieces are merged, which bounds the memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// If this many pieces are held back, adjacent ones are merged.
const MANY: usize = 64;

/// A completed piece of the disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    /// The byte offset of its end.
    pub(crate) end: u64,
    /// The number of its bytes that count as progress.
    pub(crate) counts: u64,
    /// The place of a progress report inside the piece, as the number of counted bytes between that place and the end.
    /// `None`: the piece causes no report.
    pub(crate) reports: Option<u64>,
}

impl Piece {
    /// A piece whose bytes all count, with a report at its end.
    pub(crate) fn whole(range: Range<u64>) -> Self {
        let counts = range.end.saturating_sub(range.start);
        Self { end: range.end, counts, reports: Some(0) }
    }

    /// Merges this piece with the piece that starts at its end.
    fn and(self, next: Self) -> Self {
        let earlier = self.reports.map(|behind| behind.saturating_add(next.counts));
        Self {
            end: next.end,
            counts: self.counts.saturating_add(next.counts),
            reports: next.reports.or(earlier),
        }
    }
}

/// Collects completed pieces and reports them in order.
#[derive(Debug)]
pub(crate) struct InOrder(Mutex<State>);

#[derive(Debug)]
struct State {
    /// All pieces below this offset have been reported.
    next: u64,
    /// The number of counted bytes below this offset.
    counted: u64,
    /// Completed pieces above this offset, by their start.
    later: BTreeMap<u64, Piece>,
}

impl State {
    /// Holds back a piece, merged with the pieces adjacent to it.
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
    /// Starts at the byte offset `begin`, with no completed piece.
    pub(crate) fn new(begin: u64) -> Self {
        Self(Mutex::new(State { next: begin, counted: 0, later: BTreeMap::new() }))
    }

    /// Records that the piece at `start` is complete. Then calls `tell` for each progress report that is now due, with the
    /// number of counted bytes up to that report.
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
    fn pieces_are_reported_in_order_and_only_once() {
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
    fn a_report_counts_bytes_up_to_its_place_in_the_piece() {
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
    fn the_number_of_pieces_held_back_is_bounded() {
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
