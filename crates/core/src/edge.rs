//! Edges: an edge records that a parent uses a node, the parent's name for the node, and the parent's permissions.
//!
//! An [`Edge`] belongs to its user: a node (in its [`Children`](crate::Children)), a backend, or an
//! [`Attachment`](crate::Attachment). The node of an edge never changes.
//! To replace a child, the graph drains the parent and puts a new edge into the slot. Requests made through an edge
//! take the complete request path of the child.
//!
//! An edge knows its [`Owner`]. So all users of a node can be found and moved to another node, and all nodes and backends above
//! a node can be found.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use oxblk_ring::{IoBuf, IoBufMut};

use crate::backend::WeakBackend;
use crate::perm::{Perm, Permissions, Roles, SECTOR};
use crate::request;
use crate::{
    ChildIdx, CompressedCluster, CopyOnRead, DebugEvent, Error, ErrorKind, Node, Preallocation,
    ReadFlags, RequestTracking, Result, Status, Want, WriteFlags, ZeroFlags,
};

/// The user to which an edge belongs.
#[derive(Clone)]
pub(crate) enum Owner {
    /// A node.
    Node(Weak<Node>, ChildIdx),
    /// A backend that can get another root node.
    Backend(WeakBackend),
    /// A backend that stays at its node: a job's backend.
    FixedBackend(WeakBackend),
}

/// The connection from a parent to a child node.
pub struct Edge {
    node: Arc<Node>,
    /// Unset for an [`Attachment`](crate::Attachment), and while the parent is being opened.
    owner: OnceLock<Owner>,
    name: String,
    user: String,
    roles: Roles,
    taken: AtomicU8,
    permissions: Mutex<Permissions>,
    also_shared: AtomicU8,
    /// Number of [`FrozenChain`](crate::FrozenChain)s that contain this edge.
    frozen: AtomicU32,
    yields_to: Mutex<Option<Arc<str>>>,
}

impl std::fmt::Debug for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Edge")
            .field("user", &self.user)
            .field("name", &self.name)
            .field("node", &self.node.name())
            .finish_non_exhaustive()
    }
}

impl Edge {
    /// An edge that is not yet a user of its node.
    pub(crate) fn unattached(
        node: Arc<Node>,
        user: impl Into<String>,
        name: impl Into<String>,
        roles: Roles,
        permissions: Permissions,
    ) -> Arc<Self> {
        Arc::new(Self {
            node,
            owner: OnceLock::new(),
            name: name.into(),
            user: user.into(),
            roles,
            taken: AtomicU8::new(permissions.taken.bits()),
            permissions: Mutex::new(permissions),
            also_shared: AtomicU8::new(0),
            frozen: AtomicU32::new(0),
            yields_to: Mutex::default(),
        })
    }

    /// Records the owner. An owner that was recorded before stays.
    pub(crate) fn owned_by(&self, owner: Owner) {
        let _ = self.owner.set(owner);
    }

    /// The owner, if it is a node or a backend. `None` also while the parent is being opened.
    pub(crate) fn owner(&self) -> Option<&Owner> {
        self.owner.get()
    }

    /// The node, if this edge has the last reference to it.
    pub(crate) fn into_node(self) -> Option<Node> {
        Arc::into_inner(self.node)
    }

    /// The child node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The parent's name for this child (`file`, `backing`, `root`).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The purposes for which a node uses this child. Empty if the user is not a node.
    pub fn roles(&self) -> Roles {
        self.roles
    }

    /// The name of the user, for messages.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The permissions taken and shared.
    pub fn permissions(&self) -> Permissions {
        *self.lock()
    }

    /// Permissions that this edge shares in addition to those that the users of the parent share; see
    /// [`crate::WritableBase`].
    pub(crate) fn also_shared(&self) -> Perm {
        Perm::from_bits_truncate(self.also_shared.load(Relaxed))
    }

    /// Sets [`Self::also_shared`]. The new value takes effect when the permissions of the parent are updated.
    pub(crate) fn set_also_shared(&self, shared: Perm) {
        self.also_shared.store(shared.bits(), Relaxed);
    }

