//! The driver contract: what a format, protocol or filter gives to the graph.
//!
//! A [`DriverFactory`] knows the driver's name, options and how to open or create an image; it makes a
//! [`Driver`] for each node. A driver holds no reference to its node: it is given its [`Children`] and
//! speaks to them through [`Edge`](crate::Edge)s, whose requests take the same path as everybody's.
//!
//! What only some drivers can do is a capability: a small trait that a driver offers through an
//! `Option`, so that core asks before it acts and nothing has a default that panics.
//!
//! Requests that reach a driver are already inside the node, aligned to its [`Limits`] and no longer than
//! they allow. Drivers are called from every I/O thread at once.

use std::future::Future;
use std::pin::Pin;

use oxblk_ring::{File, IoBuf, IoBufMut};
use serde_json::Value;

use crate::bitmap::PersistentBitmaps;
use crate::check::Check;
use crate::create::{CreateOption, CreateRequest, Measure, MeasureRequest};
use crate::{
    ChildIdx, Children, CompressedCluster, Graph, Limits, OpenContext, Options, Permissions,
    Result, Status, WriteFlags, ZeroFlags,
};

/// A boxed future bound to its I/O thread.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What [`Driver::map`] is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapOp {
    /// The range is to be read.
    Read,
    /// The range is to be written in place; only data allocated and owned by this node may be mapped.
    Write,
}

/// A driver's answer to "where does this range lie?" for the first `len` bytes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Unchanged in a child. Past the child's end it reads as zeroes.
    Forward {
        /// Which child.
        child: ChildIdx,
        /// Byte offset in the child.
        offset: u64,
        /// Bytes covered, from 1 up; more than was asked for is allowed.
        len: u64,
    },
    /// It reads as zeroes (reads only).
    Zero {
        /// Bytes covered, from 1 up.
        len: u64,
    },
    /// In the file that [`Driver::host_file`] gives (leaf drivers).
    Host {
        /// Byte offset in that file.
        offset: u64,
        /// Bytes covered, from 1 up.
        len: u64,
    },
    /// Ask the asynchronous request functions.
    Slow,
}

/// The file behind [`Step::Host`]: a driver's own, or the one of the moment where a reopen may bring another.
/// Held only while an operation is started; the operation keeps the file open itself.
pub enum HostFile<'a> {
    /// The same for as long as the driver lives.
    Fixed(&'a File),
    /// The one of now.
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

/// How much a caller of [`Driver::block_status`] wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Everything, zeroes and offsets included, even where finding out costs a system call.
    Precise,
    /// Only whether this layer has the range allocated.
    Allocation,
}

/// What a driver tells of its image as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageInfo {
    /// Cluster size in bytes, or 0.
    pub cluster_size: u64,
    /// The image was not closed cleanly.
    pub is_dirty: bool,
    /// The image is marked corrupt.
    pub is_corrupt: bool,
    /// Guest data is stored encrypted.
    pub is_encrypted: bool,
    /// Byte offset at which VM state is stored, or 0.
    pub vm_state_offset: u64,
    /// Backing file name as the image has it.
    pub backing_filename: Option<String>,
    /// Backing format as the image has it.
    pub backing_format: Option<String>,
    /// Compressed clusters can be written.
    pub can_compress: bool,
    /// Driver-specific part of `info`, as QAPI's `ImageInfoSpecific` (`{"type": …, "data": …}`).
    pub specific: Option<Value>,
}

/// An open image, protocol connection or filter.
pub trait Driver: Send + Sync + 'static {
    /// Where the start of a range lies: synchronous, without locks or allocation. See [`Step`].
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        let _ = (op, offset, len);
        Step::Slow
    }

    /// The host file behind [`Step::Host`].
    fn host_file(&self) -> Option<HostFile<'_>> {
        None
    }

    /// Loads what [`Self::map`] needs to say where the start of a range lies. `None`: it always knows, or always asks for
    /// [`Self::read`].
    fn load_map(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        let _ = (offset, len);
        None
    }

    /// Fills `buf` from `offset` and gives it back.
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>>;

    /// Writes all of `data` at `offset`. Flags not in [`Limits::write_flags`] never arrive.
    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>>;

    /// Makes a range read as zeroes. `None`: the driver has no way but to write zeroes, which the
    /// request path does; a future that ends in [`crate::ErrorKind::Unsupported`] means the same.
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        let _ = (offset, len, flags);
        None
    }

    /// Tells that a range's contents no longer matter. `None`: nothing to do.
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

    /// Asks the host for the size again (protocols whose file may change under them).
    fn refresh_size(&self) -> Option<BoxFuture<'_, Result<u64>>> {
        None
    }

    /// Limits and capabilities. Core merges those of the children.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// What to tell of the image.
    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    /// Bytes that the image occupies on the host, where the driver itself knows (protocols).
    fn allocated_size(&self) -> Option<u64> {
        None
    }

    /// The name that opens this node again, where there is one (protocols: the file name).
    fn filename(&self) -> Option<String> {
        None
    }

    /// Permissions this driver needs on a child when its own parents use it with `parents`; the
    /// default is the usual one of formats and filters (see [`Permissions::for_child`]).
    fn child_permissions(&self, child: ChildIdx, parents: Permissions) -> Option<Permissions> {
        let _ = (child, parents);
        None
    }

    /// The union of what the parents take and the intersection of what they share has become
    /// `permissions`: protocols take or release the host's locks. An error leaves all as it was.
    ///
    /// # Errors
    /// When another process excludes it.
    fn set_permissions(&self, permissions: Permissions) -> Result<()> {
        let _ = permissions;
        Ok(())
    }

    /// Writes back what is cached and releases what is held. No request follows.
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

    /// Dirty bitmaps kept in the image.
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

