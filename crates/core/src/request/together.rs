//! Running the pieces of a request concurrently.

use std::future::Future;

use futures_util::future::join_all;

/// Runs all `futures` to their end and returns the first failure. The futures are pieces of a write, or of another
/// operation that changes a disk.
///
/// After a failure the other futures still run to their end. Dropping a write does not stop the host from carrying it
/// out. So a cancelled piece could reach the disk after a later write to the same range, which the caller makes once it
/// knows of the failure.
///
/// # Errors
/// The first failure, in the order of `futures`.
pub async fn run_all<F, E>(futures: impl IntoIterator<Item = F>) -> Result<(), E>
where
    F: Future<Output = Result<(), E>>,
{
    join_all(futures).await.into_iter().collect()
}