    /// Whether the edge is a link of a frozen chain.
    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.load(Relaxed) > 0
    }

    /// Makes the edge a link of one more frozen chain. The caller holds the change lock.
    pub(crate) fn freeze(&self) {
        self.frozen.fetch_add(1, Relaxed);
    }

    /// Undoes one [`Self::freeze`].
    pub(crate) fn thaw(&self) {
        self.frozen.fetch_sub(1, Relaxed);
    }

    /// The job for whose duration this user has given its write permission away.
    pub(crate) fn yields_to(&self) -> Option<Arc<str>> {
        self.yields_to.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Records the name of the job that is now the only writer of the node, for messages. `None`: there is no such job.
    /// See [`crate::SoleWriter`].
    pub(crate) fn yield_to(&self, writer: Option<Arc<str>>) {
        *self.yields_to.lock().unwrap_or_else(PoisonError::into_inner) = writer;
    }

    fn refused(&self, operation: &str) -> Error {
        let text = match self.yields_to() {
            Some(writer) => format!("{} cannot {operation} during the {writer}", self.user),
            None => format!("{} did not ask to {operation}", self.user),
        };
        Error::new(ErrorKind::Denied, text).on_node(self.node.name())
    }

    pub(crate) fn replace_permissions(&self, permissions: Permissions) -> Permissions {
        self.taken.store(permissions.taken.bits(), Relaxed);
        std::mem::replace(&mut *self.lock(), permissions)
    }

    fn lock(&self) -> MutexGuard<'_, Permissions> {
        self.permissions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn takes(&self, perm: Perm) -> bool {
        Perm::from_bits_truncate(self.taken.load(Relaxed)).intersects(perm)
    }

    pub(crate) fn may_write(&self) -> Result<()> {
        self.may_write_with(WriteFlags::empty())
    }

    /// Refuses a write if this user has no write permission. For a write that changes no data ([`WriteFlags::UNCHANGED`]),
    /// [`Perm::WRITE_UNCHANGED`] is enough.
    pub(crate) fn may_write_with(&self, flags: WriteFlags) -> Result<()> {
        let enough = match flags.contains(WriteFlags::UNCHANGED) {
            true => Perm::WRITE | Perm::WRITE_UNCHANGED,
            false => Perm::WRITE,
        };
        if self.takes(enough) { Ok(()) } else { Err(self.refused("write")) }
    }

    /// Refuses a write if this user has no write permission, or if the write makes the node grow and the user has no
    /// resize permission. A write within the last sector needs no resize permission, even if the node ends within this
    /// sector.
    fn may_write_to(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        self.may_write_with(flags)?;
        let size = self.node.size();
        let end = offset.saturating_add(len);
        if end > size.checked_next_multiple_of(SECTOR).unwrap_or(size) {
            self.may_resize()?;
        }
        Ok(())
    }

    fn may_resize(&self) -> Result<()> {
        if self.takes(Perm::RESIZE) {
            return Ok(());
        }
        Err(self.refused("resize"))
    }

    /// Reports a debug event of the parent: the step that begins after this call accesses the child. If the child receives no
    /// debug events, this function only tests a flag.
    pub async fn debug_event(&self, event: DebugEvent) {
        self.node.debug_event(event).await;
    }

    /// Size of the node in bytes.
    pub fn size(&self) -> u64 {
        self.node.size()
    }

    /// Reads `buf.len()` bytes at `offset`. Bytes past the end of the node read as zeroes.
    ///
    /// # Errors
    /// The errors of the driver and the host.
    pub async fn read(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        request::read_padded(&self.node, offset, buf).await
    }

    /// Reads like [`Self::read`], with flags. For [`ReadFlags::COPY_ON_READ`], the node must track its requests
    /// ([`Self::track_requests`]).
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] for a copy without permission to write unchanged data; [`ErrorKind::Invalid`] if the node does not
    /// track its requests; the errors of the driver and the host.
    pub async fn read_with(
        &self,
        offset: u64,
        buf: IoBufMut,
        flags: ReadFlags,
    ) -> Result<IoBufMut> {
        if flags.contains(ReadFlags::COPY_ON_READ) {
            self.may_write_with(WriteFlags::UNCHANGED)?;
        }
        request::read_with(&self.node, offset, buf, flags).await
    }

    /// Copies what a read with [`ReadFlags::COPY_ON_READ`] of the range would copy, without a buffer for the data.
    ///
    /// # Errors
    /// The errors of [`Self::read_with`].
    pub async fn prefetch(&self, offset: u64, len: u64) -> Result<()> {
        self.may_write_with(WriteFlags::UNCHANGED)?;
        request::prefetch(&self.node, offset, len).await
    }

    /// Makes the node track its requests until the value is dropped. Waits for the requests in flight. Do not call this within
    /// a request.
    pub async fn track_requests(&self) -> RequestTracking {
        RequestTracking::begin(&self.node).await
    }

    /// Reads like [`Self::read`], and copies data of the backing chain to the node. The parent holds a [`CopyOnRead`]
    /// ([`Self::begin_copy_on_read`]), and implements [`Driver::reads_write`](crate::Driver::reads_write). With `bottom`, a node
    /// of the chain that is no filter, only data that an image down to this node has allocated is copied.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] without permission to write unchanged data; the errors of the driver and the host.
    pub async fn read_copying(
        &self,
        offset: u64,
        buf: IoBufMut,
        bottom: Option<&Arc<Node>>,
    ) -> Result<IoBufMut> {
        self.may_write_with(WriteFlags::UNCHANGED)?;
        request::read_copying(&self.node, offset, buf, bottom).await
    }

    /// Orders changes of the node and copying reads until the value is dropped.
    pub fn begin_copy_on_read(&self) -> CopyOnRead {
        CopyOnRead::begin(&self.node)
    }

    /// Writes `data` at `offset`. A write past the end makes the node grow, if its driver allows this.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] without write permission, or past the end without resize permission;
    /// [`ErrorKind::ReadOnly`] on a read-only node; [`ErrorKind::NoSpace`] past the end of a node that does not grow;
    /// [`ErrorKind::OutOfRange`] past 2^63 - 1; [`ErrorKind::Unsupported`] for [`WriteFlags::COMPRESSED`] if the format
    /// has no compression; otherwise the errors of the driver and the host.
    pub async fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> Result<()> {
        self.may_write_to(offset, request::as_u64(data.len()), flags)?;
        request::write(&self.node, offset, data, flags).await
    }

    /// Stores a cluster that [`Compress::compress`](crate::driver::Compress::compress) has compressed.
    ///
    /// # Errors
    /// The errors of [`Self::write`], and [`ErrorKind::Unsupported`] if the format has no compression.
    pub async fn write_compressed(
        &self,
        offset: u64,
        cluster: CompressedCluster,
        flags: WriteFlags,
    ) -> Result<()> {
        self.may_write_to(offset, request::as_u64(cluster.plain.len()), flags)?;
        request::store_compressed(&self.node, offset, cluster, flags).await
    }

    /// Makes a range read as zeroes. [`ZeroFlags`] describes the flags.
    ///
    /// # Errors
    /// The errors of [`Self::write`]; `ENOTSUP` with [`ZeroFlags::NO_FALLBACK`] if the zeroes would have to be written
    /// as data.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.may_write_to(offset, len, WriteFlags::of_zero_write(flags))?;
        request::write_zeroes(&self.node, offset, len, flags).await
    }

    /// Discards a range: the caller no longer needs the contents of the range.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] without write permission; [`ErrorKind::ReadOnly`] on a read-only node;
    /// [`ErrorKind::OutOfRange`] or [`ErrorKind::NoSpace`] past the end of the node; otherwise the errors of the driver
    /// and the host.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.may_write()?;
        request::discard(&self.node, offset, len).await
    }

    /// Flushes all completed writes to stable storage.
    ///
    /// # Errors
    /// The errors of the driver and the host.
    pub async fn flush(&self) -> Result<()> {
        request::flush(&self.node).await
    }

    /// The status of the start of a range in this node alone, without its backing file.
    ///
    /// # Errors
    /// The errors of the driver and the host.
    pub async fn block_status(&self, offset: u64, len: u64, want: Want) -> Result<Status> {
        request::block_status(&self.node, offset, len, want).await
    }

    /// The status of the start of a range in this node and its backing chain.
    ///
    /// # Errors
    /// The errors of the driver and the host.
    pub async fn chain_status(&self, offset: u64, len: u64, want: Want) -> Result<Status> {
        Ok(request::status_above(&self.node, None, offset, len, want).await?.status)
    }

    /// Sets the size of the node.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] without resize permission or if the node is read-only; [`ErrorKind::Unsupported`] if the
    /// driver cannot change the size; the errors of [`crate::check_length`]; otherwise the errors of the driver and the
    /// host.
    pub async fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.may_resize()?;
        request::resize(&self.node, size, preallocation).await
    }

    /// Copies a range to another node with the host's copy offload, if both drivers support it.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] without write permission on the target; [`ErrorKind::Unsupported`] if a driver does not
    /// support copy offload or cannot map the range; otherwise the errors of the host.
    pub async fn copy_to(
        &self,
        offset: u64,
        target: &Edge,
        target_offset: u64,
        len: u64,
    ) -> Result<()> {
        target.may_write_to(target_offset, len, WriteFlags::empty())?;
        request::copy_range(&self.node, offset, &target.node, target_offset, len).await
    }
}
