//! Progress of several workers that process a disk in pieces, reported in the order of the disk.
//!
//! If a piece completes before a piece at a lower offset, its report is delayed until that piece has completed. So the reported
//! numbers are the same on every run, unless many reports are delayed: then adjacent pieces are merged, to limit the memory.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// If the reports of this number of pieces are delayed, adjacent pieces are merged.
const MANY: usize = 64;

/// A completed piece of the disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    /// The byte offset of the end of the piece.
    pub(crate) end: u64,
    /// The number of bytes of the piece that count as progress.
    pub(crate) counts: u64,
    /// The position of a progress report inside the piece: the number of counted bytes from that position to the end of the
    /// piece. `None`: the piece causes no report.
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
    /// All pieces below this offset are complete, and their reports have been made or are due.
    next: u64,
    /// The number of bytes below `next` that count as progress.
    counted: u64,
    /// Completed pieces above `next`, by their start.
    later: BTreeMap<u64, Piece>,
    /// Reports that are due, in order.
    due: VecDeque<u64>,
    /// Whether a thread is making the reports that are due.
    is_reporting: bool,
}

impl State {
    /// Records that the piece at `start` is complete, and adds the reports that are due now to `due`.
    fn complete(&mut self, start: u64, piece: Piece) {
        if start != self.next {
            if self.later.len() >= MANY {
                self.join(start, piece);
            } else {
                self.later.insert(start, piece);
            }
            return;
        }
        let mut next = Some(piece);
        while let Some(piece) = next {
            self.counted = self.counted.saturating_add(piece.counts);
            if let Some(behind) = piece.reports {
                self.due.push_back(self.counted.saturating_sub(behind));
            }
            self.next = piece.end;
            next = self.later.remove(&piece.end);
        }
    }

    /// Adds a piece to `later`, merged with the adjacent pieces.
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
    /// The first piece starts at the byte offset `begin`. No piece is complete.
    pub(crate) fn new(begin: u64) -> Self {
        Self(Mutex::new(State {
            next: begin,
            counted: 0,
            later: BTreeMap::new(),
            due: VecDeque::new(),
            is_reporting: false,
        }))
    }

    /// Records that the piece at `start` is complete. Then calls `report` for each progress report that is due, with the number
    /// of counted bytes up to that report. One thread at a time makes the reports, in order. The thread holds no lock during a
    /// call, so `report` may wait for other threads that complete pieces.
    pub(crate) fn done(&self, start: u64, piece: Piece, report: impl Fn(u64)) {
        self.lock().complete(start, piece);
        let Some(reporting) = Reporting::begin(self) else { return };
        while let Some(counted) = reporting.next() {
            report(counted);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to make the reports that are due. If a report panics, this value is dropped, and another thread can continue.
struct Reporting<'a> {
    progress: &'a InOrder,
    has_ended: Cell<bool>,
}

impl<'a> Reporting<'a> {
    /// Takes the right to report. `None`: another thread has it.
    fn begin(progress: &'a InOrder) -> Option<Self> {
        let mut state = progress.lock();
        if std::mem::replace(&mut state.is_reporting, true) {
            return None;
        }
        Some(Self { progress, has_ended: Cell::new(false) })
    }

    /// The next report. After the last one, another thread may begin.
    fn next(&self) -> Option<u64> {
        let mut state = self.progress.lock();
        let due = state.due.pop_front();
        if due.is_none() {
            state.is_reporting = false;
            self.has_ended.set(true);
        }
        due
    }
}

impl Drop for Reporting<'_> {
    fn drop(&mut self) {
        if !self.has_ended.get() {
            self.progress.lock().is_reporting = false;
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
        let reported = RefCell::new(Vec::new());
        let done = |start, end| {
            progress.done(start, Piece::whole(start..end), |sum| reported.borrow_mut().push(sum));
        };
        done(20, 30);
        done(40, 50);
        done(30, 40);
        assert!(reported.borrow().is_empty());
        done(10, 20);
        assert_eq!(*reported.borrow(), [10, 20, 30, 40]);
        done(50, 51);
        assert_eq!(*reported.borrow(), [10, 20, 30, 40, 41]);
    }

    #[test]
    fn a_report_may_wait_for_another_thread_that_completes_a_piece() {
        let progress = InOrder::new(0);
        let reported = Mutex::new(Vec::new());
        let (begin, begun) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let (progress, reported) = (&progress, &reported);
            scope.spawn(move || {
                begun.recv().unwrap();
                progress.done(10, Piece::whole(10..20), |sum| reported.lock().unwrap().push(sum));
                end.send(()).unwrap();
            });
            progress.done(0, Piece::whole(0..10), |sum| {
                reported.lock().unwrap().push(sum);
                if sum == 10 {
                    begin.send(()).unwrap();
                    ended.recv().unwrap();
                }
            });
        });
        assert_eq!(reported.into_inner().unwrap(), [10, 20]);
    }

    #[test]
    fn a_report_counts_bytes_up_to_its_place_in_the_piece() {
        let progress = InOrder::new(0);
        let reported = RefCell::new(Vec::new());
        let done = |start, end, counts, reports| {
            let piece = Piece { end, counts, reports };
            progress.done(start, piece, |sum| reported.borrow_mut().push(sum));
        };
        done(30, 40, 10, Some(3));
        done(10, 30, 0, None);
        done(0, 10, 10, None);
        assert_eq!(*reported.borrow(), [17]);
    }

    #[test]
    fn the_number_of_delayed_reports_is_limited() {
        let progress = InOrder::new(0);
        let reported = RefCell::new(Vec::new());
        let done = |start, end| {
            progress.done(start, Piece::whole(start..end), |sum| reported.borrow_mut().push(sum));
        };
        for piece in 1..1000 {
            done(piece, piece + 1);
        }
        assert!(progress.0.lock().unwrap().later.len() <= MANY);
        done(0, 1);
        assert_eq!(reported.borrow().last(), Some(&1000));
        assert!(reported.borrow().len() <= MANY + 1);
    }
}
