//! Making a file durable, and the record of the first failure.
//!
//! The host reports only once that it could not store data, and then discards the data. A later flush succeeds, also through
//! another descriptor. So after a failure all later flushes of the node must fail.
//!
//! The failure belongs to the operation, not to the task that waits for it. That task may be dropped, for example because its
//! I/O thread ends. The operation then continues on the host, and its outcome is recorded when it has completed.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::task::{Context, Poll, Waker};

use oxblk_core::{Error, Result};
use oxblk_ring::{File, Mutex, MutexGuardArc, keep_until_settled};

type Operation = Pin<Box<dyn Future<Output = io::Result<()>>>>;

/// The flushes of one node.
#[derive(Debug, Default)]
pub(super) struct Durable {
    /// The errno of the first failure, or 0.
    failure: Arc<AtomicI32>,
    /// Held during a flush: the host reports a failure only to one of two flushes that overlap.
    syncing: Arc<Mutex<()>>,
}

impl Durable {
    /// Makes the host store everything durably. Every such call goes through here. If the file is `cached` in the host's page
    /// cache, a failure makes all later calls fail.
    pub(super) async fn sync(&self, file: File, data_only: bool, cached: bool) -> Result<()> {
        self.only(cached, move || Box::pin(async move { file.sync(data_only).await })).await
    }

    /// Closes a handle of the file while other handles remain. The host may report failures to store data at this point.
    pub(super) async fn close(&self, file: File, cached: bool) -> Result<()> {
        let syncing = self.syncing.lock_arc().await;
        self.record(syncing, Box::pin(file.close()), cached).await
    }

    /// Runs an operation that fails if an earlier one has failed.
    async fn only(&self, cached: bool, start: impl FnOnce() -> Operation) -> Result<()> {
        let syncing = self.syncing.lock_arc().await;
        let before = self.failure.load(Ordering::Acquire);
        if before != 0 {
            return Err(Error::from_errno(before));
        }
        self.record(syncing, start(), cached).await
    }

    async fn record(
        &self,
        syncing: MutexGuardArc<()>,
        operation: Operation,
        cached: bool,
    ) -> Result<()> {
        let failure = cached.then(|| Arc::clone(&self.failure));
        let recorded = Recorded { operation, is_started: false, failure, _syncing: syncing };
        let mut running = Running(Some(recorded));
        poll_fn(|context| running.poll(context)).await
    }
}

/// An operation in progress. If this is dropped, the operation is kept until it has completed.
struct Running(Option<Recorded>);

impl Running {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let Some(recorded) = &mut self.0 else { return Poll::Pending };
        let outcome = recorded.poll(context);
        if outcome.is_ready() {
            self.0 = None;
        }
        outcome.map_err(Error::from)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(recorded) = self.0.take() {
            keep_until_settled(recorded);
        }
    }
}

/// An operation whose failure is recorded.
struct Recorded {
    operation: Operation,
    /// The operation has been polled, and has not reported its outcome.
    is_started: bool,
    failure: Option<Arc<AtomicI32>>,
    /// Released after the outcome has been recorded.
    _syncing: MutexGuardArc<()>,
}

impl Recorded {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.is_started = true;
        let outcome = self.operation.as_mut().poll(context);
        if let Poll::Ready(outcome) = &outcome {
            self.is_started = false;
            if let (Err(error), Some(failure)) = (outcome, &self.failure) {
                let errno = error.raw_os_error().unwrap_or(oxblk_core::Errno::IO);
                failure.store(errno, Ordering::Release);
            }
        }
        outcome
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // The operation has completed on the host, but nobody has taken its outcome.
        if self.is_started {
            let mut context = Context::from_waker(Waker::noop());
            if let Poll::Ready(Err(error)) = self.poll(&mut context) {
                tracing::error!(%error, "cannot store data of a file, and nobody waits for the result");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use oxblk_core::Errno;
    use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};

    use super::*;

    #[test]
    fn a_failed_close_makes_later_flushes_fail_if_the_host_caches_the_file() {
        for cached in [false, true] {
            let disk = Disk::new(1, 4096);
            let once = FailRule {
                op: FaultOp::Close,
                nth: None,
                range: None,
                errno: Errno::DQUOT,
                once: true,
            };
            disk.set_faults(Faults { fail: vec![once], ..Faults::default() });
            sim::run(1, async {
                let (durable, file) = (Durable::default(), File::sim(&disk));
                let closed = durable.close(file.clone(), cached).await;
                assert_eq!(closed.unwrap_err().raw_errno(), Errno::DQUOT);
                let synced = durable.sync(file, true, cached).await;
                let expected = if cached { Err(Errno::DQUOT) } else { Ok(()) };
                assert_eq!(synced.map_err(|error| error.raw_errno()), expected);
            });
        }
    }
}
