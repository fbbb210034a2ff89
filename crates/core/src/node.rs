//! Nodes: one driver instance in the graph, shared by all I/O threads.
//!
//! A node owns its driver and its children, and knows its parents' edges. The fast path uses only fields that need no
//! lock, such as the size, the alignments, the children, and the [`SlowPath`] state, which sends a request to the slow
//! path.

mod slow_path;

use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use arc_swap::ArcSwap;
use oxblk_ring::perturb::point;
use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

use crate::bitmap::{BitmapError, BitmapList, DirtyBitmap};
use crate::control::ControlLock;
use crate::driver::{Driver, DriverFactory, DriverKind};
use crate::epoch::Epochs;
use crate::perm::{Perm, Permissions};
use crate::unflushed::Unflushed;
use crate::users::Users;
use crate::{
    ChildIdx, Children, Edge, Errno, Error, ErrorKind, Limits, OpenFlags, Options, Result,
};

use slow_path::SlowPath;
pub(crate) use slow_path::SlowPathFlags;

/// How `detect-zeroes` treats writes that contain only zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// Such writes stay writes of data.
    #[default]
    Off,
    /// Such writes become zero writes.
    On,
    /// Such writes become zero writes that may free the space.
    Unmap,
}

/// Smallest unit, in bytes, that a guest reads or writes.
const SECTOR: u64 = 512;

/// Checks offset and data of a write and may refuse the write.
pub(crate) type WriteGuard = Box<dyn Fn(u64, &[u8]) -> Result<()> + Send + Sync>;

/// One driver instance in the graph.
pub struct Node {
    name: String,
    factory: &'static dyn DriverFactory,
    driver: Box<dyn Driver>,
    children: Arc<Children>,
    users: Users,
    epochs: Arc<Epochs>,
    size: AtomicU64,
    limits: RwLock<Arc<Limits>>,
    request_alignment: AtomicU32,
    mem_alignment: AtomicU32,
    slow_path: SlowPath,
    write_guard: OnceLock<WriteGuard>,
    bitmaps: BitmapList,
    // The order of these locks is in docs/architecture.md, "Locks and their order". A holder of a range in `serialise`
    // waits for the writes that `aligned_writes` counts. Therefore a counted write never waits for a range.
    pub(crate) serialise: RangeLock,
    pub(crate) aligned_writes: Epochs,
    pub(crate) unflushed: Unflushed,
    pub(crate) flushing: AsyncMutex<()>,
    read_only: AtomicBool,
    settings: ArcSwap<Settings>,
    /// A parent opened this node implicitly: the node's cache mode and writability follow the parent's.
    follows_parent: AtomicBool,
    filename: Option<String>,
    control_lock: ControlLock,
    permissions_lock: PermissionsLock,
}

/// The lock that serialises changes of permissions in one graph. A change computes the permissions of a node and its
/// descendants from all their users, and then stores them and passes them to the drivers. Without the lock, an older
/// result could replace a newer one, and a driver could release a lock that a user needs. The lock is held during the
/// calls of [`Driver::set_permissions`], which do not wait for other nodes.
pub(crate) type PermissionsLock = Arc<Mutex<()>>;

/// The settings that a reopen may change.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Settings {
    pub(crate) flags: OpenFlags,
    pub(crate) detect_zeroes: DetectZeroes,
    /// The driver's own options.
    pub(crate) options: Options,
    /// The generic options as the user gave them.
    pub(crate) given: Options,
}

/// The parts that a new node consists of; see [`crate::Graph::open`].
pub(crate) struct NodeParts {
    pub(crate) name: String,
    pub(crate) factory: &'static dyn DriverFactory,
    pub(crate) driver: Box<dyn Driver>,
    pub(crate) children: Arc<Children>,
    pub(crate) epochs: Arc<Epochs>,
    pub(crate) settings: Settings,
    pub(crate) filename: Option<String>,
    pub(crate) permissions_lock: PermissionsLock,
}

