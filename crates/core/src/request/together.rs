//! Runs the pieces of a request concurrently.

use std::future::Future;

use futures_util::future::join_all;

/// Runs all `futures` to their end and returns the first failure. The futures are pieces of a write, or of another
/// operation that changes a disk.
///
/// After a failure the other futures still run to their end. If the future of a write were dropped, the host would
/// still carry out the write. So a cancelled piece could overwrite newer data that the caller writes to the same range
/// after the failure.
///
/// # Errors
/// The first failure, in the order of `futures`.
pub async fn run_all<F, E>(futures: impl IntoIterator<Item = F>) -> Result<(), E>
where
    F: Future<Output = Result<(), E>>,
{
    join_all(futures).await.into_iter().collect()
}
