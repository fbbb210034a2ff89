//! Nodes: one driver instance in the graph, shared by all I/O threads.
//!
//! A node owns its driver and its children, and knows its parents' edges. The fast path uses only fields that need no
//! lock, such as the size, the alignments and the children. The [`SlowPath`] state of a node sends requests to the slow
//! path.

mod chain;
mod slow_path;
mod tracking;
mod users;
mod write_watch;
mod writes;

use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use arc_swap::ArcSwap;
use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

use crate::bitmap::{BitmapError, BitmapList, DirtyBitmap};
use crate::blocked::Blocked;
use crate::change::ChangeLock;
use crate::control::ControlLock;
use crate::counted::AlignedWrites;
use crate::driver::{Driver, DriverFactory, DriverKind};
use crate::edge::Owner;
use crate::epoch::Epochs;
use crate::unflushed::Unflushed;
use crate::users::Users;
use crate::{ChildIdx, Children, DebugEvent, Edge, Events, Limits, OpenFlags, Options, Result};

use slow_path::SlowPath;
pub(crate) use slow_path::SlowPathFlags;
pub use tracking::RequestTracking;
use tracking::Trackers;
use write_watch::WriteWatch;

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

/// Size of a sector in bytes.
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
    trackers: Trackers,
    write_watch: WriteWatch,
    write_guard: OnceLock<WriteGuard>,
    bitmaps: BitmapList,
    // The order of these locks is in docs/architecture.md, "Locks and their order". A holder of a range in `serialise`
    // waits for the writes that `aligned_writes` counts. Therefore a counted write never waits for a range.
    pub(crate) serialise: RangeLock,
    pub(crate) aligned_writes: AlignedWrites,
    pub(crate) unflushed: Unflushed,
    pub(crate) flushing: AsyncMutex<()>,
    read_only: AtomicBool,
    settings: ArcSwap<Settings>,
    /// A parent opened this node implicitly: the node's cache mode and writability follow the parent's.
    follows_parent: AtomicBool,
    filename: Option<String>,
    control_lock: ControlLock,
    change_lock: ChangeLock,
    blocked: Blocked,
    /// A job inserted this filter, and the user does not know it.
    is_implicit: AtomicBool,
    events: Events,
}

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
    pub(crate) change_lock: ChangeLock,
    pub(crate) events: Events,
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
            trackers: Trackers::default(),
            write_watch: WriteWatch::default(),
            serialise: RangeLock::new(),
            aligned_writes: AlignedWrites::default(),
            unflushed: Unflushed::new(),
            flushing: AsyncMutex::new(()),
            read_only: AtomicBool::new(parts.settings.flags.read_only),
            settings: ArcSwap::from_pointee(parts.settings),
            follows_parent: AtomicBool::new(false),
            filename: parts.filename,
            control_lock: ControlLock::default(),
            change_lock: parts.change_lock,
            blocked: Blocked::default(),
            is_implicit: AtomicBool::new(false),
            events: parts.events,
        };
        node.refresh_limits();
        let node = Arc::new(node);
        for (child, edge) in node.children.iter() {
            edge.owned_by(Owner::Node(Arc::downgrade(&node), child));
        }
        node
    }

    /// The node-name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The operations that jobs and exports block.
    pub(crate) fn blocked(&self) -> &Blocked {
        &self.blocked
    }

    /// Marks a filter as implicit: a job has inserted it, and the user has not named it. Information for users leaves the filter
    /// out and describes the node below.
    pub fn make_implicit(&self) {
        self.is_implicit.store(true, Release);
    }

    /// Whether the filter is [implicit](Self::make_implicit).
    pub fn is_implicit(&self) -> bool {
        self.is_implicit.load(Acquire)
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

    /// The epochs in which requests to this node are counted.
    pub fn epochs(&self) -> &Arc<Epochs> {
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
        let size = whole_sectors(self.factory, size);
        let former = self.size.swap(size, AcqRel);
        self.bitmaps.resize(|| self.size());
        if size != former {
            self.report_size();
        }
    }

    /// The dirty bitmaps of this node. [`crate::Graph::add_bitmap`] adds a bitmap.
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

    /// The limits and capabilities of the driver. The memory alignment is at least that of the children.
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
        let primary = self.children.peek(ChildIdx::FILE);
        let reports = primary.as_ref().is_some_and(|edge| edge.node().takes_debug_events());
        self.slow_path.assign(SlowPathFlags::REPORTS_EVENTS, reports);
        self.slow_path.assign(SlowPathFlags::DEBUG_EVENTS, self.driver.debug_events().is_some());
        self.slow_path.assign(SlowPathFlags::ADMITS, self.driver.admission().is_some());
        self.request_alignment.store(limits.request_alignment, Relaxed);
        self.mem_alignment.store(limits.mem_alignment.max(1), Relaxed);
        *self.limits.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(limits);
    }

    /// Whether the node is read-only.
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

    /// The file name that opens this node: the name by which the node was opened, or a name that the driver or the
    /// `file` child reports.
    pub fn filename(&self) -> Option<String> {
        if let Some(name) = &self.filename {
            return Some(name.clone());
        }
        self.driver.filename().or_else(|| match self.factory.is_protocol() {
            true => None,
            false => self.child(ChildIdx::FILE)?.filename(),
        })
    }

    /// Bytes that this node and its storage occupy on the host, without the backing file. `None` if a driver does not
    /// know the number.
    pub fn allocated_size(&self) -> Option<u64> {
        if let Some(bytes) = self.driver.allocated_size() {
            return Some(bytes);
        }
        if self.factory.is_protocol() {
            return None;
        }
        let mut total: Option<u64> = None;
        // The other children of a filter, a log for example, store no data of the image.
        let is_filter = self.factory.kind() == DriverKind::Filter;
        for (child, edge) in self.children.iter() {
            if child == ChildIdx::FILE || !is_filter && child != ChildIdx::BACKING {
                let bytes = edge.node().allocated_size()?;
                total = Some(total.unwrap_or(0).saturating_add(bytes));
            }
        }
        total
    }

    /// Whether the driver receives debug events.
    pub fn takes_debug_events(&self) -> bool {
        self.has_gate(SlowPathFlags::DEBUG_EVENTS)
    }

    /// Reports a debug event of this node. If the driver receives no debug events, this function only tests a flag.
    pub(crate) async fn debug_event(&self, event: DebugEvent) {
        if self.takes_debug_events()
            && let Some(events) = self.driver.debug_events()
        {
            events.raise(event).await;
        }
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

    /// Installs a guard that checks the data of every later write, except for zero writes and compressed writes. If the
    /// node already has a guard, the new guard is ignored.
    pub(crate) fn set_write_guard(&self, guard: WriteGuard) {
        if self.write_guard.set(guard).is_ok() {
            self.set_slow_path(SlowPathFlags::WRITE_GUARD);
        }
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

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name)
            .field("driver", &self.factory.name())
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}
