//! Epochs: counters that show when all requests that began before a certain moment have ended.
//!
//! A request that has mapped a host cluster may still read the cluster when another request frees the cluster. So a
//! freed cluster is quarantined: it is tagged with the [`Epochs::current`] epoch, and is not allocated again before
//! [`Epochs::has_passed`] returns true for that epoch. A request holds an [`EpochGuard`] from before the lookup (`map`)
//! until its I/O has ended.
//!
//! The counters are kept per I/O thread, in four slots used in rotation. A guard lowers the same counter that it has
//! raised. The epoch advances from `e` to `e + 1` only when all guards of epoch `e - 1` have been dropped. So guards of
//! at most two epochs exist at any time. When the epoch is `e + 2`, all guards of `e` and of earlier epochs have been
//! dropped. On an I/O thread, entering and leaving each cost one uncontended atomic read-modify-write, unless the epoch
//! advances at the same time. All orderings are `SeqCst`, because entering is a store followed by a load of another
//! location that the advancing thread writes.
//!
//! The counters are allocated by the first request. A request enters only after it has seen `is_used`. So a thread that finds
//! `is_used` clear knows that no request of an earlier epoch is in progress.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use oxblk_ring::perturb::point;
use oxblk_ring::{Shard, Sharded};

const SLOTS: usize = 4;

type Counts = Sharded<[AtomicU64; SLOTS]>;

/// The epochs of the nodes that were opened together: the current epoch, and the numbers of requests in progress. A request
/// enters the epochs of all nodes that it may reach.
#[derive(Debug)]
pub struct Epochs {
    current: AtomicU64,
    /// Set before the first request enters.
    is_used: AtomicBool,
    counts: OnceLock<Counts>,
}

impl Default for Epochs {
    fn default() -> Self {
        Self {
            current: AtomicU64::new(2),
            is_used: AtomicBool::new(false),
            counts: OnceLock::new(),
        }
    }
}

fn slot(counts: &[AtomicU64; SLOTS], epoch: u64) -> &AtomicU64 {
    let [a, b, c, d] = counts;
    match epoch & 3 {
        0 => a,
        1 => b,
        2 => c,
        _ => d,
    }
}

impl Epochs {
    /// The current epoch. Requests in progress belong to this epoch or to an earlier one. Requests of later epochs see
    /// all earlier writes of the caller.
    ///
    /// This function uses a read-modify-write operation, although the value does not change. A request that enters a
    /// later epoch reads a value of `current` that was stored after this operation, and therefore sees the caller's
    /// writes. With a plain load, the caller's writes could become visible after the load.
    pub fn current(&self) -> u64 {
        self.current.fetch_add(0, SeqCst)
    }

    /// The counters, for a request that enters.
    fn counts(&self) -> &Counts {
        let counts = self.counts.get_or_init(Counts::default);
        if !self.is_used.load(SeqCst) {
            self.is_used.store(true, SeqCst);
        }
        counts
    }

    /// Marks the start of a request.
    pub fn enter(&self) -> EpochGuard<'_> {
        let shard = Shard::current();
        let epoch = self.enter_at(shard);
        EpochGuard { epochs: self, epoch, shard, _thread: std::marker::PhantomData }
    }

    /// Marks the start of a request, and returns its epoch. `shard` is the shard of the calling thread. The request is counted until
    /// [`Self::leave`] is called with the same values.
    #[inline]
    pub(crate) fn enter_at(&self, shard: Shard) -> u64 {
        let counts = self.counts().at(shard);
        loop {
            let epoch = self.current.load(SeqCst);
            let count = slot(counts, epoch);
            point();
            count.fetch_add(1, SeqCst);
            point();
            if self.current.load(SeqCst) == epoch {
                return epoch;
            }
            count.fetch_sub(1, SeqCst);
        }
    }

    /// Marks the end of a request that has entered with [`Self::enter_at`].
    #[inline]
    pub(crate) fn leave(&self, shard: Shard, epoch: u64) {
        // The request that entered has allocated the counters.
        if let Some(counts) = self.counts.get() {
            slot(counts.at(shard), epoch).fetch_sub(1, SeqCst);
        }
    }

    /// Whether every request that entered the epoch `epoch` or an earlier one has ended. The call advances the epoch if
    /// possible, so that repeated calls eventually return true.
    pub fn has_passed(&self, epoch: u64) -> bool {
        let target = epoch.saturating_add(2);
        while self.current.load(SeqCst) < target {
            if !self.try_advance() {
                return false;
            }
        }
        true
    }

    /// Waits until every request that entered before this call has ended. The caller must not hold a guard.
    pub async fn wait_for_earlier_requests(&self) {
        let epoch = self.current();
        let mut round = 0_u32;
        while !self.has_passed(epoch) {
            if round < 16 {
                oxblk_ring::yield_now().await;
            } else {
                oxblk_ring::sleep(std::time::Duration::from_micros(50)).await;
            }
            round = round.saturating_add(1);
        }
    }

    fn try_advance(&self) -> bool {
        let epoch = self.current.load(SeqCst);
        let previous = epoch.wrapping_sub(1);
        if self.is_used.load(SeqCst)
            && self.counts().iter().any(|counts| slot(counts, previous).load(SeqCst) != 0)
        {
            return false;
        }
        point();
        // If the exchange fails, another thread has advanced the epoch.
        let _ = self.current.compare_exchange(epoch, epoch.wrapping_add(1), SeqCst, SeqCst);
        true
    }
}

/// A request in progress. The request ends when the guard is dropped. A guard stays on the thread that created it.
#[derive(Debug)]
pub struct EpochGuard<'a> {
    epochs: &'a Epochs,
    epoch: u64,
    shard: Shard,
    _thread: std::marker::PhantomData<*const ()>,
}

impl Drop for EpochGuard<'_> {
    fn drop(&mut self) {
        self.epochs.leave(self.shard, self.epoch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_passes_only_after_its_guards_are_dropped() {
        let epochs = Epochs::default();
        let freed_at = {
            let _old = epochs.enter();
            let freed_at = epochs.current();
            assert!(!epochs.has_passed(freed_at));
            freed_at
        };
        let _young = epochs.enter();
        // A request of a later epoch does not keep an earlier epoch from passing.
        assert!(epochs.has_passed(freed_at) || !epochs.has_passed(epochs.current()));
    }

    #[test]
    fn a_request_lowers_the_counter_that_it_has_raised() {
        let epochs = Epochs::default();
        let (shard, epoch) = oxblk_ring::block_on(async {
            let shard = Shard::current();
            (shard, epochs.enter_at(shard))
        });
        epochs.leave(shard, epoch);
        assert!(epochs.has_passed(epochs.current()));
    }

    #[test]
    fn without_requests_every_epoch_passes_immediately() {
        let epochs = Epochs::default();
        for _ in 0..10 {
            assert!(epochs.has_passed(epochs.current()));
        }
    }
}
