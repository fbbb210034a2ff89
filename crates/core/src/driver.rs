//! The interface that formats, protocols and filters implement for the graph.
//!
//! A [`DriverFactory`] knows the driver's name and options, and opens and creates images. The factory makes one
//! [`Driver`] for each node. A driver holds no reference to its node. The driver receives its [`Children`] and sends
//! requests to them through [`Edge`](crate::Edge)s; these requests take the same path as the requests of other parents.
//!
//! A feature that only some drivers have is a capability: a small trait. A method of [`Driver`] returns the trait
//! object as an `Option`. The caller checks the `Option` before it uses the feature, so no trait needs a default method
//! that panics.
//!
//! Reads, writes, zero writes and discards that reach a driver are aligned to the driver's [`Limits`] (a discard may
//! instead end at the end of the node), and are no longer than these limits allow. The requests lie inside the node,
//! with two exceptions: a write may reach past the end of a node that [grows](Limits::grows), and the last aligned
//! block may reach past the end. All I/O threads may call a driver concurrently.

use std::future::Future;
use std::pin::Pin;

use oxblk_ring::{File, IoBuf, IoBufMut};
use serde_json::Value;

use crate::bitmap::PersistentBitmaps;
use crate::check::Check;
use crate::create::{CreateOption, CreateRequest, CreatedFile, Measure, MeasureRequest};
use crate::{
    ChildIdx, ChildSpec, Children, Graph, Limits, OpenContext, Options, Permissions, Result, Roles,
    Status, WriteFlags, ZeroFlags,
};

mod capabilities;

pub use capabilities::{Backing, Compress, CopyRange, Drain, Reopen, Resize};

/// A boxed future bound to its I/O thread.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// The operation for which [`Driver::map`] looks up a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapOp {
    /// The caller reads the range.
    Read,
    /// The caller writes the range in place. The driver maps only data that this node has allocated and that no
    /// internal snapshot shares.
    Write,
}

/// The result of [`Driver::map`]: the location of the start of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A child contains the data of the range unchanged. Bytes past the child's end read as zeroes.
    Forward {
        /// The child.
        child: ChildIdx,
        /// Byte offset in the child.
        offset: u64,
        /// Number of bytes covered, at least 1. This number may be larger than the number that the caller requested.
        len: u64,
    },
    /// The range reads as zeroes. Only for [`MapOp::Read`].
    Zero {
        /// Number of bytes covered, at least 1.
        len: u64,
    },
    /// The range lies in the file that [`Driver::host_file`] returns (leaf drivers).
    Host {
        /// Byte offset in that file.
        offset: u64,
        /// Number of bytes covered, at least 1.
        len: u64,
    },
    /// The driver cannot map the range, because metadata is not loaded, or because the data must be converted, for
    /// example. The caller uses the asynchronous request functions.
    Slow,
}

/// The file behind [`Step::Host`]. The caller keeps this reference only until an operation has been submitted. The
/// operation itself keeps the file open.
pub enum HostFile<'a> {
    /// The file stays the same for as long as the driver lives.
    Fixed(&'a File),
    /// The file that is current now. A reopen may replace it.
    Current(arc_swap::Guard<std::sync::Arc<File>>),
}

impl std::ops::Deref for HostFile<'_> {
    type Target = File;

    fn deref(&self) -> &File {
        match self {
            Self::Fixed(file) => file,
            Self::Current(file) => file,
        }
    }
}

/// The precision that a caller of [`Driver::block_status`] needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// All flags and offsets, even if this costs a system call.
    Precise,
    /// Only whether this node has allocated the range.
    Allocation,
}

/// Properties of an image that a driver reports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageInfo {
    /// Cluster size in bytes, or 0 if the format has no clusters.
    pub cluster_size: u64,
    /// The tools show the properties even if all of them have their default values, as QEMU's tools do for this format.
    pub is_always_shown: bool,
    /// The image was not closed cleanly.
    pub is_dirty: bool,
    /// The image is marked corrupt.
    pub is_corrupt: bool,
    /// Guest data is stored encrypted.
    pub is_encrypted: bool,
    /// Byte offset at which VM state is stored, or 0.
    pub vm_state_offset: u64,
    /// Backing file name as stored in the image.
    pub backing_filename: Option<String>,
    /// Backing format as stored in the image.
    pub backing_format: Option<String>,
    /// The driver can write compressed clusters.
    pub can_compress: bool,
    /// Driver-specific part of `info`, as QAPI's `ImageInfoSpecific` (`{"type": …, "data": …}`).
    pub specific: Option<Value>,
}

