//! Nodes: one driver instance in the graph, shared by all I/O threads.
//!
//! A node owns its driver and its children, knows its parents' edges, and keeps what the request path
//! needs at hand without a lock: size, limits, and the [`SlowPathFlags`] that take a request off the fast path.
//! Everything here that is not an atomic is control-plane state.

use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use arc_swap::ArcSwap;
use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

use crate::bitmap::{BitmapList, DirtyBitmap};
use crate::control::ControlLock;
use crate::driver::{Driver, DriverFactory, DriverKind};
use crate::epoch::Epochs;
use crate::perm::{Perm, Permissions};
use crate::unflushed::Unflushed;
use crate::users::Users;
use crate::{
    ChildIdx, Children, Edge, Errno, Error, ErrorKind, Limits, OpenFlags, Options, Result,
};

bitflags::bitflags! {
    /// Reasons why a request must take the slow path of a node.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct SlowPathFlags: u32 {
        /// Writes are turned into zero writes where they are zero.
        const DETECT_ZEROES = 1;
        /// A guard looks at what is written (probed raw images).
        const WRITE_GUARD = 4;
        /// Dirty bitmaps follow the writes.
        const BITMAPS = 8;
        /// Reads keep what they fetch from the backing file.
        const COPY_ON_READ = 16;
    }
}

/// What `detect-zeroes` makes of writes that are all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// Write them as data.
    #[default]
    Off,
    /// Write them as zeroes.
    On,
    /// Write them as zeroes and give the space back.
    Unmap,
}

/// Bytes that guests see as one.
const SECTOR: u64 = 512;

/// One read-modify-write or copy-on-read in the count that shares a word with the gates.
const SERIALISING: u32 = 1 << 16;

/// Looks at offset and data of a write and may refuse it.
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
    gates: AtomicU32,
    write_guard: OnceLock<WriteGuard>,
    bitmaps: BitmapList,
    // What is waited for while what is held: see "Locks and their order" in docs/architecture.md. A holder of a range
    // waits for counted writes; so nobody waits for a range who is counted.
    pub(crate) serialise: RangeLock,
    pub(crate) aligned_writes: Epochs,
    pub(crate) unflushed: Unflushed,
    pub(crate) flushing: AsyncMutex<()>,
    read_only: AtomicBool,
    settings: ArcSwap<Settings>,
    /// A parent made it for itself: its cache mode and writability follow the parent's.
    follows_parent: AtomicBool,
    filename: Option<String>,
    control_lock: ControlLock,
}

/// What a reopen may change.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Settings {
    pub(crate) flags: OpenFlags,
    pub(crate) detect_zeroes: DetectZeroes,
    /// The driver's own options.
    pub(crate) options: Options,
    /// The generic options that were given, as they were.
    pub(crate) given: Options,
}

/// What a node is made of; see [`crate::Graph::open`].
pub(crate) struct NodeParts {
    pub(crate) name: String,
    pub(crate) factory: &'static dyn DriverFactory,
    pub(crate) driver: Box<dyn Driver>,
    pub(crate) children: Arc<Children>,
    pub(crate) epochs: Arc<Epochs>,
    pub(crate) settings: Settings,
    pub(crate) filename: Option<String>,
}

