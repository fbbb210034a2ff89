//! VM state: the saved state of a virtual machine without its disks. An image stores VM state in an area after the end
//! of the guest disk.
//!
//! VM state belongs to the current state of the image, like the disk's contents. A snapshot preserves the VM state that
//! was saved before the snapshot was taken. Applying the snapshot restores this VM state.

use std::sync::Arc;

use oxblk_ring::{IoBuf, IoBufMut};

use crate::driver::BoxFuture;
use crate::perm::Perm;
use crate::{Backend, Errno, Error, Node, Result};

/// The interface of formats that can store VM state. The functions of this module drain the node before each call.
pub trait VmState: Send + Sync {
    /// Writes `data` at byte `offset` of the VM state area.
    fn save(&self, offset: u64, data: IoBuf) -> BoxFuture<'_, Result<()>>;
    /// Reads `buf.len()` bytes at byte `offset` of the VM state area into `buf`. Bytes that were never written are
    /// zero.
    fn load(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>>;
}

fn of(node: &Node) -> Result<&dyn VmState> {
    node.driver().vm_state().ok_or_else(|| Error::from_errno(Errno::OPNOTSUPP))
}

/// Finds the node, at or below `node`, whose driver can store VM state, and the nodes above it.
fn keeper(node: Arc<Node>) -> Result<(Arc<Node>, Vec<Arc<Node>>)> {
    crate::keeper::keeper(node, |driver| driver.vm_state().is_some())
}

impl Backend {
    /// Writes `data` at `offset` of the VM state. If the node only forwards requests, the node below stores the VM state.
    ///
    /// # Errors
    /// `ENOTSUP` if the format cannot store VM state; `EPERM` without write permission; the errors of the image's driver.
    pub async fn save_vm_state(&self, offset: u64, data: IoBuf) -> Result<()> {
        let edge = self.root()?;
        let (keeper, above) = keeper(Arc::clone(edge.node()))?;
        if !edge.permissions().taken.contains(Perm::WRITE) {
            return Err(Error::from_errno(Errno::PERM));
        }
        let changed = above.clone();
        let save = move |node: Arc<Node>| async move {
            let saved = of(&node)?.save(offset, data).await;
            changed.iter().chain([&node]).for_each(|node| node.mark_unflushed());
            saved
        };
        self.graph().run_exclusive_below(above, &keeper, self.while_writer(save)).await
    }

    /// Reads `buf.len()` bytes at `offset` of the VM state into `buf`.
    ///
    /// # Errors
    /// `ENOTSUP` if the format cannot store VM state; the errors of the image's driver.
    pub async fn load_vm_state(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let load = move |node: Arc<Node>| async move { of(&node)?.load(offset, buf).await };
        let (keeper, above) = keeper(self.node()?)?;
        self.graph().run_exclusive_below(above, &keeper, self.while_open(load)).await
    }
}
