//! Copies from one backend to another. A copy is one request that is in flight at both backends.
//!
//! A drain waits for the requests in flight of several backends. If a copy that is in flight at its source waited for
//! its target, a drain of both backends would never end. So a copy never waits for one backend while the copy is in
//! flight at the other backend.

use std::sync::Arc;

use oxblk_ring::UntilSettled;

use super::Backend;
use super::in_flight::{Request, RequestCounts};
use crate::control::run_to_completion;
use crate::{Error, Result};

impl Backend {
    /// Copies a range to another backend with the host's copy offload. Once begun, the copy runs to its end even if
    /// its future is dropped.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) if a range does not lie inside its disk;
    /// [`Denied`](crate::ErrorKind::Denied) without write permission on the target;
    /// [`Unsupported`](crate::ErrorKind::Unsupported) if copy offload is not possible for these ranges; otherwise the
    /// errors of the host.
    pub async fn copy_to(
        &self,
        offset: u64,
        target: &Self,
        target_offset: u64,
        len: u64,
    ) -> Result<()> {
        let (from, to) = begin_both(self, target).await?;
        let (mut from, mut to) = match (from.check(offset, len), to.check(target_offset, len)) {
            (Ok(from), Ok(to)) => (from, to),
            (from, to) => {
                let failed = from.map(Request::done).and(to.map(Request::done));
                return failed;
            }
        };
        let through = target.is_write_through();
        let (source, dest) = (Arc::clone(&from.root), Arc::clone(&to.root));
        let places = UntilSettled::new([from.detach_counts(), to.detach_counts()]);
        run_to_completion(async move {
            source.edge.copy_to(offset, &dest.edge, target_offset, len).await?;
            if through {
                dest.edge.flush().await?;
            }
            // After success, no host operation of the copy is in flight.
            places.release().into_iter().flatten().flatten().for_each(RequestCounts::done);
            Ok::<_, Error>(())
        })
        .await
    }
}

async fn begin_both<'a>(
    source: &'a Backend,
    target: &'a Backend,
) -> Result<(Request<'a>, Request<'a>)> {
    loop {
        target.not_quiesced().await;
        let from = source.begin().await?;
        match target.try_begin() {
            Ok(Some(to)) => return Ok((from, to)),
            Ok(None) => from.done(),
            Err(error) => {
                from.done();
                return Err(error);
            }
        }
    }
}
