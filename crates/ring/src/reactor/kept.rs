//! Values that are kept until the operations in flight at the time of the call have completed.
//!
//! Time is divided into periods: keeping a value ends the current period. An operation belongs to the period in which
//! it began. A value is returned when no operation of its period and of all earlier periods is in flight. The start or
//! end of an operation of the current period only changes one counter.

use std::any::Any;
use std::collections::VecDeque;

/// A value that is kept. It is dropped when it is no longer needed.
pub(crate) type Kept = Box<dyn Any>;

/// Number of a period. Later periods have higher numbers.
pub(super) type Period = u64;

struct Ended {
    in_flight: usize,
    kept: Kept,
}

/// The periods that still have operations in flight.
#[derive(Default)]
pub(super) struct Periods {
    current: Period,
    /// Number of operations of the current period that are in flight.
    in_flight: usize,
    /// The periods before the current period, the oldest first.
    ended: VecDeque<Ended>,
}

impl Periods {
    /// Records that an operation begins. Returns its period.
    pub(super) fn begin(&mut self) -> Period {
        self.in_flight += 1;
        self.current
    }

    /// Records that an operation of `period` has completed. Returns the values that no operation needs any more.
    pub(super) fn end(&mut self, period: Period) -> Vec<Kept> {
        if period == self.current {
            self.in_flight -= 1;
            return Vec::new();
        }
        let age = usize::try_from(self.current - period).unwrap_or(usize::MAX);
        if let Some(ended) = self.ended.len().checked_sub(age).and_then(|at| self.ended.get_mut(at))
        {
            ended.in_flight -= 1;
        }
        let mut done = Vec::new();
        while let Some(oldest) = self.ended.pop_front_if(|oldest| oldest.in_flight == 0) {
            done.push(oldest.kept);
        }
        done
    }

    /// Keeps a value. Returns it if no operation is in flight.
    pub(super) fn keep(&mut self, kept: Kept) -> Option<Kept> {
        if self.in_flight == 0 && self.ended.is_empty() {
            return Some(kept);
        }
        self.ended.push_back(Ended { in_flight: std::mem::take(&mut self.in_flight), kept });
        self.current += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(kept: Vec<Kept>) -> Vec<u32> {
        kept.into_iter().map(|value| *value.downcast::<u32>().unwrap()).collect()
    }

    #[test]
    fn a_value_is_kept_for_operations_that_began_before_it_and_not_for_later_ones() {
        let mut periods = Periods::default();
        assert!(periods.keep(Box::new(0_u32)).is_some(), "nothing is in flight");
        let (first, second) = (periods.begin(), periods.begin());
        assert!(periods.keep(Box::new(1_u32)).is_none());
        let third = periods.begin();
        assert!(numbers(periods.end(second)).is_empty());
        assert_eq!(numbers(periods.end(first)), [1]);
        assert!(numbers(periods.end(third)).is_empty());
        assert!(periods.keep(Box::new(2_u32)).is_some());
    }

    #[test]
    fn values_are_returned_in_order_although_operations_end_out_of_order() {
        let mut periods = Periods::default();
        let first = periods.begin();
        assert!(periods.keep(Box::new(1_u32)).is_none());
        assert!(periods.keep(Box::new(2_u32)).is_none(), "the first is still in flight");
        let second = periods.begin();
        assert!(periods.keep(Box::new(3_u32)).is_none());
        assert!(numbers(periods.end(second)).is_empty());
        assert_eq!(numbers(periods.end(first)), [1, 2, 3]);
    }
}