impl Node {
    pub(crate) fn new(parts: NodeParts) -> Arc<Self> {
        let mut gates = SlowPathFlags::empty();
        gates.set(SlowPathFlags::DETECT_ZEROES, parts.settings.detect_zeroes != DetectZeroes::Off);
        gates.set(SlowPathFlags::COPY_ON_READ, parts.settings.flags.copy_on_read);
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
            gates: AtomicU32::new(gates.bits()),
            serialise: RangeLock::new(),
            aligned_writes: Epochs::default(),
            unflushed: Unflushed::new(),
            flushing: AsyncMutex::new(()),
            read_only: AtomicBool::new(parts.settings.flags.read_only),
            settings: ArcSwap::from_pointee(parts.settings),
            follows_parent: AtomicBool::new(false),
            filename: parts.filename,
            control_lock: ControlLock::default(),
        };
        node.refresh_limits();
        Arc::new(node)
    }

    /// The node-name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who changes it next.
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

    /// The epoch domain that its requests belong to.
    pub fn epochs(&self) -> &Epochs {
        &self.epochs
    }

    /// Virtual size in bytes. A disk image is whole sectors long, whatever the size of what stores it: its last sector is
    /// completed with zeroes, and can be written.
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

    /// Its dirty bitmaps. [`crate::Graph::add_bitmap`] adds one.
    pub fn bitmaps(&self) -> &BitmapList {
        &self.bitmaps
    }

    /// Gives it the bitmaps that its image holds, before it takes requests.
    pub(crate) fn adopt_bitmaps(&self, bitmaps: Vec<Arc<DirtyBitmap>>) -> Result<()> {
        if !bitmaps.is_empty() {
            self.bitmaps.insert_all(bitmaps)?;
            self.set_slow_path(SlowPathFlags::BITMAPS);
        }
        Ok(())
    }

    /// Records a write, a zero write or a discard in the bitmaps, after the node's size has followed it.
    pub(crate) fn mark_dirty(&self, offset: u64, len: u64) {
        if self.has_gate(SlowPathFlags::BITMAPS) {
            self.bitmaps.mark(offset, len);
        }
    }

    /// Limits and capabilities, children's limits included.
    pub fn limits(&self) -> Arc<Limits> {
        Arc::clone(&self.limits.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Alignment of requests in bytes.
    pub(crate) fn request_alignment(&self) -> u32 {
        self.request_alignment.load(Relaxed)
    }

    /// Asks the driver for its limits again.
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

    /// What `detect-zeroes` is set to.
    pub fn detect_zeroes(&self) -> DetectZeroes {
        self.settings.load().detect_zeroes
    }

    /// The flags it was opened with, or reopened with last.
    pub fn flags(&self) -> OpenFlags {
        self.settings.load().flags.clone()
    }

    /// Whether space may be given back (`discard=unmap`).
    pub(crate) fn unmaps(&self) -> bool {
        self.settings.load().flags.unmap
    }

    /// The driver's options it was opened with, or reopened with last.
    pub fn options(&self) -> Options {
        self.settings.load().options.clone()
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings::clone(&self.settings.load())
    }

    /// Makes new settings valid. Only while the node takes no requests.
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

    /// Notes that a parent opened it for itself.
    pub(crate) fn follow_parent(&self) {
        self.follows_parent.store(true, Release);
    }

    pub(crate) fn follows_parent(&self) -> bool {
        self.follows_parent.load(Acquire)
    }

    /// The file name that opens it, where it was opened by one or the protocol knows one.
    pub fn filename(&self) -> Option<String> {
        if let Some(name) = &self.filename {
            return Some(name.clone());
        }
        self.driver.filename().or_else(|| match self.factory.kind() {
            DriverKind::Protocol => None,
            DriverKind::Format | DriverKind::Filter => self.child(ChildIdx::FILE)?.filename(),
        })
    }

    /// Bytes occupied on the host by this node and what stores it (not its backing file).
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
        self.gates.load(SeqCst) != 0
    }

    pub(crate) fn has_gate(&self, gate: SlowPathFlags) -> bool {
        self.gates.load(Acquire) & gate.bits() != 0
    }

    pub(crate) fn set_slow_path(&self, gate: SlowPathFlags) {
        self.gates.fetch_or(gate.bits(), AcqRel);
    }

    pub(crate) fn clear_slow_path(&self, gate: SlowPathFlags) {
        self.gates.fetch_and(!gate.bits(), AcqRel);
    }

    /// Counts a request that begins and lets no others change its range; see [`crate::request`].
    pub(crate) fn begin_serialising(&self) {
        self.gates.fetch_add(SERIALISING, SeqCst);
    }

    pub(crate) fn end_serialising(&self) {
        self.gates.fetch_sub(SERIALISING, SeqCst);
    }

    pub(crate) fn is_serialising(&self) -> bool {
        self.gates.load(SeqCst) >= SERIALISING
    }

    /// Notes that a write has completed, so that there is something to flush.
    pub(crate) fn mark_unflushed(&self) {
        self.unflushed.mark();
    }

    /// Alignment of memory in bytes.
    pub(crate) fn mem_alignment(&self) -> u32 {
        self.mem_alignment.load(Relaxed)
    }

    /// Refuses a write through this node that would make its probed raw image look like another format.
    pub(crate) fn guard_write(&self, offset: u64, data: &[u8]) -> Result<()> {
        match self.write_guard.get() {
            Some(guard) => guard(offset, data),
            None => Ok(()),
        }
    }

    /// Looks at every write from now on.
    pub(crate) fn set_write_guard(&self, guard: WriteGuard) {
        if self.write_guard.set(guard).is_ok() {
            self.set_slow_path(SlowPathFlags::WRITE_GUARD);
        }
    }

    /// Whether it has parents.
    pub fn has_parents(&self) -> bool {
        self.users.has_edges()
    }

    /// The edges of its parents.
    pub fn parents(&self) -> Vec<Arc<Edge>> {
        self.users.edges()
    }

    /// Who uses it.
    pub(crate) fn users(&self) -> &Users {
        &self.users
    }

    pub(crate) fn add_parent(&self, edge: &Arc<Edge>) -> Result<()> {
        let permissions = edge.permissions();
        if self.is_read_only() && permissions.taken.contains(Perm::WRITE) {
            return Err(Error::new(ErrorKind::Denied, "Block node is read-only").errno(Errno::PERM));
        }
        self.users.add(edge).map_err(|error| error.on_node(&self.name))?;
        if let Err(error) = self.refresh_permissions() {
            self.remove_parent(edge);
            return Err(error);
        }
        Ok(())
    }

    pub(crate) fn remove_parent(&self, edge: &Edge) {
        self.users.remove(edge);
        // Asking for less cannot conflict; that the host keeps a lock which it should give back is worth knowing.
        if let Err(error) = self.refresh_permissions() {
            tracing::warn!(node = self.name, %error, "cannot give permissions back");
        }
    }

    /// What all users together take and share.
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

    /// What its children are to be used with, as its parents use it. Checks its own users on the way.
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

    /// Has the driver take or give back what keeps other processes out.
    fn hand_permissions_to_driver(&self) -> Result<()> {
        if self.settings.load().flags.force_share {
            return Ok(());
        }
        self.driver.set_permissions(self.cumulative())
    }

    /// Brings the permissions of all that is below in line with what the parents ask for. No recursion: a chain may
    /// be long. Edges change from the top down, drivers from the bottom up.
    pub(crate) fn refresh_permissions(&self) -> Result<()> {
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
                    tracing::warn!(%error, "cannot put permissions back");
                }
            }
        }
        outcome
    }
}

impl Drop for Node {
    /// Children that nobody else uses go one after the other, not each within the one above.
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
        // Its bytes are what they are: an image may end anywhere.
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