/// One open instance of a format, a protocol or a filter.
pub trait Driver: Send + Sync + 'static {
    /// Looks up the location of the start of a range; see [`Step`]. An implementation does no I/O, takes no lock and
    /// allocates no memory.
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        let _ = (op, offset, len);
        Step::Slow
    }

    /// The host file behind [`Step::Host`]. `None`: the driver never returns [`Step::Host`].
    fn host_file(&self) -> Option<HostFile<'_>> {
        None
    }

    /// Loads the metadata that [`Self::map`] needs for the start of a range. `None`: there is no metadata to load, and
    /// the caller uses [`Self::read`] after a [`Step::Slow`].
    fn load_map(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        let _ = (offset, len);
        None
    }

    /// Reads `buf.len()` bytes at `offset` into `buf`, and returns `buf`.
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>>;

    /// Writes all of `data` at `offset`. `flags` contains [`WriteFlags::FUA`] only if [`Limits::write_flags`] declares it, and
    /// may contain [`WriteFlags::UNCHANGED`], which a filter passes on because the user above may have no other permission.
    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>>;

    /// Makes a range read as zeroes. Of the optional flags, `flags` has only those that [`Limits::zero_flags`] declares. A filter
    /// passes all flags on.
    /// `None`: the driver does not support zero writes. In this case, and if the future returns
    /// [`crate::ErrorKind::Unsupported`], the request path writes zeroes as data, unless the request has
    /// [`ZeroFlags::NO_FALLBACK`].
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        let _ = (offset, len, flags);
        None
    }

    /// Informs the driver that the contents of a range are no longer needed. The start of the range is aligned. The end
    /// of the range is aligned, or is the end of the node. `None`: the driver ignores discards.
    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        let _ = (offset, len);
        None
    }

    /// Flushes all completed writes to stable storage. `None`: a flush of the children is enough.
    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        None
    }

    /// The status of the start of a range. `None`: the complete range is data at the same offset of the primary child.
    fn block_status(
        &self,
        offset: u64,
        len: u64,
        want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        let _ = (offset, len, want);
        None
    }

    /// Whether reads may write to a child (copy-on-read). Such reads run to their end even if their future is dropped.
    fn reads_write(&self) -> bool {
        false
    }

    /// Virtual size in bytes. This function does not query the host.
    fn size(&self) -> u64;

    /// Queries the host or the child for the size again. A driver whose size follows the size of a file implements this
    /// function.
    fn refresh_size(&self) -> Option<BoxFuture<'_, Result<u64>>> {
        None
    }

    /// A child, or a node below it, will be replaced. The driver gives up what only it knows about the contents of the child: for
    /// example, it cuts off preallocated space. No request is in flight.
    ///
    /// # Errors
    /// The errors of the child. Then nothing is replaced.
    fn before_below_changes(&self) -> Option<BoxFuture<'_, Result<()>>> {
        None
    }

    /// A child, or a node below it, was replaced or reopened. It may have another size now, or other limits
    /// ([`Limits::grows`]). The driver forgets what it has derived from them. No request is in flight. The sizes and limits of
    /// the children are up to date.
    fn below_changed(&self) {}

    /// Limits and capabilities. The node raises the memory alignment to that of its children.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Returns the properties of the image.
    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    /// Bytes that the image occupies on the host, if the driver itself knows this number (protocols).
    fn allocated_size(&self) -> Option<u64> {
        None
    }

    /// The name that opens this node again, if there is one (protocols: the file name).
    fn filename(&self) -> Option<String> {
        None
    }

    /// Permissions that this driver needs on a child when the node's own parents have the permissions `parents` on the
    /// node. `None`: the default of formats and filters (see [`Permissions::for_child`]).
    fn child_permissions(&self, child: ChildIdx, parents: Permissions) -> Option<Permissions> {
        let _ = (child, parents);
        None
    }

    /// Prepares new cumulative permissions: `permissions` is the union of what the parents take and the intersection of
    /// what the parents share. A protocol takes the file locks that these permissions need, and keeps the locks that the
    /// current permissions need. [`Self::commit_permissions`] or [`Self::abort_permissions`] follows. After an error, the
    /// driver holds the same locks as before the call.
    ///
    /// # Errors
    /// When another process holds a conflicting lock.
    fn prepare_permissions(&self, permissions: Permissions) -> Result<()> {
        let _ = permissions;
        Ok(())
    }

    /// Applies `permissions`: a protocol releases the file locks that they do not need. Permissions that need locks which
    /// the driver does not hold were prepared before.
    fn commit_permissions(&self, permissions: Permissions) {
        let _ = permissions;
    }

    /// Undoes [`Self::prepare_permissions`]: a protocol releases the file locks that the current permissions do not need.
    fn abort_permissions(&self) {}

    /// Writes back cached metadata and releases resources. No request follows.
    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        None
    }

    /// The capability to see each request before it passes the node. The node queries the capability when it queries the
    /// limits.
    fn admission(&self) -> Option<&dyn crate::Admission> {
        None
    }

    /// The capability to let requests pass that wait in the driver, for a drain.
    fn drain(&self) -> Option<&dyn Drain> {
        None
    }

    /// The capability to change the size.
    fn resize(&self) -> Option<&dyn Resize> {
        None
    }

    /// The capability to reopen with other options.
    fn reopen(&self) -> Option<&dyn Reopen> {
        None
    }

    /// The capability to copy between host files without passing the data through memory.
    fn copy_range(&self) -> Option<&dyn CopyRange> {
        None
    }

    /// The capability to write compressed clusters.
    fn compress(&self) -> Option<&dyn Compress> {
        None
    }

    /// The capability to change the backing file name that the image stores, and to empty the image.
    fn backing(&self) -> Option<&dyn Backing> {
        None
    }

    /// The capability to change options of the image.
    fn amend(&self) -> Option<&dyn crate::amend::Amend> {
        None
    }

    /// The capability to take and use internal snapshots.
    fn snapshots(&self) -> Option<&dyn crate::snapshot::Snapshots> {
        None
    }

    /// The capability to show the disk as it was at an earlier point in time.
    fn snapshot_access(&self) -> Option<&dyn crate::SnapshotAccess> {
        None
    }

    /// The capability to take part in a replication.
    fn replication(&self) -> Option<&dyn crate::Replication> {
        None
    }

    /// The capability to store dirty bitmaps in the image.
    fn persistent_bitmaps(&self) -> Option<&dyn PersistentBitmaps> {
        None
    }

    /// The capability to return unused space to the host without copying the image.
    fn compact(&self) -> Option<&dyn crate::compact::Compact> {
        None
    }

    /// The capability to store VM state.
    fn vm_state(&self) -> Option<&dyn crate::vm_state::VmState> {
        None
    }

    /// The capability to react to debug events. The node queries the capability when it queries the limits.
    fn debug_events(&self) -> Option<&dyn crate::DebugEvents> {
        None
    }

    /// The capability to suspend requests at debug events.
    fn breakpoints(&self) -> Option<&dyn crate::Breakpoints> {
        None
    }

    /// The capability to add and remove children while the node is used.
    fn child_list(&self) -> Option<&dyn crate::ChildList> {
        None
    }

    /// The capability to check the consistency of the image.
    fn check(&self) -> Option<&dyn Check> {
        None
    }
}

