//! Running several requests at once.

use std::future::Future;

use futures_util::future::join_all;
use oxblk_core::Result;

/// Runs all `futures` to their end and gives the first failure.
///
/// A failure does not cut the others short: a write that was given up may still reach the file, after what is
/// written there next.
pub(super) async fn all<F>(futures: impl IntoIterator<Item = F>) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    join_all(futures).await.into_iter().collect()
}
