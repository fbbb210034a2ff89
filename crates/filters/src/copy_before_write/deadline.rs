//! The time limit of a copy.
//!
//! A copy whose time limit has passed goes on in the background, because the host may still carry out its operations. Its clusters
//! stay locked until it ends. Drains wait for such copies.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use oxblk_core::{Background, Errno, Error, Result};
use oxblk_ring::Event;

use super::options::OnError;
use super::snapshot::Snapshot;

impl Snapshot {
    /// Copies all clusters that a change of `range` touches and that are not ready. If a copy fails, either the change fails, or the
    /// snapshot becomes invalid.
    ///
    /// # Errors
    /// The error of a copy with [`OnError::BreakGuestWrite`]; `ETIMEDOUT` if the time limit has passed.
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
        let Some(limit) = self.timeout else { return self.copy_all(range).await };
        let (snapshot, running) = (Arc::clone(self), self.background.begin());
        let epochs = Background::begin(&self.children);
        let mut copying = oxblk_ring::spawn(async move {
            let outcome = snapshot.copy_all(range).await;
            if outcome.is_err() {
                // A copy that failed may leave operations of the host in flight.
                oxblk_ring::settled().await;
            }
            drop((running, epochs));
            outcome
        });
        match oxblk_ring::timeout(limit, &mut copying).await {
            Ok(outcome) => outcome,
            Err(_) => {
                copying.detach();
                let error = Error::from_errno(Errno::TIMEDOUT).on_node(&self.name);
                Err(error.prefix("The copy of old data takes too long"))
            }
        }
    }
}

/// The copies that may go on in the background.
#[derive(Debug, Default)]
pub(super) struct Running(Arc<Count>);

#[derive(Debug, Default)]
struct Count {
    running: AtomicUsize,
    changed: Event,
}

impl Running {
    fn begin(&self) -> RunningCopy {
        self.0.running.fetch_add(1, SeqCst);
        RunningCopy(Arc::clone(&self.0))
    }

    /// Waits until no copy runs.
    pub(super) async fn idle(&self) {
        while self.0.running.load(SeqCst) != 0 {
            let listener = self.0.changed.listen();
            if self.0.running.load(SeqCst) != 0 {
                listener.await;
            }
        }
    }
}

/// A copy that runs. Dropping this value ends it.
#[derive(Debug)]
struct RunningCopy(Arc<Count>);

impl Drop for RunningCopy {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, SeqCst);
        self.0.changed.notify(usize::MAX);
    }
}