/// How the new space of a resized or new image is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Allocate nothing.
    #[default]
    Off,
    /// Allocate metadata only.
    Metadata,
    /// Reserve space with `fallocate`.
    Falloc,
    /// Write zeroes to the new space.
    Full,
}

impl Preallocation {
    /// Parses QEMU's names (`off`, `metadata`, `falloc`, `full`).
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "off" => Some(Self::Off),
            "metadata" => Some(Self::Metadata),
            "falloc" => Some(Self::Falloc),
            "full" => Some(Self::Full),
            _ => None,
        }
    }

    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

/// The category of a driver. The category determines the default children and permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverKind {
    /// Accesses the host or the network; has no `file` child.
    Protocol,
    /// Interprets the contents of its `file` child.
    Format,
    /// Forwards requests to its `file` child and does not change the layout of the data.
    Filter,
}

/// A type of driver. The table of drivers contains one static instance of each.
pub trait DriverFactory: Send + Sync + 'static {
    /// The name in `driver=` and `-f`.
    fn name(&self) -> &'static str;

    /// The category of the driver.
    fn kind(&self) -> DriverKind;

    /// Whether a file name can select the driver, as it selects a protocol. Such a driver [opens its children
    /// itself](Self::opens_children).
    fn is_protocol(&self) -> bool {
        self.kind() == DriverKind::Protocol
    }

    /// Whether the driver opens all its children itself, with [`OpenContext::open_child`] or [`OpenContext::open_further`]. Core
    /// then opens no `file` child.
    fn opens_children(&self) -> bool {
        self.is_protocol()
    }

    /// How likely it is that an image starting with `head` has the driver's format, 0 (not) to 100 (certain).
    fn probe(&self, head: &[u8], filename: Option<&str>) -> u32 {
        let _ = (head, filename);
        0
    }

    /// Filename schemes (`nbd` for `nbd:` and `nbd://`) that select this protocol.
    fn schemes(&self) -> &'static [&'static str] {
        &[]
    }

    /// How well a host path (a device node, for example) suits this protocol, 0 (not) to 100.
    fn probe_path(&self, path: &str) -> u32 {
        let _ = path;
        0
    }

    /// Converts a filename with one of [`Self::schemes`], or a plain path, to options.
    ///
    /// # Errors
    /// When the filename is malformed.
    fn parse_filename(&self, filename: &str) -> Result<Options> {
        let mut options = Options::new();
        options.insert("filename", filename);
        Ok(options)
    }

    /// Whether images of this format can have a backing file.
    fn supports_backing(&self) -> bool {
        false
    }

    /// The children with slots that a node can have.
    fn children(&self) -> &'static [ChildSpec] {
        match self.kind() {
            DriverKind::Protocol => &[],
            DriverKind::Filter => &[ChildSpec::FILTERED],
            DriverKind::Format if self.supports_backing() => {
                &[ChildSpec::IMAGE, ChildSpec::BACKING]
            }
            DriverKind::Format => &[ChildSpec::IMAGE],
        }
    }

    /// Whether the node passes its parents' permissions unchanged to the `file` child. Filters do so, and also formats that
    /// store no metadata in that child.
    fn passes_permissions(&self) -> bool {
        self.children().iter().any(|spec| spec.roles.contains(Roles::FILTERED))
    }

    /// Whether a node of this driver needs the node that is its child, not only the data that the child shows. Such a node keeps
    /// its child when the other users of the child move to another node.
    fn needs_child(&self) -> bool {
        false
    }

    /// Whether a node of this driver must see every change of the data of its `file` child, because it records or copies changes.
    /// The edge to the child then never shares write permission while the node has users, and no operation changes the child
    /// without requests to the node.
    fn sees_all_changes(&self) -> bool {
        false
    }

    /// Opens a node. `context` contains the generic options. The driver removes the options that it knows from
    /// [`OpenContext::options`]. The graph refuses the remaining options as unknown.
    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>>;

    /// The options of [`Self::create`], for `-o help` and for checking. Empty: the driver cannot create images.
    fn create_options(&self) -> &'static [CreateOption] {
        &[]
    }

    /// The options that [`Driver::amend`] can change, for `-o help` and for checking. Empty: the driver can change no
    /// options.
    fn amend_options(&self) -> &'static [CreateOption] {
        &[]
    }

    /// Creates a new image. For a format, the request contains a file that already exists. `None`: the driver cannot
    /// create images.
    fn create<'a>(
        &'a self,
        graph: &'a Graph,
        request: CreateRequest,
    ) -> Option<BoxFuture<'a, Result<()>>> {
        let _ = (graph, request);
        None
    }

    /// Checks the options of [`Self::create`] before anything is created, so that a mistyped option does not destroy an
    /// existing image.
    ///
    /// # Errors
    /// An error that [`Self::create`] would also return for these options. [`Self::create`] may return further errors.
    fn check_create(&self, graph: &Graph, options: &Options) -> Result<()> {
        let _ = (graph, options);
        Ok(())
    }

    /// The name of the data file, if a new image with these options has one. The caller creates the data file before it
    /// calls [`Self::create`] with [`CreateTarget::Files`](crate::create::CreateTarget::Files).
    fn new_data_file<'a>(&self, options: &'a Options) -> Option<&'a str> {
        let _ = options;
        None
    }

    /// Identifies the existing file with this name, so that the file can be removed if [`Self::create`] has created it
    /// (protocols). `None`: the file must not be removed (a device, for example).
    ///
    /// # Errors
    /// When the host cannot open the file.
    fn created_file(&self, filename: &str) -> Result<Option<Box<dyn CreatedFile>>> {
        let _ = filename;
        Ok(None)
    }

    /// Computes how many bytes an image made by [`Self::create`] would need. `None`: the driver cannot compute this.
    fn measure<'a>(
        &'a self,
        request: MeasureRequest<'a>,
    ) -> Option<BoxFuture<'a, Result<Measure>>> {
        let _ = request;
        None
    }
}

/// The table of drivers that a [`Graph`] knows.
pub type DriverTable = &'static [&'static dyn DriverFactory];

/// Shared handle to a node's children, for drivers.
pub type ChildrenRef = std::sync::Arc<Children>;
