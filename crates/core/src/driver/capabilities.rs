//! The capabilities of drivers: small traits for features that only some drivers have.
//!
//! A method of [`Driver`] returns the trait object as an `Option`. Larger features declare their trait in a module of
//! their own, for example [`Check`](crate::check::Check).

use oxblk_ring::IoBuf;

use super::{BoxFuture, Driver, Preallocation};
use crate::{CompressedCluster, Options, Result};

/// Lets requests pass that wait in the driver, for example for a rate limit, so that a drain does not wait for them. Several
/// drains may be in progress at a time.
pub trait Drain: Send + Sync {
    /// A drain begins whose requests may wait in this driver. Until [`Self::end`], no request waits for anything but the host.
    fn begin(&self);
    /// The drain ends.
    fn end(&self);
    /// Waits until the driver does no work that no request waits for ([`Background`](crate::Background)). A drain calls this when
    /// all requests have ended, until all drivers return `None`. `None`: there is no such work at this moment.
    fn idle(&self) -> Option<BoxFuture<'_, ()>> {
        None
    }
}

/// Changes the size of a node.
pub trait Resize: Send + Sync {
    /// Sets the virtual size to `size` bytes. Added space reads as zeroes, even where a backing file has data.
    /// [`Backend::resize`](crate::Backend::resize) drains the node first. A parent may resize its child while other
    /// requests to the child are in flight.
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>>;
}

/// Reopens a node in two steps (prepare, then commit or abort). So either all nodes of a reopen change or none of them.
pub trait Reopen: Send + Sync {
    /// Checks and prepares the change; `read_only` and the cache flags are in `flags`. No visible state changes.
    fn prepare(&self, flags: crate::OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>>;
    /// Puts the prepared change into effect. This step cannot fail.
    fn commit(&self) -> BoxFuture<'_, ()>;
    /// Discards the prepared change.
    fn abort(&self) -> BoxFuture<'_, ()>;
}

/// Copies between host files with the host's copy offload.
pub trait CopyRange: Send + Sync {
    /// Copies `len` bytes at `offset` of this node to `target_offset` of the leaf driver `target`.
    fn copy_to<'a>(
        &'a self,
        offset: u64,
        target: &'a dyn Driver,
        target_offset: u64,
        len: u64,
    ) -> BoxFuture<'a, Result<()>>;
}

/// Compresses and stores clusters.
pub trait Compress: Send + Sync {
    /// Stores `data` (whole clusters, or data up to the end of the disk) compressed, or uncompressed if compression
    /// saves no space.
    fn write_compressed(&self, offset: u64, data: IoBuf) -> BoxFuture<'_, Result<()>>;

    /// Compresses `data` (one cluster, or the incomplete cluster at the end of the disk) and stores nothing.
    fn compress(&self, data: IoBuf) -> BoxFuture<'_, Result<CompressedCluster>>;

    /// Stores at `offset` a cluster that [`Self::compress`] has returned.
    fn store(&self, offset: u64, cluster: CompressedCluster) -> BoxFuture<'_, Result<()>>;

    /// Ends a series of compressed writes: pads the image file to whole sectors.
    /// [`Backend::end_compressed`](crate::Backend::end_compressed) drains the node before the call.
    fn end(&self) -> BoxFuture<'_, Result<()>>;
}

/// Operations of formats that support backing files. The methods of [`Backend`](crate::Backend) drain the node before
/// each call.
pub trait Backing: Send + Sync {
    /// Stores `filename` and `format` in the image; a `filename` of `None` removes the reference. After this call, the
    /// change and all earlier writes are on stable storage. The node continues to use the backing file that is open.
    fn change<'a>(
        &'a self,
        filename: Option<&'a str>,
        format: Option<&'a str>,
    ) -> BoxFuture<'a, Result<()>>;

    /// Discards all guest data that the image itself stores, so that reads return only the data of the backing file.
    /// Internal snapshots stay. After a crash the image has either all of this data or none of it.
    fn make_empty(&self) -> BoxFuture<'_, Result<()>>;
}
