//! The time limit of a copy.
//!
//! When the time limit of a request passes, the copies that it has begun go on in the background, because the host may still carry
//! out their operations. Their clusters stay locked until they end. Drains wait for such copies. Copies that still wait for
//! the lock of their clusters are cancelled, so each cluster has at most one copy in the background.
//!
//! The number of requests with copies in the background is limited ([`MAX_LATE`]). So a guest that writes to more and more
//! clusters while the target hangs does not fill the memory.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use futures_util::future::{Either, select};

use oxblk_core::{Background, Errno, Error, Result};
use oxblk_ring::Event;

use super::options::OnError;
use super::snapshot::Snapshot;

/// While this number of requests have copies in the background, further copies fail at once. Each request has at most
/// [`CHUNKS_AT_ONCE`](super::copying::CHUNKS_AT_ONCE) buffers of [`MAX_READ`](super::copying::MAX_READ) bytes.
const MAX_LATE: usize = 16;

impl Snapshot {
    /// Copies all clusters that a change of `range` touches and that are not ready. If a copy fails, either the change
    /// fails, or the snapshot becomes invalid.
    ///
    /// # Errors
    /// The error of a copy with [`OnError::BreakGuestWrite`]; `ETIMEDOUT` if the time limit has passed, or
    /// if too many copies are in the background.
    pub(super) async fn prepare_change(self: &Arc<Self>, range: Range<u64>) -> Result<()> {
        if !self.must_copy(&range) {
            return Ok(());
        }
        let (start, end) = (range.start, range.end);
        let Err(error) = self.copy_in_time(range).await else { return Ok(()) };
        match self.on_error {
            OnError::BreakGuestWrite => Err(error),
            OnError::BreakSnapshot => {
                if !self.is_broken.swap(true, SeqCst) {
                    tracing::warn!(
                        node = self.name,
                        "the snapshot is not valid any more: cannot copy {start:#x}..{end:#x} before it changes: {error}"
                    );
                }
                Ok(())
            }
        }
    }

    async fn copy_in_time(self: &Arc<Self>, range: Range<u64>) -> Result<()> {
        let Some(limit) = self.timeout else { return self.copy_all(range, None).await };
        if self.background.0.late.load(SeqCst) >= MAX_LATE {
            return Err(self.too_late().prefix("Too many copies are in progress"));
        }
        let (snapshot, running) = (Arc::clone(self), self.background.begin());
        let (epochs, deadline) = (Background::begin(&self.children), Arc::clone(&running.deadline));
        let mut copying = oxblk_ring::spawn(async move {
            let outcome = snapshot.copy_all(range, Some(&running.deadline)).await;
            drop((running, epochs));
            outcome
        });
        match oxblk_ring::timeout(limit, &mut copying).await {
            Ok(outcome) => outcome,
            Err(_) => {
                copying.detach();
                self.background.pass(&deadline);
                Err(self.too_late())
            }
        }
    }

    /// The error of a copy whose time limit has passed.
    pub(super) fn too_late(&self) -> Error {
        let error = Error::from_errno(Errno::TIMEDOUT).on_node(&self.name);
        error.prefix("The copy of old data takes too long")
    }
}

/// The time limit of the copies for one request.
#[derive(Debug, Default)]
pub(super) struct Deadline {
    /// The time limit has passed, or the copies have ended.
    is_over: AtomicBool,
    passed: Event,
}

impl Deadline {
    /// Whether the time limit has passed. The copies are in progress.
    pub(super) fn has_passed(&self) -> bool {
        self.is_over.load(SeqCst)
    }

    /// Waits for a result. `None`: the time limit has passed before.
    pub(super) async fn unless_passed<F: Future>(&self, result: F) -> Option<F::Output> {
        let passed = self.passed.listen();
        if self.has_passed() {
            return None;
        }
        match select(pin!(result), passed).await {
            Either::Left((result, _)) => Some(result),
            Either::Right(_) => None,
        }
    }
}

/// The copies that may go on in the background.
#[derive(Debug, Default)]
pub(super) struct Running(Arc<Count>);

#[derive(Debug, Default)]
struct Count {
    running: AtomicUsize,
    /// Those of `running` whose time limit has passed.
    late: AtomicUsize,
    changed: Event,
}

impl Running {
    fn begin(&self) -> RunningCopy {
        self.0.running.fetch_add(1, SeqCst);
        RunningCopy { count: Arc::clone(&self.0), deadline: Arc::default() }
    }

    /// The time limit passes.
    fn pass(&self, deadline: &Deadline) {
        self.0.late.fetch_add(1, SeqCst);
        if deadline.is_over.swap(true, SeqCst) {
            // The copies ended at the same moment.
            self.0.late.fetch_sub(1, SeqCst);
        }
        deadline.passed.notify(usize::MAX);
    }

    /// Waits until no copy runs. `None`: no copy runs.
    pub(super) fn idle(&self) -> Option<impl Future<Output = ()> + '_> {
        let is_idle = || self.0.running.load(SeqCst) == 0;
        if is_idle() {
            return None;
        }
        Some(async move {
            while !is_idle() {
                let listener = self.0.changed.listen();
                if !is_idle() {
                    listener.await;
                }
            }
        })
    }
}

/// The copies for one request. Dropping this value ends them.
#[derive(Debug)]
struct RunningCopy {
    count: Arc<Count>,
    deadline: Arc<Deadline>,
}

impl Drop for RunningCopy {
    fn drop(&mut self) {
        if self.deadline.is_over.swap(true, SeqCst) {
            self.count.late.fetch_sub(1, SeqCst);
        }
        self.count.running.fetch_sub(1, SeqCst);
        self.count.changed.notify(usize::MAX);
    }
}
