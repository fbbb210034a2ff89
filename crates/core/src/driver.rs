//! The driver contract: the interface that formats, protocols and filters implement for the graph.
//!
//! A [`DriverFactory`] knows the driver's name and options, and opens or creates an image. It makes one [`Driver`] for
//! each node. A driver holds no reference to its node. It receives its [`Children`] and sends requests to them through
//! [`Edge`](crate::Edge)s; these requests take the same path as requests of any other parent.
//!
//! A feature that only some drivers have is a capability: a small trait that the driver offers through an `Option`.
//! Core asks for the capability before it acts, so no trait needs a default method that panics.
//!
//! Requests that reach a driver lie inside the node, are aligned to its [`Limits`], and are no longer than these allow.
//! All I/O threads may call a driver concurrently.

use std::future::Future;
use std::pin::Pin;

use oxblk_ring::{File, IoBuf, IoBufMut};
use serde_json::Value;

use crate::bitmap::PersistentBitmaps;
use crate::check::Check;
use crate::create::{CreateOption, CreateRequest, CreatedFile, Measure, MeasureRequest};
use crate::{
    ChildIdx, Children, CompressedCluster, Graph, Limits, OpenContext, Options, Permissions,
    Result, Status, WriteFlags, ZeroFlags,
};

/// A boxed future bound to its I/O thread.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// The operation that [`Driver::map`] is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapOp {
    /// The caller reads the range.
    Read,
    /// The caller writes the range in place. Only data that this node has allocated and owns may be mapped.
    Write,
}

/// A driver's answer to "where does this range lie?" for the first `len` bytes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The range lies unchanged in a child. Past the child's end it reads as zeroes.
    Forward {
        /// Which child.
        child: ChildIdx,
        /// Byte offset in the child.
        offset: u64,
        /// Bytes covered, from 1 up. May be more than the caller asked for.
        len: u64,
    },
    /// The range reads as zeroes (reads only).
    Zero {
        /// Bytes covered, from 1 up.
        len: u64,
    },
    /// The range lies in the file that [`Driver::host_file`] returns (leaf drivers).
    Host {
        /// Byte offset in that file.
        offset: u64,
        /// Bytes covered, from 1 up.
        len: u64,
    },
    /// The driver cannot answer here: the caller uses the asynchronous request functions.
    Slow,
}

/// The file behind [`Step::Host`]. It is held only while an operation is started; the operation itself keeps the file
/// open.
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
    /// Everything, zeroes and offsets included, even if it costs a system call.
    Precise,
    /// Only whether this layer has the range allocated.
    Allocation,
}

/// Properties of an image that a driver reports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageInfo {
    /// Cluster size in bytes, or 0.
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

