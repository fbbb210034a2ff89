//! Accounting: the statistics of the requests of a backend, as QEMU's `query-blockstats` shows them.
//!
//! | file | concern |
//! |---|---|
//! | this file | switching accounting on, counting requests, adding up |
//! | `io_type` | the types of requests |
//! | `histogram` | latency histograms |
//! | `interval` | latencies and queue depths of the last seconds |
//!
//! Accounting is off until a device or another user of the backend switches it on. Without accounting, no clock is read and
//! nothing is counted. With accounting, each thread counts in a memory of its own. The lock of this memory is taken by its thread
//! and by a reader of the statistics only. The clock is that of the I/O engine: virtual time in a simulation.
//!
//! Requests of a device that is paused by an error policy are counted by their last attempt: the time during which a request is
//! held is no latency.
//!
//! Lock order: the settings, then the memory of a thread.

mod histogram;
mod interval;
mod io_type;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oxblk_ring::{Sharded, now};

use super::Backend;
use super::attempts::Io;
use super::mode::Mode;
use crate::{Error, Result};
pub use histogram::{Boundaries, LatencyHistogram};
pub use interval::Latencies;
use interval::{Interval, Sum};
pub use io_type::{IoType, PerIoType};

/// The maximum number of intervals: each thread has a memory for each interval.
const MAX_INTERVALS: usize = 64;

/// What accounting counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountingOptions {
    /// Failed requests count in latencies, and in the time since the last request (`account-failed`).
    pub failed: bool,
    /// Invalid requests count in the time since the last request (`account-invalid`).
    pub invalid: bool,
    /// Lengths in seconds of the intervals for which latencies are computed (`stats-intervals`). At most 64.
    pub intervals: Vec<u32>,
}

impl Default for AccountingOptions {
    /// QEMU's defaults for a device: failed and invalid requests count, and there are no intervals.
    fn default() -> Self {
        Self { failed: true, invalid: true, intervals: Vec::new() }
    }
}

/// The requests of one type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Bytes of the requests that have succeeded.
    pub bytes: u64,
    /// Requests that have succeeded.
    pub operations: u64,
    /// Time of the requests, added up.
    pub total_time: Duration,
    /// Requests that the device has merged into other requests.
    pub merged: u64,
    /// Requests that have failed.
    pub failed: u64,
    /// Requests that were refused before they reached a node.
    pub invalid: u64,
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.operations = self.operations.saturating_add(other.operations);
        self.total_time = self.total_time.saturating_add(other.total_time);
        self.merged = self.merged.saturating_add(other.merged);
        self.failed = self.failed.saturating_add(other.failed);
        self.invalid = self.invalid.saturating_add(other.invalid);
    }
}

/// Latencies during one interval.
#[derive(Debug, Clone, PartialEq)]
pub struct IntervalStatistics {
    /// The length of the interval in seconds.
    pub seconds: u32,
    /// The latencies. The statistics cover the last `seconds`, and up to an eighth more.
    pub latencies: PerIoType<Latencies>,
}

/// Statistics of a backend. The highest written offset is a property of the root node
/// ([`Node::highest_written_offset`](crate::Node::highest_written_offset)).
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    /// Counts since accounting was switched on.
    pub counts: PerIoType<Counts>,
    /// Time since the last request has ended; `None` if there was no request.
    pub idle: Option<Duration>,
    /// The settings.
    pub options: AccountingOptions,
    /// One element for each interval of the settings.
    pub intervals: Vec<IntervalStatistics>,
    /// The latency histograms that were created.
    pub histograms: PerIoType<Option<LatencyHistogram>>,
}

/// The settings that all threads share.
#[derive(Debug, Default)]
struct Settings {
    options: AccountingOptions,
    boundaries: PerIoType<Option<Boundaries>>,
    /// The time at which the intervals were set.
    intervals_since: Duration,
}

/// The beginning and the end of an attempt of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    started: Duration,
    ended: Duration,
}

impl Span {
    /// An attempt that ends now. `None` if its beginning is not known.
    pub(super) fn until_now(started: Option<Duration>) -> Option<Self> {
        started.map(|started| Self { started, ended: now() })
    }
}

/// The counts of one thread.
#[derive(Debug)]
struct ThreadCounts {
    counts: PerIoType<Counts>,
    last: Option<Duration>,
    failed: bool,
    invalid: bool,
    intervals: Vec<Interval>,
    histograms: PerIoType<Option<LatencyHistogram>>,
}

impl ThreadCounts {
    fn new(settings: &Settings) -> Self {
        let mut new = Self {
            counts: PerIoType::default(),
            last: None,
            failed: false,
            invalid: false,
            intervals: Vec::new(),
            histograms: settings.boundaries.map(|of| of.as_ref().map(LatencyHistogram::new)),
        };
        new.set(&settings.options);
        new
    }

    fn set(&mut self, options: &AccountingOptions) {
        (self.failed, self.invalid) = (options.failed, options.invalid);
        self.intervals = options.intervals.iter().map(|seconds| Interval::new(*seconds)).collect();
    }

    fn time(&mut self, io: IoType, latency: Duration, at: Duration) {
        let total = &mut self.counts.of_mut(io).total_time;
        *total = total.saturating_add(latency);
        self.last = Some(at);
        for interval in &mut self.intervals {
            interval.count(at, io, nanos(latency));
        }
    }

