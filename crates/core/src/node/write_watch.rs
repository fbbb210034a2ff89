//! The highest offset that was written to a node, and the write threshold of the node.
//!
//! Both depend on the end of each write. A write compares its end with one offset ([`WriteWatch::quiet_until`]). In most cases
//! the write ends below this offset, and nothing else happens.

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

#[derive(Debug, Default)]
pub(crate) struct WriteWatch {
    /// A write that ends at this offset or earlier changes no other field. At most `highest`, and at most the threshold.
    quiet_until: AtomicU64,
    highest: AtomicU64,
    /// 0: there is no threshold.
    threshold: AtomicU64,
}

impl WriteWatch {
    /// The end of the write that ended at the highest offset.
    pub(crate) fn highest(&self) -> u64 {
        self.highest.load(Relaxed)
    }

    /// The threshold; 0 if there is none.
    pub(crate) fn threshold(&self) -> u64 {
        self.threshold.load(Relaxed)
    }

    /// Sets the threshold. 0 removes it.
    pub(crate) fn set_threshold(&self, offset: u64) {
        self.threshold.store(offset, SeqCst);
        self.update();
    }

    /// Records a write that ends at `end`. Returns the threshold to the first write that exceeds it.
    pub(crate) fn note(&self, end: u64) -> Option<Exceeded> {
        if end <= self.quiet_until.load(Relaxed) { None } else { self.note_high(end) }
    }

    #[cold]
    fn note_high(&self, end: u64) -> Option<Exceeded> {
        self.highest.fetch_max(end, SeqCst);
        let threshold = self.threshold.load(SeqCst);
        let amount = end.saturating_sub(threshold);
        let exceeded = threshold != 0
            && amount != 0
            && self.threshold.compare_exchange(threshold, 0, SeqCst, SeqCst).is_ok();
        self.update();
        exceeded.then_some(Exceeded { threshold, amount })
    }

    /// Sets `quiet_until`. The threshold may change at the same time. So the thread that stores last reads the threshold again:
    /// it sees the threshold of every thread that has stored before.
    fn update(&self) {
        loop {
            let threshold = self.threshold.load(SeqCst);
            let limit = if threshold == 0 { u64::MAX } else { threshold };
            self.quiet_until.store(self.highest.load(SeqCst).min(limit), SeqCst);
            oxblk_ring::perturb::point();
            if self.threshold.load(SeqCst) == threshold {
                return;
            }
        }
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
