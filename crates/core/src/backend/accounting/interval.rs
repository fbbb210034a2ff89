//! Latencies and queue depths during the last seconds.
//!
//! An interval is divided into [`PARTS`] parts. A request counts in the part in which it ends. The statistics of an interval are
//! those of the current part and of the [`PARTS`] parts before it, so they cover the interval and at most one part more.

use std::time::Duration;

use super::{IoType, PerIoType, nanos};

/// The number of parts of an interval.
const PARTS: u64 = 8;

/// Latencies of the requests that have ended during an interval. All latencies are 0 if there was no request.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Latencies {
    /// The lowest latency.
    pub min: Duration,
    /// The highest latency.
    pub max: Duration,
    /// The average latency.
    pub average: Duration,
    /// The average number of requests in progress.
    pub queue_depth: f64,
}

/// The requests of one type, or of one part of an interval.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sum {
    requests: u64,
    total: u64,
    min: u64,
    max: u64,
}

impl Sum {
    fn count(&mut self, nanos: u64) {
        self.add(&Self { requests: 1, total: nanos, min: nanos, max: nanos });
    }

    fn add(&mut self, other: &Self) {
        if other.requests == 0 {
            return;
        }
        self.min = if self.requests == 0 { other.min } else { self.min.min(other.min) };
        self.max = self.max.max(other.max);
        self.requests = self.requests.saturating_add(other.requests);
        self.total = self.total.saturating_add(other.total);
    }
}

#[derive(Debug, Default)]
struct Part {
    number: u64,
    sums: PerIoType<Sum>,
}

/// The requests of one thread during the last interval.
#[derive(Debug)]
pub(super) struct Interval {
    part: Duration,
    /// The part with number n is in the element n modulo the length.
    parts: Vec<Part>,
}

/// Length of a part of an interval of `seconds`.
fn part_length(seconds: u32) -> Duration {
    Duration::from_nanos(u64::from(seconds).saturating_mul(1_000_000_000 / PARTS).max(1))
}

/// The number of the part that contains `now`.
fn number(now: Duration, part: Duration) -> u64 {
    nanos(now).checked_div(nanos(part)).unwrap_or(0)
}

impl Interval {
    pub(super) fn new(seconds: u32) -> Self {
        Self { part: part_length(seconds), parts: (0..=PARTS).map(|_| Part::default()).collect() }
    }

    pub(super) fn count(&mut self, now: Duration, io: IoType, nanos: u64) {
        let number = number(now, self.part);
        let at = usize::try_from(number % (PARTS + 1)).unwrap_or(0);
        let Some(part) = self.parts.get_mut(at) else { return };
        if part.number != number {
            *part = Part { number, ..Part::default() };
        }
        part.sums.of_mut(io).count(nanos);
    }

    /// Adds the requests of the interval that ends `now` to `sums`.
    pub(super) fn add_to(&self, sums: &mut PerIoType<Sum>, now: Duration) {
        let last = number(now, self.part);
        let first = last.saturating_sub(PARTS);
        for part in self.parts.iter().filter(|part| (first..=last).contains(&part.number)) {
            sums.merge(&part.sums, Sum::add);
        }
    }
}

/// The latencies of an interval of `seconds` that ends `now`. The requests are counted since `since`.
pub(super) fn latencies(
    sums: &PerIoType<Sum>,
    seconds: u32,
    since: Duration,
    now: Duration,
) -> PerIoType<Latencies> {
    let part = part_length(seconds);
    let first = number(now, part).saturating_sub(PARTS);
    let start = Duration::from_nanos(first.saturating_mul(nanos(part))).max(since);
    let covered = now.saturating_sub(start).as_secs_f64();
    sums.map(|sum| Latencies {
        min: Duration::from_nanos(sum.min),
        max: Duration::from_nanos(sum.max),
        average: Duration::from_nanos(sum.total.checked_div(sum.requests).unwrap_or(0)),
        queue_depth: match covered > 0.0 {
            true => Duration::from_nanos(sum.total).as_secs_f64() / covered,
            false => 0.0,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(interval: &Interval, seconds: u32, now: u64) -> Latencies {
        let (mut sums, now) = (PerIoType::default(), Duration::from_secs(now));
        interval.add_to(&mut sums, now);
        latencies(&sums, seconds, Duration::ZERO, now).read
    }

    #[test]
    fn old_requests_leave_an_interval() {
        let mut interval = Interval::new(8);
        interval.count(Duration::from_secs(1), IoType::Read, 100);
        interval.count(Duration::from_secs(5), IoType::Read, 300);
        interval.count(Duration::from_secs(5), IoType::Write, 7);
        let ns = Duration::from_nanos;
        let both = at(&interval, 8, 9);
        assert_eq!((both.min, both.max, both.average), (ns(100), ns(300), ns(200)));
        let one = at(&interval, 8, 10);
        assert_eq!((one.min, one.max, one.average), (ns(300), ns(300), ns(300)));
        assert_eq!(at(&interval, 8, 14), Latencies::default());
        // A request replaces the part that was counted in the same element.
        interval.count(Duration::from_secs(14), IoType::Read, 5);
        assert_eq!(at(&interval, 8, 14).average, ns(5));
    }

    #[test]
    fn the_queue_depth_is_the_time_of_all_requests_by_the_time_that_has_passed() {
        let mut interval = Interval::new(8);
        for second in 1..=8 {
            // Three requests of one second end each second.
            (0..3).for_each(|_| {
                interval.count(Duration::from_secs(second), IoType::Read, 1_000_000_000);
            });
        }
        assert_eq!(at(&interval, 8, 8).queue_depth, 3.0);
    }
}
