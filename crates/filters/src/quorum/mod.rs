//! The driver `quorum`: stores the same data in several children. A write goes to all children; a read returns the data on which
//! enough children agree.
//!
//! | file | concern |
//! |---|---|
//! | this file | the driver |
//! | `factory` | opening a node |
//! | `settings` | the options |
//! | `read` | reads: comparing and voting, or the first child that works; correcting wrong data |
//! | `vote` | counting votes |
//! | `report` | the events for failed children, and the outcome of a request of several children |
//! | `members` | adding and removing children |
//!
//! Children must have the same data, so two changes of a range must reach all children in the same order. A change therefore locks
//! its range (`Quorum::changes`). Reads take no lock. If the children disagree, a read locks the range and reads again: the
//! reason may be a write that has reached only some of the children.
//!
//! A holder of a range waits only for requests to the children.

mod factory;
mod members;
mod read;
mod report;
mod settings;
mod vote;

use std::sync::{Arc, Mutex};

use futures_util::future::join_all;
use oxblk_core::{
    BoxFuture, ChildIdx, ChildList, ChildrenRef, Driver, Edge, Events, Limits, Perm, Permissions,
    Result, Status, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, RangeLock};

pub use factory::{QUORUM, QuorumFactory};

use report::Operation;
use settings::Settings;

/// An open quorum node.
struct Quorum {
    /// The node-name, for events.
    name: String,
    children: ChildrenRef,
    settings: Settings,
    /// The ranges that are being changed.
    changes: RangeLock,
    /// The number in the name of the next child.
    next: Mutex<u32>,
    events: Events,
}

impl Quorum {
    /// The children, in the order in which they were added.
    fn members(&self) -> Vec<Arc<Edge>> {
        self.children.iter().map(|(_, edge)| edge).collect()
    }

    /// Sends a request to all children and waits for all of them. The request succeeds if enough children succeed.
    async fn on_all<F>(&self, operation: Operation, request: impl Fn(Arc<Edge>) -> F) -> Result<()>
    where
        F: Future<Output = Result<()>>,
    {
        let members = self.members();
        let outcomes = join_all(members.iter().map(|edge| request(Arc::clone(edge)))).await;
        self.require_threshold(&members, outcomes, operation).map(drop)
    }
}

impl Driver for Quorum {
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            match self.settings.reads_first {
                true => self.read_first(offset, buf).await,
                false => self.read_by_vote(offset, buf).await,
            }
        })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let len = bytes(data.len());
            let _changing = self.changes.lock(offset..offset.saturating_add(len)).await;
            let request = |edge: Arc<Edge>| {
                let data = data.clone();
                async move { edge.write(offset, data, flags).await }
            };
            self.on_all(Operation::write(offset, len), request).await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            let _changing = self.changes.lock(offset..offset.saturating_add(len)).await;
            let request =
                |edge: Arc<Edge>| async move { edge.write_zeroes(offset, len, flags).await };
            self.on_all(Operation::write(offset, len), request).await
        }))
    }

    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        let request = |edge: Arc<Edge>| async move { edge.flush().await };
        Some(Box::pin(self.on_all(Operation::flush(), request)))
    }

    /// The range reads as zeroes if all children report zeroes. Otherwise the range is data. If a child does not know the status of
    /// the range, the range is data too.
    fn block_status(
        &self,
        offset: u64,
        len: u64,
        want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        Some(Box::pin(async move {
            let (mut zeroes, mut data) = (len, 0);
            for edge in self.members() {
                match edge.chain_status(offset, len, want).await {
                    Ok(status) if status.is_zero() => zeroes = zeroes.min(status.len),
                    Ok(status) => data = data.max(status.len),
                    Err(error) => {
                        self.report_bad(Operation::read(offset, len), &edge, Some(&error));
                        data = len;
                    }
                }
            }
            Ok(if data == 0 { Status::zero(zeroes) } else { Status::data(data) })
        }))
    }

    fn size(&self) -> u64 {
        self.children.iter().next().map_or(0, |(_, edge)| edge.size())
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits {
            write_flags: WriteFlags::FUA,
            zero_flags: ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK,
            has_zero_init: true,
            grows: true,
            ..Limits::default()
        };
        for (_, edge) in self.children.iter() {
            let child = edge.node().limits();
            limits.opt_transfer = limits.opt_transfer.max(child.opt_transfer);
            limits.max_transfer = stricter(limits.max_transfer, child.max_transfer);
            limits.zero_flags &= child.zero_flags;
            limits.has_zero_init &= child.has_zero_init;
            limits.grows &= child.grows;
        }
        limits
    }

    /// Other users must not change the children, because the children would differ.
    fn child_permissions(&self, _child: ChildIdx, parents: Permissions) -> Option<Permissions> {
        Some(self.settings.permissions(parents))
    }

    fn child_list(&self) -> Option<&dyn ChildList> {
        Some(self)
    }

    fn reads_write(&self) -> bool {
        self.settings.rewrites
    }
}

/// The stricter of two limits; 0 means "no limit".
fn stricter(one: u64, other: u64) -> u64 {
    match (one, other) {
        (0, limit) | (limit, 0) => limit,
        (one, other) => one.min(other),
    }
}

impl Settings {
    /// The permissions on a child, if the parents use the node with `parents`.
    fn permissions(&self, parents: Permissions) -> Permissions {
        let mut taken = parents.taken;
        taken.set(Perm::WRITE, self.rewrites || taken.contains(Perm::WRITE));
        let shared = parents.shared & (Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED);
        Permissions { taken, shared }
    }
}

fn bytes(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
