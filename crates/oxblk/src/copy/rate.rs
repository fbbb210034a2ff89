//! A limit on the bytes per second of all workers together.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

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

    /// Waits until `bytes` may be transferred.
    pub(super) async fn pass(&self, bytes: u64) {
        let now = oxblk_ring::now();
        let cost = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX));
        let start = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let start = (*next).max(now);
            *next = start.saturating_add(cost);
            start
        };
        if start > now {
            oxblk_ring::sleep(start - now).await;
        }
    }
}