impl Node {
    pub(crate) fn new(parts: NodeParts) -> Arc<Self> {
        let mut flags = SlowPathFlags::empty();
        flags.set(SlowPathFlags::DETECT_ZEROES, parts.settings.detect_zeroes != DetectZeroes::Off);
        flags.set(SlowPathFlags::COPY_ON_READ, parts.settings.flags.copy_on_read);
        let node = Self {
            size: AtomicU64::new(whole_sectors(parts.factory, parts.driver.size())),
            limits: RwLock::new(Arc::new(Limits::default())),
            request_alignment: AtomicU32::new(1),
            mem_alignment: AtomicU32::new(1),
            write_guard: OnceLock::new(),
            bitmaps: BitmapList::new(),
            name: parts.name,
            factory: parts.factory,
            driver: parts.driver,
            children: parts.children,
            users: Users::default(),
            epochs: parts.epochs,
            slow_path: SlowPath::new(flags),
            serialise: RangeLock::new(),
            aligned_writes: Epochs::default(),
            unflushed: Unflushed::new(),
            flushing: AsyncMutex::new(()),
            read_only: AtomicBool::new(parts.settings.flags.read_only),
            settings: ArcSwap::from_pointee(parts.settings),
            follows_parent: AtomicBool::new(false),
            filename: parts.filename,
            control_lock: ControlLock::default(),
            permissions_lock: parts.permissions_lock,
        };
        node.refresh_limits();
        Arc::new(node)
    }

    /// The node-name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The lock that serialises control operations on this node.
    pub(crate) fn control_lock(&self) -> &ControlLock {
        &self.control_lock
    }

