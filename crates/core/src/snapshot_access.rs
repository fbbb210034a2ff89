//! Access to the contents that a disk had at an earlier point in time, while the disk is used.

use oxblk_ring::IoBufMut;

use crate::driver::{BoxFuture, Want};
use crate::{Result, Status};

/// The capability of a filter to show the disk below it as it was at an earlier point in time. The driver `snapshot-access`
/// makes a node of it.
pub trait SnapshotAccess: Send + Sync {
    /// The size of the snapshot in bytes.
    fn size(&self) -> u64;

    /// Reads `buf.len()` bytes at `offset`.
    ///
    /// # Errors
    /// `EACCES` if a part of the range is not accessible, or if the snapshot has become invalid.
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>>;

    /// The status of the start of a range. The status describes the contents completely: no other node must be queried.
    ///
    /// # Errors
    /// Those of [`Self::read`].
    fn block_status(&self, offset: u64, len: u64, want: Want) -> BoxFuture<'_, Result<Status>>;

    /// Informs the filter that the contents of a range are no longer needed. Afterwards, the clusters that lie completely in the
    /// range are not accessible.
    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>>;

    /// Makes the present contents of the disk the contents of the snapshot, also if the snapshot was invalid. The filter then uses
    /// nothing that it has copied before. The caller has drained the filter.
    fn restart(&self);
}
