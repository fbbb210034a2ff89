//! The memory that the connections of a server may hold together for large requests.
//!
//! Small requests are bounded by the limits of each connection; those over [`SMALL`] take their
//! share here first and give it back when the reply has been sent. A request larger than the whole
//! budget is let in when nothing else holds a share, so that nobody waits for ever.

use oxblk_ring::Event;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Requests up to this many bytes need no share.
pub(super) const SMALL: usize = 64 << 10;

#[derive(Debug)]
pub(super) struct Budget {
    limit: usize,
    used: AtomicUsize,
    freed: Event,
}

/// Bytes taken from a budget; given back when dropped.
#[derive(Debug)]
pub(super) struct Share {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    pub(super) fn new(limit: usize) -> Arc<Budget> {
        Arc::new(Budget { limit, used: AtomicUsize::new(0), freed: Event::new() })
    }

    /// Waits until `bytes` are free and takes them; `None` when so few need no share.
    pub(super) async fn share(self: &Arc<Self>, bytes: usize) -> Option<Share> {
        if bytes <= SMALL {
            return None;
        }
        loop {
            if let Some(share) = self.try_share(bytes) {
                return Some(share);
            }
            let listener = self.freed.listen();
            if let Some(share) = self.try_share(bytes) {
                return Some(share);
            }
            listener.await;
        }
    }

    fn try_share(self: &Arc<Self>, bytes: usize) -> Option<Share> {
        let take = |used: usize| {
            let after = used.saturating_add(bytes);
            (used == 0 || after <= self.limit).then_some(after)
        };
        self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).ok()?;
        Some(Share { budget: Arc::clone(self), bytes })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::SeqCst);
        self.budget.freed.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_share_waits_for_room_and_an_oversized_one_for_solitude() {
        let budget = Budget::new(1 << 20);
        assert!(budget.share(SMALL).now_or_never().unwrap().is_none());
        let first = budget.share(600 << 10).now_or_never().unwrap().unwrap();
        assert!(budget.share(600 << 10).now_or_never().is_none());
        let second = budget.share(300 << 10).now_or_never().unwrap();
        drop(first);
        assert!(budget.share(2 << 20).now_or_never().is_none());
        drop(second);
        assert!(budget.share(2 << 20).now_or_never().unwrap().is_some());
        assert_eq!(budget.used.load(Ordering::SeqCst), 0);
    }
}