    /// The driver's factory.
    pub fn factory(&self) -> &'static dyn DriverFactory {
        self.factory
    }

    /// The driver.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// The children.
    pub fn children(&self) -> &Children {
        &self.children
    }

    /// The child in a slot, as a node.
    pub fn child(&self, child: ChildIdx) -> Option<Arc<Node>> {
        self.children.get(child).map(|edge| Arc::clone(edge.node()))
    }

    /// The epoch domain that requests to this node belong to.
    pub fn epochs(&self) -> &Epochs {
        &self.epochs
    }

    /// Virtual size in bytes. The size of a format or filter node is always a multiple of the sector size, even if its
    /// file ends within a sector. The last sector is padded with zeroes and can be written.
    pub fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    /// Records that the node has become at least `end` bytes long.
    pub(crate) fn grow_to(&self, end: u64) {
        let end = whole_sectors(self.factory, end);
        if self.size.fetch_max(end, AcqRel) < end {
            self.bitmaps.resize(|| self.size());
        }
    }

    pub(crate) fn set_size(&self, size: u64) {
        self.size.store(whole_sectors(self.factory, size), Release);
        self.bitmaps.resize(|| self.size());
    }

    /// The dirty bitmaps of this node. [`crate::Graph::add_bitmap`] adds one.
    pub fn bitmaps(&self) -> &BitmapList {
        &self.bitmaps
    }

    /// Attaches the bitmaps that the image stores, before the node accepts requests.
    pub(crate) fn adopt_bitmaps(&self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<()> {
        if !bitmaps.is_empty() {
            self.bitmaps.insert(bitmaps, |recording| self.record_in_bitmaps(recording))?;
        }
        Ok(())
    }

    /// Adds a bitmap. The caller has exclusive use of the node.
    pub(crate) fn insert_bitmap(&self, bitmap: &Arc<DirtyBitmap>) -> Result<(), BitmapError> {
        let new = std::slice::from_ref(bitmap);
        self.bitmaps.insert(new, |recording| self.record_in_bitmaps(recording))?;
        // The node may have grown before the bitmap was in the node's list.
        self.bitmaps.resize(|| self.size());
        Ok(())
    }

    /// Removes a bitmap; other bitmaps continue to record. The caller has exclusive use of the node.
    pub(crate) fn remove_bitmap(&self, bitmap: &Arc<DirtyBitmap>) {
        self.bitmaps.remove(bitmap, |recording| self.record_in_bitmaps(recording));
    }

    fn record_in_bitmaps(&self, recording: bool) {
        if recording {
            self.set_slow_path(SlowPathFlags::BITMAPS);
        } else {
            self.clear_slow_path(SlowPathFlags::BITMAPS);
        }
    }

    /// Records a write, a zero write or a discard in the bitmaps. The caller has already updated the node's size.
    pub(crate) fn mark_dirty(&self, offset: u64, len: u64) {
        if self.has_gate(SlowPathFlags::BITMAPS) {
            self.bitmaps.mark(offset, len);
        }
    }

    /// Limits and capabilities. The memory alignment includes that of the children.
    pub fn limits(&self) -> Arc<Limits> {
        Arc::clone(&self.limits.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Alignment of requests in bytes.
    pub(crate) fn request_alignment(&self) -> u32 {
        self.request_alignment.load(Relaxed)
    }

    /// Queries the driver's limits again.
    pub fn refresh_limits(&self) {
        let mut limits = self.driver.limits();
        if limits.request_alignment == 0 || !limits.request_alignment.is_power_of_two() {
            limits.request_alignment = 1;
        }
        for (_, edge) in self.children.iter() {
            let child = edge.node().limits();
            limits.mem_alignment = limits.mem_alignment.max(child.mem_alignment);
        }
        self.request_alignment.store(limits.request_alignment, Relaxed);
        self.mem_alignment.store(limits.mem_alignment.max(1), Relaxed);
        *self.limits.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(limits);
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Relaxed)
    }

    /// The setting of `detect-zeroes`.
    pub fn detect_zeroes(&self) -> DetectZeroes {
        self.settings.load().detect_zeroes
    }

    /// The flags of the last open or reopen of this node.
    pub fn flags(&self) -> OpenFlags {
        self.settings.load().flags.clone()
    }

    /// Whether discards may free space (`discard=unmap`).
    pub(crate) fn unmaps(&self) -> bool {
        self.settings.load().flags.unmap
    }

    /// The driver's options of the last open or reopen of this node.
    pub fn options(&self) -> Options {
        self.settings.load().options.clone()
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings::clone(&self.settings.load())
    }

    /// Puts new settings into effect. Call this only while the node accepts no requests.
    pub(crate) fn apply(&self, settings: Settings) {
        self.set_read_only(settings.flags.read_only);
        if settings.detect_zeroes == DetectZeroes::Off {
            self.clear_slow_path(SlowPathFlags::DETECT_ZEROES);
        } else {
            self.set_slow_path(SlowPathFlags::DETECT_ZEROES);
        }
        self.settings.store(Arc::new(settings));
        self.refresh_limits();
        self.set_size(self.driver.size());
    }

    pub(crate) fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Release);
    }

    /// Records that a parent opened this node implicitly.
    pub(crate) fn follow_parent(&self) {
        self.follows_parent.store(true, Release);
    }

    pub(crate) fn follows_parent(&self) -> bool {
        self.follows_parent.load(Acquire)
    }

    /// The file name that opens this node: the name that it was opened by, or a name that the protocol reports.
    pub fn filename(&self) -> Option<String> {
        if let Some(name) = &self.filename {
            return Some(name.clone());
        }
        self.driver.filename().or_else(|| match self.factory.kind() {
            DriverKind::Protocol => None,
            DriverKind::Format | DriverKind::Filter => self.child(ChildIdx::FILE)?.filename(),
        })
    }

    /// Bytes that this node and its storage occupy on the host, without its backing file.
    pub fn allocated_size(&self) -> Option<u64> {
        if let Some(bytes) = self.driver.allocated_size() {
            return Some(bytes);
        }
        let mut total: Option<u64> = None;
        for (child, edge) in self.children.iter() {
            if child != ChildIdx::BACKING {
                let bytes = edge.node().allocated_size()?;
                total = Some(total.unwrap_or(0).saturating_add(bytes));
            }
        }
        total
    }

    pub(crate) fn gated(&self) -> bool {
        self.slow_path.is_needed()
    }

    pub(crate) fn has_gate(&self, gate: SlowPathFlags) -> bool {
        self.slow_path.has(gate)
    }

    pub(crate) fn set_slow_path(&self, gate: SlowPathFlags) {
        self.slow_path.set(gate);
    }

    pub(crate) fn clear_slow_path(&self, gate: SlowPathFlags) {
        self.slow_path.clear(gate);
    }

    /// Counts a read-modify-write or copy-on-read in progress; see the module `request::align`.
    pub(crate) fn begin_serialising(&self) {
        self.slow_path.begin_serialising();
    }

    pub(crate) fn end_serialising(&self) {
        self.slow_path.end_serialising();
    }

    pub(crate) fn is_serialising(&self) -> bool {
        self.slow_path.is_serialising()
    }

    /// Records that a write has completed, so that the next flush has data to flush.
    pub(crate) fn mark_unflushed(&self) {
        self.unflushed.mark();
    }

    /// Alignment of memory in bytes.
    pub(crate) fn mem_alignment(&self) -> u32 {
        self.mem_alignment.load(Relaxed)
    }

    /// Refuses a write that would make a probed raw image look like an image of another format.
    pub(crate) fn guard_write(&self, offset: u64, data: &[u8]) -> Result<()> {
        match self.write_guard.get() {
            Some(guard) => guard(offset, data),
            None => Ok(()),
        }
    }

    /// Installs a guard that checks every write after this call.
    pub(crate) fn set_write_guard(&self, guard: WriteGuard) {
        if self.write_guard.set(guard).is_ok() {
            self.set_slow_path(SlowPathFlags::WRITE_GUARD);
        }
    }

    /// Whether this node has parents.
    pub fn has_parents(&self) -> bool {
        self.users.has_edges()
    }

    /// The edges of this node's parents.
    pub fn parents(&self) -> Vec<Arc<Edge>> {
        self.users.edges()
    }

    /// The users of this node.
    pub(crate) fn users(&self) -> &Users {
        &self.users
    }

    pub(crate) fn add_parent(&self, edge: &Arc<Edge>) -> Result<()> {
        let permissions = edge.permissions();
        if self.is_read_only() && permissions.taken.contains(Perm::WRITE) {
            return Err(Error::new(ErrorKind::Denied, "Block node is read-only").errno(Errno::PERM));
        }
        let changing = self.lock_permissions();
        self.users.add(edge).map_err(|error| error.on_node(&self.name))?;
        if let Err(error) = self.refresh_with(&changing) {
            self.users.remove(edge);
            self.restore_with(&changing);
            return Err(error);
        }
        Ok(())
    }

    pub(crate) fn remove_parent(&self, edge: &Edge) {
        let changing = self.lock_permissions();
        self.users.remove(edge);
        // Releasing permissions cannot conflict. If the update fails, the host keeps a lock that should be released,
        // and the log reports this.
        if let Err(error) = self.refresh_with(&changing) {
            tracing::warn!(node = self.name, %error, "cannot release permissions");
        }
    }

    /// Changes the permissions of `edge`, through which a parent uses this node.
    pub(crate) fn change_parent(&self, edge: &Edge, permissions: Permissions) -> Result<()> {
        let changing = self.lock_permissions();
        let before = edge.replace_permissions(permissions);
        if let Err(error) = self.refresh_with(&changing) {
            edge.replace_permissions(before);
            self.restore_with(&changing);
            return Err(error);
        }
        Ok(())
    }

    fn lock_permissions(&self) -> MutexGuard<'_, ()> {
        self.permissions_lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Updates the permissions after a change was undone. The permissions were valid before the change, so they cannot
    /// conflict now.
    fn restore_with(&self, changing: &MutexGuard<'_, ()>) {
        if let Err(error) = self.refresh_with(changing) {
            tracing::warn!(node = self.name, %error, "cannot restore permissions");
        }
    }

    /// The permissions that all users together take and share.
    pub(crate) fn cumulative(&self) -> Permissions {
        self.parents().iter().fold(Permissions::NONE, |all, edge| all.and(edge.permissions()))
    }

    fn check_conflicts(&self) -> Result<()> {
        let parents = self.parents();
        for taker in &parents {
            for sharer in parents.iter().filter(|other| !Arc::ptr_eq(other, taker)) {
                let refused = taker.permissions().taken - sharer.permissions().shared;
                if !refused.is_empty() {
                    return Err(conflict(&self.name, refused, taker, sharer));
                }
            }
        }
        Ok(())
    }

    /// Returns the permissions that this node needs on its children for its current users. Before that, the users are
    /// checked for conflicts.
    fn children_permissions(&self) -> Result<Vec<(Arc<Edge>, Permissions)>> {
        self.check_conflicts()?;
        let ours = self.cumulative();
        ours.check_size(self.size(), self.request_alignment())
            .map_err(|error| error.on_node(&self.name))?;
        let wanted = |(child, edge): (ChildIdx, Arc<Edge>)| {
            let wanted = self.driver.child_permissions(child, ours).unwrap_or_else(|| {
                let kind = self.factory.kind();
                Permissions::for_child(kind, child.role(), ours, !self.is_read_only())
            });
            (edge, wanted)
        };
        Ok(self.children.iter().map(wanted).collect())
    }

    /// Passes the permissions to the driver, which takes or releases the locks that exclude other processes.
    fn hand_permissions_to_driver(&self) -> Result<()> {
        if self.settings.load().flags.force_share {
            return Ok(());
        }
        let permissions = self.cumulative();
        point();
        self.driver.set_permissions(permissions)
    }

    /// Updates the permissions on all nodes below, and the driver's permissions, to match the permissions of this
    /// node's users.
    pub(crate) fn refresh_permissions(&self) -> Result<()> {
        self.refresh_with(&self.lock_permissions())
    }

    /// Like [`Self::refresh_permissions`], for a holder of the permissions lock. The function is iterative, because a
    /// chain may be long. It updates edges from the top down and drivers from the bottom up.
    fn refresh_with(&self, _changing: &MutexGuard<'_, ()>) -> Result<()> {
        let mut changed: Vec<(Arc<Edge>, Permissions)> = Vec::new();
        let mut drivers = 0_usize;
        let outcome = (|| {
            let mut at = 0_usize;
            let mut children = self.children_permissions()?;
            loop {
                for (edge, wanted) in children {
                    if wanted != edge.permissions() {
                        let before = edge.replace_permissions(wanted);
                        changed.push((edge, before));
                    }
                }
                let Some((edge, _)) = changed.get(at) else { break };
                at += 1;
                children = edge.node().children_permissions()?;
            }
            for (edge, _) in changed.iter().rev() {
                drivers += 1;
                edge.node().hand_permissions_to_driver()?;
            }
            self.hand_permissions_to_driver()
        })();
        if outcome.is_err() {
            for (edge, before) in changed.iter().rev() {
                edge.replace_permissions(*before);
            }
            for (edge, _) in changed.iter().rev().take(drivers) {
                if let Err(error) = edge.node().hand_permissions_to_driver() {
                    tracing::warn!(%error, "cannot restore permissions");
                }
            }
        }
        outcome
    }
}