    /// Counts a request. `len` is `None` if it has failed.
    fn end(&mut self, io: IoType, len: Option<u64>, span: Span) {
        let latency = span.ended.saturating_sub(span.started);
        let counts = self.counts.of_mut(io);
        match len {
            Some(len) => {
                counts.operations = counts.operations.saturating_add(1);
                counts.bytes = counts.bytes.saturating_add(len);
            }
            None => counts.failed = counts.failed.saturating_add(1),
        }
        if len.is_none() && !self.failed {
            return;
        }
        if let Some(histogram) = self.histograms.of_mut(io) {
            histogram.count(nanos(latency));
        }
        self.time(io, latency, span.ended);
    }
}

/// The accounting of a backend.
#[derive(Debug, Default)]
pub(super) struct Accounting {
    settings: Mutex<Settings>,
    /// The counts of a thread are created by its first request.
    threads: Sharded<Mutex<Option<Box<ThreadCounts>>>>,
}

impl Accounting {
    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the counts of the calling thread.
    fn count(&self, change: impl FnOnce(&mut ThreadCounts)) {
        let lock = || self.threads.local().lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(counts) = &mut *lock() {
            return change(counts);
        }
        let settings = self.settings();
        change(lock().get_or_insert_with(|| Box::new(ThreadCounts::new(&settings))));
    }

    fn each_thread(&self, mut visit: impl FnMut(&mut ThreadCounts)) {
        for thread in self.threads.iter() {
            let mut thread = thread.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(counts) = &mut *thread {
                visit(counts);
            }
        }
    }

    fn statistics(&self) -> Statistics {
        let settings = self.settings();
        let now = now();
        let mut counts: PerIoType<Counts> = PerIoType::default();
        let mut histograms = settings.boundaries.map(|of| of.as_ref().map(LatencyHistogram::new));
        let lengths = &settings.options.intervals;
        let mut sums: Vec<PerIoType<Sum>> = lengths.iter().map(|_| PerIoType::default()).collect();
        let mut last: Option<Duration> = None;
        self.each_thread(|thread| {
            counts.merge(&thread.counts, Counts::add);
            histograms.merge(&thread.histograms, |sum, other| {
                if let (Some(sum), Some(other)) = (sum, other) {
                    sum.add(other);
                }
            });
            last = last.max(thread.last);
            for (sums, interval) in sums.iter_mut().zip(&thread.intervals) {
                interval.add_to(sums, now);
            }
        });
        let since = settings.intervals_since;
        let intervals = lengths.iter().zip(&sums).map(|(seconds, sums)| IntervalStatistics {
            seconds: *seconds,
            latencies: interval::latencies(sums, *seconds, since, now),
        });
        Statistics {
            counts,
            idle: last.map(|last| now.saturating_sub(last)),
            options: settings.options.clone(),
            intervals: intervals.collect(),
            histograms,
        }
    }
}

impl Backend {
    /// Switches accounting on, or changes its options. Counts and histograms are kept. The intervals start again.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the length of an interval is 0, or if there are more than 64 intervals.
    pub fn set_accounting(&self, options: AccountingOptions) -> Result<()> {
        if options.intervals.contains(&0) {
            return Err(Error::invalid("Invalid interval length: 0"));
        }
        if options.intervals.len() > MAX_INTERVALS {
            let text = format!("Accounting has at most {MAX_INTERVALS} intervals");
            return Err(Error::invalid(text));
        }
        let accounting = self.0.accounting.get_or_init(Accounting::default);
        let mut settings = accounting.settings();
        settings.intervals_since = now();
        accounting.each_thread(|thread| thread.set(&options));
        settings.options = options;
        drop(settings);
        self.0.mode.set(Mode::ACCOUNTED, true);
        Ok(())
    }

    /// The statistics up to now. `None` if accounting was never switched on.
    pub fn statistics(&self) -> Option<Statistics> {
        self.0.accounting.get().map(Accounting::statistics)
    }

    /// Creates an empty latency histogram for each type in `types`, in place of the former histogram of this type. `None` as
    /// boundaries removes the histogram. A new histogram switches accounting on, with the default options, if it is off.
    pub fn set_latency_histograms(&self, types: &[IoType], boundaries: Option<&Boundaries>) {
        if boundaries.is_none() && self.0.accounting.get().is_none() {
            return;
        }
        let accounting = self.0.accounting.get_or_init(Accounting::default);
        let mut settings = accounting.settings();
        for io in types {
            *settings.boundaries.of_mut(*io) = boundaries.cloned();
        }
        accounting.each_thread(|thread| {
            for io in types {
                *thread.histograms.of_mut(*io) = boundaries.map(LatencyHistogram::new);
            }
        });
        drop(settings);
        self.0.mode.set(Mode::ACCOUNTED, true);
    }

    /// Counts requests that the device has merged into other requests. Without accounting, does nothing.
    pub fn account_merged(&self, io: IoType, requests: u64) {
        self.account(|counts| {
            let merged = &mut counts.counts.of_mut(io).merged;
            *merged = merged.saturating_add(requests);
        });
    }

    /// Counts a request that the device has refused. Without accounting, does nothing. The backend itself counts requests
    /// that it refuses.
    pub fn account_invalid(&self, io: IoType) {
        self.account(|counts| {
            let invalid = &mut counts.counts.of_mut(io).invalid;
            *invalid = invalid.saturating_add(1);
            if counts.invalid {
                counts.last = Some(now());
            }
        });
    }

    /// Counts a request that has ended. `span` is `None` if accounting was off when the request began.
    pub(super) fn account_end(&self, io: &Io, span: Option<Span>, succeeded: bool) {
        if let Some(span) = span {
            let len = succeeded.then_some(io.len);
            self.account(|counts| counts.end(io.kind, len, span));
        }
    }

    fn account(&self, change: impl FnOnce(&mut ThreadCounts)) {
        if let Some(accounting) = self.0.accounting.get() {
            accounting.count(change);
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
