//! A limit on the bytes per second of all workers together.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Maximum length of a sleep. After a request to stop or a failure, a wait ends within this time.
const MAX_SLEEP: Duration = Duration::from_millis(20);

/// Assigns start times to requests. The time between the starts of two consecutive requests is at least the time that
/// the bytes of the first request take at the given rate.
pub(super) struct Rate {
    bytes_per_second: u64,
    next: Mutex<Duration>,
}

impl Rate {
    /// Limits the rate to `bytes_per_second`, at least 1.
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), next: Mutex::new(Duration::ZERO) }
    }

    /// Waits until `bytes` may be transferred, or until `is_over` returns true.
    pub(super) async fn pass(&self, bytes: u64, is_over: impl Fn() -> bool) {
        let now = oxblk_ring::now();
        let cost = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX));
        let start = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let start = (*next).max(now);
            *next = start.saturating_add(cost);
            start
        };
        let mut left = start.saturating_sub(now);
        while !left.is_zero() && !is_over() {
            oxblk_ring::sleep(left.min(MAX_SLEEP)).await;
            left = start.saturating_sub(oxblk_ring::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    #[test]
    fn the_rate_is_kept_and_a_request_to_stop_ends_the_wait() {
        oxblk_ring::sim::run(1, async {
            let (rate, stop) = (Rate::new(1000), Cell::new(false));
            let begin = oxblk_ring::now();
            for _ in 0..3 {
                rate.pass(1000, || stop.get()).await;
            }
            let passed = oxblk_ring::now() - begin;
            assert!(passed >= Duration::from_secs(2), "{passed:?}");
            // The next request waits for an hour.
            rate.pass(3_600_000, || stop.get()).await;
            let begin = oxblk_ring::now();
            let mut wait = pin!(rate.pass(1, || stop.get()));
            let mut context = Context::from_waker(Waker::noop());
            assert_eq!(wait.as_mut().poll(&mut context), Poll::Pending);
            stop.set(true);
            wait.await;
            assert!(oxblk_ring::now() - begin < Duration::from_secs(1));
        });
    }
}
