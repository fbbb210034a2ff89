//! The filter `replication`: continuous checkpoints of a disk on another host (COLO).
//!
//! | file | concern |
//! |---|---|
//! | this file | the driver |
//! | `factory` | the options, and opening a node |
//! | `stage` | the stages of a replication |
//! | `secondary` | start, checkpoint and stop of a secondary |
//! | `steps` | the work on the disks of a secondary while no request is in flight |
//! | `all` | the operations on all replication nodes of a graph |
//!
//! The guest runs on two hosts. The primary sends all writes to the secondary disk on the other host. Its filter (`mode=primary`)
//! is above the NBD client: it passes writes on, and refuses reads. A failed write is reported only by [`errors`], because the
//! guest's data is on the primary disk.
//!
//! On the other host, the filter (`mode=secondary`) shows the disk as it was at the last checkpoint, plus the writes of the guest
//! there. Before the start, `active` and `hidden` are empty overlays, and a server writes what the primary sends to `secondary`:
//!
//! ```text
//! before the start                      while the replication runs
//!
//! replication                server     replication                            server
//!      │ file                  │             │ file                              │
//!      ▼        backing        │             ▼        backing                    ▼
//!    active ─▶ hidden ─▶ secondary         active ─▶ snapshot-access ─▶ copy-before-write
//!                                                                  target │      │ file
//!                                                                         ▼      ▼
//!                                                                    hidden ─▶ secondary
//! ```
//!
//! Active has the writes of the guest. Hidden gets the old data of each cluster of the secondary disk before the server changes
//! the cluster. A checkpoint empties both, and `copy-before-write` begins a new point in time. A failover copies all data of
//! hidden and active to the secondary disk; then the filter uses the secondary disk directly. All requests are held back
//! meanwhile. The data is still in hidden and active until the copy has been flushed, so a failed failover can be repeated.
//!
//! If hidden or active cannot be emptied, the guest's view is lost. Then all requests of the guest fail until a checkpoint
//! succeeds.

mod all;
mod factory;
mod secondary;
mod stage;
mod steps;

use std::sync::{Arc, PoisonError};

use oxblk_core::driver::Resize;
use oxblk_core::{
    BoxFuture, ChildIdx, Driver, Errno, Error, ErrorKind, Graph, Limits, MapOp, Node, Perm,
    Permissions, Replication, ReplicationMode, Result, Step, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, Mutex};

pub use all::{checkpoint_all, errors, start_all, stop_all};
pub use factory::{REPLICATION, ReplicationFactory};

use crate::below::Below;
use secondary::Running;
use stage::{Stage, StageCell};

/// An open replication node.
struct Filter {
    below: Below,
    mode: ReplicationMode,
    /// The node-name or the name of the backend at the top of the graph of a secondary.
    top: Option<String>,
    is_read_only: bool,
    stage: Arc<StageCell>,
    /// Serialises the operations of [`Replication`]. Its holder waits for control locks of nodes, so [`Driver::close`] does not wait
    /// for it.
    operation: Mutex<()>,
    /// Locked only for a moment.
    slot: std::sync::Mutex<Slot>,
}

/// The nodes of a secondary.
#[derive(Default)]
struct Slot {
    /// The replication that runs.
    running: Option<Running>,
    /// The filter is closed.
    is_closed: bool,
}

fn refused() -> Error {
    Error::from_errno(Errno::IO)
}

impl Filter {
    fn slot(&self) -> std::sync::MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> Option<Running> {
        self.slot().running.clone()
    }

    /// Keeps the nodes of a replication that has started. If the filter was closed meanwhile, the replication ends.
    fn keep(&self, running: Running) {
        let mut slot = self.slot();
        match slot.is_closed {
            true => running.dissolve_later(),
            false => slot.running = Some(running),
        }
    }

    fn may_read(&self) -> bool {
        self.mode == ReplicationMode::Secondary && self.stage.get().passes_guest()
    }

    fn check_write(&self) -> Result<()> {
        let passes = match self.mode {
            ReplicationMode::Primary => self.stage.get() == Stage::Running,
            ReplicationMode::Secondary => self.stage.get().passes_guest(),
        };
        if passes { Ok(()) } else { Err(refused()) }
    }