impl Drop for Node {
    /// Drops the nodes below that have no other user, one after the other. Nested drops would overflow the stack on a
    /// long chain.
    fn drop(&mut self) {
        let mut edges: Vec<Arc<Edge>> = self.children.take();
        while let Some(edge) = edges.pop() {
            if let Some(node) = Arc::into_inner(edge).and_then(Edge::into_node) {
                edges.extend(node.children.take());
            }
        }
    }
}

fn whole_sectors(factory: &dyn DriverFactory, size: u64) -> u64 {
    match factory.kind() {
        // A protocol node reports the exact size in bytes: a file may end anywhere.
        DriverKind::Protocol => size,
        DriverKind::Format | DriverKind::Filter => {
            size.checked_next_multiple_of(SECTOR).unwrap_or(size)
        }
    }
}

fn conflict(node: &str, refused: Perm, taker: &Edge, sharer: &Edge) -> Error {
    let text = format!(
        "Permission conflict on node '{node}': permissions '{}' are both required by {} (uses node \
         '{node}' as '{}' child) and unshared by {} (uses node '{node}' as '{}' child).",
        refused.names(),
        taker.user(),
        taker.name(),
        sharer.user(),
        sharer.name(),
    );
    Error::new(ErrorKind::Denied, text).on_node(node)
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name)
            .field("driver", &self.factory.name())
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}