/// An open image, protocol connection or filter.
pub trait Driver: Send + Sync + 'static {
    /// Returns where the start of a range lies. Synchronous, without locks or allocation. See [`Step`].
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        let _ = (op, offset, len);
        Step::Slow
    }

    /// The host file behind [`Step::Host`].
    fn host_file(&self) -> Option<HostFile<'_>> {
        None
    }

    /// Loads the metadata that [`Self::map`] needs for the start of a range. `None`: [`Self::map`] needs no metadata,
    /// or its [`Step::Slow`] always requires [`Self::read`].
    fn load_map(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        let _ = (offset, len);
        None
    }

    /// Fills `buf` from `offset` and returns it.
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>>;

    /// Writes all of `data` at `offset`. Flags not in [`Limits::write_flags`] never arrive.
    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>>;

    /// Makes a range read as zeroes. `None`: the driver has no special way to do this, and the request path writes
    /// zeroes as data. A future that ends in [`crate::ErrorKind::Unsupported`] means the same.
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        let _ = (offset, len, flags);
        None
    }

    /// Informs the driver that a range's contents no longer matter. `None`: the driver ignores discards.
    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        let _ = (offset, len);
        None
    }

    /// Makes all completed writes durable. `None`: flushing the children is enough.
    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        None
    }

    /// The status of the start of a range. `None`: all of it is data mapped 1:1 to the primary child.
    fn block_status(
        &self,
        offset: u64,
        len: u64,
        want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        let _ = (offset, len, want);
        None
    }

    /// Virtual size in bytes, as known now.
    fn size(&self) -> u64;

    /// Queries the host for the size again (protocols whose file may change in size outside the program).
    fn refresh_size(&self) -> Option<BoxFuture<'_, Result<u64>>> {
        None
    }

    /// Limits and capabilities. Core merges those of the children.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Returns the properties of the image.
    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    /// Bytes that the image occupies on the host, if the driver itself knows (protocols).
    fn allocated_size(&self) -> Option<u64> {
        None
    }

    /// The name that opens this node again, if there is one (protocols: the file name).
    fn filename(&self) -> Option<String> {
        None
    }

    /// Permissions that this driver needs on a child when its own parents use the node with `parents`. `None`: the
    /// default of formats and filters (see [`Permissions::for_child`]).
    fn child_permissions(&self, child: ChildIdx, parents: Permissions) -> Option<Permissions> {
        let _ = (child, parents);
        None
    }

    /// Applies new cumulative permissions: `permissions` is the union of what the parents take and the intersection of
    /// what they share. Protocols take or release the host's locks. After an error, the previous permissions still
    /// apply.
    ///
    /// # Errors
    /// When another process holds a conflicting lock.
    fn set_permissions(&self, permissions: Permissions) -> Result<()> {
        let _ = permissions;
        Ok(())
    }

    /// Writes back cached metadata and releases resources. No request follows.
    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        None
    }

    /// Change of size.
    fn resize(&self) -> Option<&dyn Resize> {
        None
    }

    /// Reopen with other options.
    fn reopen(&self) -> Option<&dyn Reopen> {
        None
    }

    /// Copy between host files without passing the data through memory.
    fn copy_range(&self) -> Option<&dyn CopyRange> {
        None
    }

    /// Compressed writes.
    fn compress(&self) -> Option<&dyn Compress> {
        None
    }

    /// Change of the backing file named in the image.
    fn backing(&self) -> Option<&dyn Backing> {
        None
    }

    /// Change of an image's options.
    fn amend(&self) -> Option<&dyn crate::amend::Amend> {
        None
    }

    /// Internal snapshots.
    fn snapshots(&self) -> Option<&dyn crate::snapshot::Snapshots> {
        None
    }

    /// Dirty bitmaps stored in the image.
    fn persistent_bitmaps(&self) -> Option<&dyn PersistentBitmaps> {
        None
    }

    /// Compaction.
    fn compact(&self) -> Option<&dyn crate::compact::Compact> {
        None
    }

    /// VM state.
    fn vm_state(&self) -> Option<&dyn crate::vm_state::VmState> {
        None
    }

    /// Consistency check.
    fn check(&self) -> Option<&dyn Check> {
        None
    }
}

/// Allocation of the space that a resize adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Allocate nothing.
    #[default]
    Off,
    /// Allocate metadata only.
    Metadata,
    /// Reserve space with `fallocate`.
    Falloc,
    /// Write zeroes.
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

/// Change of a node's size.
pub trait Resize: Send + Sync {
    /// Sets the virtual size to `size` bytes. Added space reads as zeroes, whatever a backing file stores there. Core
    /// has drained the node of other requests.
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>>;
}

/// Reopen in three steps, so that either all nodes of a reopen change or none does.
pub trait Reopen: Send + Sync {
    /// Checks and prepares the change; `read_only` and the cache flags are in `flags`. No visible state changes.
    fn prepare(&self, flags: crate::OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>>;
    /// Puts the prepared change into effect. Cannot fail.
    fn commit(&self) -> BoxFuture<'_, ()>;
    /// Discards the prepared change.
    fn abort(&self) -> BoxFuture<'_, ()>;
}

/// Copy offload between host files.
pub trait CopyRange: Send + Sync {
    /// Copies `len` bytes at `offset` of this node to `target_offset` of the leaf node `target`.
    fn copy_to<'a>(
        &'a self,
        offset: u64,
        target: &'a dyn Driver,
        target_offset: u64,
        len: u64,
    ) -> BoxFuture<'a, Result<()>>;
}

