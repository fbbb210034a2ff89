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

impl Backend {
    /// Writes `data` at `offset` of the VM state.
    ///
    /// # Errors
    /// `ENOTSUP` if the format cannot store VM state; `EPERM` without write permission; the errors of the image's driver.
    pub async fn save_vm_state(&self, offset: u64, data: IoBuf) -> Result<()> {
        let edge = self.root()?;
        of(edge.node())?;
        if !edge.permissions().taken.contains(Perm::WRITE) {
            return Err(Error::from_errno(Errno::PERM));
        }
        let save = move |node: Arc<Node>| async move {
            let saved = of(&node)?.save(offset, data).await;
            node.mark_unflushed();
            saved
        };
        self.graph().run_exclusive(edge.node(), self.while_writer(save)).await
    }

    /// Reads `buf.len()` bytes at `offset` of the VM state into `buf`.
    ///
    /// # Errors
    /// `ENOTSUP` if the format cannot store VM state; the errors of the image's driver.
    pub async fn load_vm_state(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let load = move |node: Arc<Node>| async move { of(&node)?.load(offset, buf).await };
        self.graph().run_exclusive(&self.node()?, self.while_open(load)).await
    }
}
