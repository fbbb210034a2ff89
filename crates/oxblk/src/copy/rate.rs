//! A bound on bytes a second, shared by all workers.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Hands out time slots: each request moves the moment at which the next may start.
pub(super) struct Rate {
    bytes_per_second: u64,
    next: Mutex<Duration>,
}

impl Rate {
    /// At most `bytes_per_second`, from 1 up.
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), next: Mutex::new(Duration::ZERO) }
    }

    /// Waits until `bytes` may be moved.
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