    /// The outcome of a write for the guest. A primary only reports the error to its manager.
    fn written(&self, outcome: Result<()>) -> Result<()> {
        match outcome {
            // The request path writes zeroes as data then.
            Err(error) if error.kind() == ErrorKind::Unsupported => Err(error),
            Err(error) if self.mode == ReplicationMode::Primary => {
                tracing::warn!(%error, "a write was not replicated");
                self.stage.set_failed();
                Ok(())
            }
            outcome => outcome,
        }
    }
}

impl Driver for Filter {
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        let _ = op;
        if self.may_read() {
            Step::Forward { child: ChildIdx::FILE, offset, len }
        } else {
            Step::Slow
        }
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            if !self.may_read() {
                return Err(refused());
            }
            self.below.edge()?.read(offset, buf).await
        })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check_write()?;
            self.written(self.below.edge()?.write(offset, data, flags).await)
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.check_write()?;
            self.written(self.below.edge()?.write_zeroes(offset, len, flags).await)
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.check_write()?;
            self.below.edge()?.discard(offset, len).await
        }))
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn limits(&self) -> Limits {
        self.below.limits()
    }

    /// A secondary writes to the active disk. The hidden disk and the secondary disk get other writers, so all permissions are
    /// shared.
    fn child_permissions(&self, _child: ChildIdx, parents: Permissions) -> Option<Permissions> {
        if self.mode == ReplicationMode::Primary || self.is_read_only {
            return None;
        }
        let taken = parents.taken | Perm::CONSISTENT_READ | Perm::WRITE;
        Some(Permissions { taken, shared: Perm::all() })
    }

    /// A replication that still runs ends: no cluster of the secondary disk is copied any more.
    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        let mut slot = self.slot();
        slot.is_closed = true;
        if let Some(running) = slot.running.take() {
            running.dissolve_later();
        }
        None
    }

    /// The three disks of a secondary have the same size.
    fn resize(&self) -> Option<&dyn Resize> {
        None
    }

    fn replication(&self) -> Option<&dyn Replication> {
        Some(self)
    }
}

impl Replication for Filter {
    fn start<'a>(
        &'a self,
        graph: &'a Graph,
        node: &'a Arc<Node>,
        mode: ReplicationMode,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let _operation = self.operation.lock().await;
            match self.stage.get() {
                Stage::Complete => return Ok(()),
                Stage::NotStarted | Stage::Stopped => {}
                Stage::Running | Stage::Unusable | Stage::FailoverFailed => {
                    return Err(Error::invalid("Block replication is running or done"));
                }
            }
            if mode != self.mode {
                let number = |mode| u8::from(mode == ReplicationMode::Secondary);
                let (needed, given) = (number(self.mode), number(mode));
                return Err(Error::invalid(format!(
                    "The parameter mode's value is invalid, needs {needed}, but got {given}"
                )));
            }
            if mode == ReplicationMode::Primary {
                self.stage.set(Stage::Running);
                return Ok(());
            }
            let active = Arc::clone(self.below.edge()?.node());
            let started = Running::start(graph, node, &active, self.top.as_deref(), &self.stage);
            self.keep(started.await?);
            Ok(())
        })
    }

    fn checkpoint<'a>(&'a self, graph: &'a Graph) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let _operation = self.operation.lock().await;
            if self.mode == ReplicationMode::Primary || self.stage.get() == Stage::Complete {
                return Ok(());
            }
            let Some(running) = self.running() else { return Err(stage::not_running()) };
            running.checkpoint(graph, &self.stage).await
        })
    }

    fn stop<'a>(
        &'a self,
        graph: &'a Graph,
        node: &'a Arc<Node>,
        failover: bool,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let _operation = self.operation.lock().await;
            match self.stage.get() {
                Stage::NotStarted if failover => return Ok(()),
                Stage::NotStarted => return Err(stage::not_running()),
                Stage::Stopped | Stage::Complete => return Ok(()),
                Stage::Running | Stage::Unusable | Stage::FailoverFailed => {}
            }
            if let Some(running) = self.running() {
                match failover {
                    true => running.fail_over(graph, node, &self.stage).await?,
                    false => running.stop(graph, &self.stage).await?,
                }
                self.slot().running = None;
                return Ok(());
            }
            self.stage.set(Stage::Stopped);
            Ok(())
        })
    }

    fn check(&self) -> Result<()> {
        self.stage.check()
    }
}
