//! Running the pieces of a request at once.

use std::future::Future;

use futures_util::future::join_all;

/// Runs all `futures`, pieces of a write or of anything else that changes a disk, to their end and gives the first
/// failure.
///
/// A failure does not cut the others short. Dropping a write does not stop the host from carrying it out, so a piece
/// that was given up could land after what is written to the same place next, once the caller knows of the failure.
///
/// # Errors
/// The first failure, in the order of `futures`.
pub async fn run_all<F, E>(futures: impl IntoIterator<Item = F>) -> Result<(), E>
where
    F: Future<Output = Result<(), E>>,
{
    join_all(futures).await.into_iter().collect()
}
