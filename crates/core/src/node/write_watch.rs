//! The highest offset that was written to a node, and the write threshold of the node.
//!
//! Each write compares its end with both. In most cases it is below both, or above the highest offset only.

use std::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

/// A write has exceeded the write threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exceeded {
    pub(crate) threshold: u64,
    /// Number of bytes between the threshold and the end of the write.
    pub(crate) amount: u64,
}

#[derive(Debug)]
pub(crate) struct WriteWatch {
    highest: AtomicU64,
    /// [`NO_LIMIT`]: there is no threshold.
    threshold: AtomicU64,
}

/// No write ends beyond this offset.
const NO_LIMIT: u64 = u64::MAX;

impl Default for WriteWatch {
    fn default() -> Self {
        Self { highest: AtomicU64::new(0), threshold: AtomicU64::new(NO_LIMIT) }
    }
}

impl WriteWatch {
    /// The end of the write that ended at the highest offset.
    pub(crate) fn highest(&self) -> u64 {
        self.highest.load(Relaxed)
    }

    /// The threshold; 0 if there is none.
    pub(crate) fn threshold(&self) -> u64 {
        match self.threshold.load(Relaxed) {
            NO_LIMIT => 0,
            threshold => threshold,
        }
    }

    /// Sets the threshold. 0 removes it.
    pub(crate) fn set_threshold(&self, offset: u64) {
        self.threshold.store(if offset == 0 { NO_LIMIT } else { offset }, SeqCst);
    }

    /// Records a write that ends at `end`. Returns the threshold to the first write that exceeds it.
    #[inline]
    pub(crate) fn note(&self, end: u64) -> Option<Exceeded> {
        if end > self.highest.load(Relaxed) {
            self.highest.fetch_max(end, Relaxed);
        }
        if end <= self.threshold.load(Relaxed) { None } else { self.take_threshold(end) }
    }

    /// Returns the threshold and removes it, unless another thread has done this.
    #[cold]
    fn take_threshold(&self, end: u64) -> Option<Exceeded> {
        let threshold = self.threshold.load(SeqCst);
        let amount = end.checked_sub(threshold).filter(|amount| *amount != 0)?;
        self.threshold.compare_exchange(threshold, NO_LIMIT, SeqCst, SeqCst).ok()?;
        Some(Exceeded { threshold, amount })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn the_highest_offset_never_falls() {
        let watch = WriteWatch::default();
        for (end, highest) in [(10, 10), (5, 10), (11, 11), (11, 11)] {
            assert_eq!(watch.note(end), None);
            assert_eq!(watch.highest(), highest);
        }
    }

    #[test]
    fn a_threshold_reports_the_first_write_beyond_it_once() {
        let watch = WriteWatch::default();
        watch.note(1000);
        watch.set_threshold(100);
        assert_eq!((watch.note(100), watch.threshold()), (None, 100));
        assert_eq!(watch.note(150), Some(Exceeded { threshold: 100, amount: 50 }));
        assert_eq!((watch.note(150), watch.note(2000), watch.threshold()), (None, None, 0));
        assert_eq!(watch.highest(), 2000);
    }

    #[test]
    fn a_removed_threshold_reports_nothing() {
        let watch = WriteWatch::default();
        watch.set_threshold(100);
        watch.set_threshold(0);
        assert_eq!(watch.note(500), None);
    }

    #[test]
    fn one_of_several_threads_reports_each_threshold() {
        let (watch, reports) = (WriteWatch::default(), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (watch, reports) = (&watch, &reports);
                scope.spawn(move || {
                    for round in 0..2000_u64 {
                        if thread == 0 {
                            while watch.threshold() != 0 {
                                std::thread::yield_now();
                            }
                            watch.set_threshold(100);
                        }
                        // Every thread writes beyond the threshold and raises the highest offset.
                        if watch.note(1000 + round).is_some() {
                            reports.fetch_add(1, Relaxed);
                        }
                    }
                });
            }
        });
        // The last threshold may still be set.
        reports.fetch_add(usize::from(watch.note(5000).is_some()), Relaxed);
        assert_eq!((reports.into_inner(), watch.threshold()), (2000, 0));
    }
}