/// Compressed writes.
pub trait Compress: Send + Sync {
    /// Stores `data` (whole clusters, or up to the end of the image) compressed. Stores it uncompressed if compression
    /// does not save space.
    fn write_compressed(&self, offset: u64, data: IoBuf) -> BoxFuture<'_, Result<()>>;

    /// Compresses `data` (one cluster, or the last part of one at the end of the image) and stores nothing.
    fn compress(&self, data: IoBuf) -> BoxFuture<'_, Result<CompressedCluster>>;

    /// Stores at `offset` a cluster that [`Self::compress`] has returned.
    fn store(&self, offset: u64, cluster: CompressedCluster) -> BoxFuture<'_, Result<()>>;

    /// Ends a series of compressed writes: pads the file to whole sectors. Core has drained the node.
    fn end(&self) -> BoxFuture<'_, Result<()>>;
}

/// Changes to an image that has, or may have, a backing file. Core has drained the node of other requests.
pub trait Backing: Send + Sync {
    /// Records `filename` and `format` in the image, durably; `None` removes the reference. All earlier writes are
    /// durable afterwards. The node continues to use the backing file that it has open.
    fn change<'a>(
        &'a self,
        filename: Option<&'a str>,
        format: Option<&'a str>,
    ) -> BoxFuture<'a, Result<()>>;

    /// Discards all guest data that the image itself stores, so that only its backing file is visible. Snapshots stay.
    /// After a crash the image has either all of this data or none of it.
    fn make_empty(&self) -> BoxFuture<'_, Result<()>>;
}

/// The category of a driver. It decides the default children and permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverKind {
    /// Talks to the host or the network; has no `file` child.
    Protocol,
    /// Interprets the contents of its `file` child.
    Format,
    /// Passes its `file` child through unchanged in layout.
    Filter,
}

/// A type of driver. The table of drivers contains one static instance of each.
pub trait DriverFactory: Send + Sync + 'static {
    /// The name in `driver=` and `-f`.
    fn name(&self) -> &'static str;

    /// The category of the driver.
    fn kind(&self) -> DriverKind;

    /// How likely it is that an image starting with `head` has the driver's format, 0 (not) to 100 (certain).
    fn probe(&self, head: &[u8], filename: Option<&str>) -> u32 {
        let _ = (head, filename);
        0
    }

    /// Filename schemes (`nbd` for `nbd:` and `nbd://`) that this protocol answers to.
    fn schemes(&self) -> &'static [&'static str] {
        &[]
    }

    /// How well a host path (a device node, for example) suits this protocol, 0 (not) to 100.
    fn probe_path(&self, path: &str) -> u32 {
        let _ = path;
        0
    }

    /// Turns a filename of one of [`Self::schemes`], or a plain path, into options.
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

    /// Whether the node passes its parents' permissions unchanged to the primary child. This is so for filters, and for
    /// formats that store no metadata in that child.
    fn passes_permissions(&self) -> bool {
        self.kind() == DriverKind::Filter
    }

    /// Opens a node. The generic options are in `context`. Core refuses as unknown any option that the driver does not
    /// remove from [`OpenContext::options`].
    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>>;

    /// The options of [`Self::create`], for `-o help` and for checking. Empty: the driver cannot create images.
    fn create_options(&self) -> &'static [CreateOption] {
        &[]
    }

    /// The options that [`Driver::amend`] can change, for `-o help` and for checking. Empty: it can change none.
    fn amend_options(&self) -> &'static [CreateOption] {
        &[]
    }

    /// Creates a new image. The protocol file of a format already exists; it is in the request.
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
    /// The errors that [`Self::create`] would return for these options.
    fn check_create(&self, graph: &Graph, options: &Options) -> Result<()> {
        let _ = (graph, options);
        Ok(())
    }

    /// The file that [`Self::create`] has just created under this name (protocols). `None`: such a file is never removed
    /// again.
    ///
    /// # Errors
    /// When the host cannot open the file.
    fn created_file(&self, filename: &str) -> Result<Option<Box<dyn CreatedFile>>> {
        let _ = filename;
        Ok(None)
    }

    /// Computes how many bytes an image made by [`Self::create`] would need.
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
