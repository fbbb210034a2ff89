//! A leaky bucket. Each request adds units (bytes or requests) to the bucket, and the bucket leaks at the allowed rate. A
//! request passes while the bucket is not too full.
//!
//! Without a burst rate, the bucket holds what leaks in a tenth of a second. With a burst rate, it holds what arrives at this
//! rate within the burst length. If the burst is longer than a second, a second level limits the rate within the burst.

use std::time::Duration;

use super::limits::BucketLimits;

/// The part of a second for which an empty bucket without a burst rate takes requests at once.
const BURST_PARTS: f64 = 10.0;

/// The state of one limit.
#[derive(Debug, Clone, Default)]
pub(super) struct Bucket {
    limits: BucketLimits,
    level: f64,
    burst_level: f64,
}

impl Bucket {
    /// An empty bucket.
    pub(super) fn new(limits: BucketLimits) -> Self {
        Self { limits, level: 0.0, burst_level: 0.0 }
    }

    fn average(&self) -> f64 {
        as_f64(self.limits.average)
    }

    fn burst(&self) -> f64 {
        as_f64(self.limits.burst)
    }

    /// Lets the bucket leak for the time `elapsed`.
    pub(super) fn leak(&mut self, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        self.level = (self.level - self.average() * seconds).max(0.0);
        if self.limits.burst_length > 1 {
            self.burst_level = (self.burst_level - self.burst() * seconds).max(0.0);
        }
    }

    /// The time until a request may pass.
    pub(super) fn wait(&self) -> Duration {
        if self.limits.average == 0 {
            return Duration::ZERO;
        }
        let size = if self.limits.burst == 0 {
            self.average() / BURST_PARTS
        } else {
            self.burst() * as_f64(self.limits.burst_length)
        };
        let mut seconds = (self.level - size) / self.average();
        if self.limits.burst_length > 1 && self.limits.burst > 0 {
            let size = self.burst() / BURST_PARTS;
            seconds = seconds.max((self.burst_level - size) / self.burst());
        }
        Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
    }

    /// Adds the units of a request to the bucket.
    pub(super) fn add_units(&mut self, units: f64) {
        if self.limits.average == 0 {
            return;
        }
        self.level += units;
        if self.limits.burst_length > 1 {
            self.burst_level += units;
        }
    }
}

/// Limits are at most 10^15, so the conversion is exact.
#[expect(clippy::cast_precision_loss, reason = "limits are less than 2^53")]
pub(super) fn as_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The units that pass in `seconds` if requests of one unit arrive as fast as they may pass.
    fn passed(limits: BucketLimits, seconds: f64) -> f64 {
        let (mut bucket, mut time, mut units) = (Bucket::new(limits), 0.0, 0.0);
        loop {
            let wait = bucket.wait();
            time += wait.as_secs_f64();
            if time > seconds {
                return units;
            }
            bucket.leak(wait);
            bucket.add_units(1.0);
            units += 1.0;
        }
    }

    fn limits(average: u64, burst: u64, burst_length: u64) -> BucketLimits {
        BucketLimits { average, burst, burst_length }
    }

    #[test]
    fn the_rate_is_the_average_after_a_tenth_of_a_second() {
        let units = passed(limits(1000, 0, 1), 10.0);
        assert!((units - 10_100.0).abs() < 3.0, "{units}");
    }

    #[test]
    fn a_burst_passes_at_once_if_it_lasts_a_second() {
        let units = passed(limits(100, 2000, 1), 10.0);
        assert!((units - 3000.0).abs() < 3.0, "{units}");
    }

    #[test]
    fn a_long_burst_passes_at_the_burst_rate() {
        // The bucket holds 1000 * 5 units and leaks 100 units each second.
        let during = passed(limits(100, 1000, 5), 2.0);
        assert!((during - 2100.0).abs() < 5.0, "{during}");
        let after = passed(limits(100, 1000, 5), 60.0);
        assert!((after - 11_000.0).abs() < 5.0, "{after}");
    }

    #[test]
    fn a_bucket_without_a_limit_never_waits() {
        let mut bucket = Bucket::new(limits(0, 0, 1));
        for _ in 0..1000 {
            bucket.add_units(1e9);
            assert_eq!(bucket.wait(), Duration::ZERO);
        }
    }
}