/// How a resize treats the space it adds.
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
    /// Sets the virtual size to `size` bytes; space that is added reads as zeroes, whatever a backing
    /// file has there. The node is drained of other requests by core.
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>>;
}

/// Reopen in three steps, so that several nodes change together or not at all.
pub trait Reopen: Send + Sync {
    /// Checks and prepares; `read_only` and the cache flags are in `flags`. Nothing visible changes.
    fn prepare(&self, flags: crate::OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>>;
    /// Makes what was prepared valid. Cannot fail.
    fn commit(&self) -> BoxFuture<'_, ()>;
    /// Forgets what was prepared.
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
    /// Stores `data` (whole clusters, or up to the end of the image) compressed; falls back to plain
    /// storage where compression does not pay.
    fn write_compressed(&self, offset: u64, data: IoBuf) -> BoxFuture<'_, Result<()>>;

    /// Compresses `data` (one cluster, or what is left of it at the end of the image) and stores nothing.
    fn compress(&self, data: IoBuf) -> BoxFuture<'_, Result<CompressedCluster>>;

    /// Stores at `offset` what [`Self::compress`] has returned.
    fn store(&self, offset: u64, cluster: CompressedCluster) -> BoxFuture<'_, Result<()>>;

    /// No compressed cluster follows for now: the file ends with a whole sector from here on. Core has drained the
    /// node.
    fn end(&self) -> BoxFuture<'_, Result<()>>;
}

/// What images with backing files can do beside reading them. Core has drained the node of other requests.
pub trait Backing: Send + Sync {
    /// Records `filename` and `format` in the image, durably; `None` removes the reference. What has been written
    /// before is durable then. The node keeps the backing file that it has open.
    fn change<'a>(
        &'a self,
        filename: Option<&'a str>,
        format: Option<&'a str>,
    ) -> BoxFuture<'a, Result<()>>;

    /// Gives up all that the image holds itself, so that only its backing file is seen; snapshots stay. After a crash it
    /// holds all or nothing.
    fn make_empty(&self) -> BoxFuture<'_, Result<()>>;
}

/// What sort of driver it is: decides the default children and permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverKind {
    /// Talks to the host or the network; has no `file` child.
    Protocol,
    /// Interprets the contents of its `file` child.
    Format,
    /// Passes its `file` child through unchanged in layout.
    Filter,
}

/// A kind of driver: one static of it stands in the table of drivers.
pub trait DriverFactory: Send + Sync + 'static {
    /// The name in `driver=` and `-f`.
    fn name(&self) -> &'static str;

    /// What sort of driver it is.
    fn kind(&self) -> DriverKind;

    /// How sure the driver is that an image starting with `head` is of its format, 0 (not) to 100.
    fn probe(&self, head: &[u8], filename: Option<&str>) -> u32 {
        let _ = (head, filename);
        0
    }

    /// Filename schemes (`nbd` for `nbd:` and `nbd://`) that this protocol answers to.
    fn schemes(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether a host path of this sort (a device node, say) is this protocol's, 0 (not) to 100.
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

    /// Whether a parent's permissions are passed on to the primary child as they are: filters, and formats that
    /// keep nothing of their own there.
    fn passes_permissions(&self) -> bool {
        self.kind() == DriverKind::Filter
    }

    /// Opens a node. The generic options are in `context`; what the driver does not take out of
    /// [`OpenContext::options`] is refused by core as unknown.
    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>>;

    /// The options of [`Self::create`], for `-o help` and for checking; empty: cannot create.
    fn create_options(&self) -> &'static [CreateOption] {
        &[]
    }

    /// The options that [`Driver::amend`] changes, for `-o help` and for checking; empty: none.
    fn amend_options(&self) -> &'static [CreateOption] {
        &[]
    }

    /// Makes a new image (formats: on the already created protocol file in the request).
    fn create<'a>(
        &'a self,
        graph: &'a Graph,
        request: CreateRequest,
    ) -> Option<BoxFuture<'a, Result<()>>> {
        let _ = (graph, request);
        None
    }

    /// Checks the options of [`Self::create`] before anything is made, so that what is there already is not lost
    /// for a mistyped option.
    ///
    /// # Errors
    /// What [`Self::create`] would say of the options.
    fn check_create(&self, graph: &Graph, options: &Options) -> Result<()> {
        let _ = (graph, options);
        Ok(())
    }

    /// Takes away what [`Self::create`] made under this name, after the format above has failed (protocols).
    fn remove_created(&self, filename: &str) {
        let _ = filename;
    }

    /// Bytes that an image made by [`Self::create`] would need.
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
