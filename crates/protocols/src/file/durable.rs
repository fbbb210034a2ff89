//! Flushes a file to stable storage, and records failures.
//!
//! The host reports only once that it could not write cached data, and then drops this data from the page cache. A later flush
//! succeeds, possibly also through another descriptor. So after a failure, all later flushes of the node must fail.
//!
//! The operation records its own failure; the task that waits for the operation does not. The reason is that this task may be
//! dropped, for example because its I/O thread ends. The operation then continues on the host, and its outcome is recorded when
//! it has completed.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::task::{Context, Poll, Waker};

use oxblk_core::{Error, Result};
use oxblk_ring::{File, Mutex, MutexGuardArc, keep_until_settled};

type Operation = Pin<Box<dyn Future<Output = io::Result<()>>>>;

/// The flushes of one node.
#[derive(Debug, Default)]
pub(super) struct Durable {
    /// The errno of a recorded failure; 0 if there is none.
    failure: Arc<AtomicI32>,
    /// This lock is held during a flush or a close, because the host reports a failure to only one of two calls that
    /// overlap.
    syncing: Arc<Mutex<()>>,
    /// The file was written through the page cache before direct I/O was turned on, and was not flushed since.
    has_older_cached_data: AtomicBool,
}

impl Durable {
    /// Flushes the file to stable storage. All flushes of the node use this function. If the file is `cached` in the host's
    /// page cache, a failure makes all later flushes fail.
    pub(super) async fn sync(&self, file: File, data_only: bool, cached: bool) -> Result<()> {
        self.only(self.records(cached), move || {
            Box::pin(async move { file.sync(data_only).await })
        })
        .await?;
        if !cached {
            self.has_older_cached_data.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// Records that earlier writes used the page cache, and that later ones may not use it. No request is in progress.
    pub(super) fn keep_cached_data(&self) {
        self.has_older_cached_data.store(true, Ordering::Release);
    }

    /// Closes a duplicate of the descriptor. Some file systems (NFS) then report the errors of earlier writes. If the file is
    /// `cached`, a failure makes all later flushes fail.
    pub(super) async fn close(&self, file: File, cached: bool) -> Result<()> {
        let syncing = self.syncing.lock_arc().await;
        self.record(syncing, Box::pin(file.close()), self.records(cached)).await
    }

    /// Whether the failure of a flush must be recorded, or was recorded: then only [`Self::sync`] flushes the file. `cached`: the
    /// file is now written through the page cache.
    pub(super) fn must_record(&self, cached: bool) -> bool {
        self.records(cached) || self.failure.load(Ordering::Acquire) != 0
    }

    /// Whether a failure must be recorded. `cached`: the file is now written through the page cache.
    fn records(&self, cached: bool) -> bool {
        cached || self.has_older_cached_data.load(Ordering::Acquire)
    }

    /// Runs an operation, unless an earlier operation has failed. In this case, returns the errno of the earlier
    /// failure.
    async fn only(&self, records: bool, start: impl FnOnce() -> Operation) -> Result<()> {
        let syncing = self.syncing.lock_arc().await;
        let before = self.failure.load(Ordering::Acquire);
        if before != 0 {
            return Err(Error::from_errno(before));
        }
        self.record(syncing, start(), records).await
    }

    async fn record(
        &self,
        syncing: MutexGuardArc<()>,
        operation: Operation,
        records: bool,
    ) -> Result<()> {
        let failure = records.then(|| Arc::clone(&self.failure));
        let recorded = Recorded { operation, is_started: false, failure, _syncing: syncing };
        let mut running = Running(Some(recorded));
        poll_fn(|context| running.poll(context)).await
    }
}

/// An operation in progress. If this value is dropped, the operation is kept until it has completed.
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

/// An operation that records its failure if `failure` is set.
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
        // The operation has completed on the host, but no task has taken its outcome.
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
