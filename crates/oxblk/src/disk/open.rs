//! Opening a disk: [`OpenOptions`] collects the options and then opens an image.
//!
//! The library and the tools open all images with these options. [`OpenOptions::open_backend`] opens an image on the
//! calling I/O thread; the other methods open the image on an I/O thread of the disk's group. After a failure, no file
//! stays open.

use std::path::Path;
use std::sync::Arc;

use oxblk_core::{
    Backend, Driver, DriverFactory, Errno, Error, ErrorKind, Gate, Graph, Node, Objects, OpenFlags,
    Options, Perm, Permissions, Secrets, names,
};
use oxblk_ring::Aio;

use super::{Disk, Sharing};
use crate::{Cache, Format, IoThreads, Request, Result, drivers, temporary};

/// Options for opening a disk.
///
/// ```no_run
/// # fn main() -> oxblk::Result<()> {
/// use oxblk::{Cache, Disk, Format};
///
/// let disk = Disk::options().format(Format::Raw).cache(Cache::None).open("/dev/vg/disk").wait()?;
/// # disk.close().wait() }
/// ```
#[derive(Debug, Clone)]
pub struct OpenOptions {
    flags: OpenFlags,
    write_through: bool,
    temporary: bool,
    sharing: Sharing,
    resize: bool,
    require_write: bool,
    options: Options,
    gate: Gate,
    objects: Objects,
    graph: Option<Graph>,
    threads: Option<IoThreads>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            flags: OpenFlags { unmap: true, ..OpenFlags::default() },
            write_through: false,
            temporary: false,
            sharing: Sharing::default(),
            resize: true,
            require_write: false,
            options: Options::new(),
            gate: Gate::AnyFile,
            objects: Objects::default(),
            graph: None,
            threads: None,
        }
    }
}

impl Disk {
    /// Opens a disk whose contents the caller's driver provides. `kind` is the factory of this driver.
    ///
    /// # Errors
    /// If no I/O thread can be started, or if the graph refuses the driver.
    pub fn with_driver(kind: &'static dyn DriverFactory, driver: impl Driver) -> Request<Self> {
        let threads = match IoThreads::shared() {
            Ok(threads) => threads,
            Err(error) => return Request::failed(error),
        };
        let on = threads.clone();
        Request::begin(&threads, move || async move {
            let graph = Graph::new(drivers(), Gate::AnyFile);
            let node = graph.add_node(None, kind, Box::new(driver), OpenFlags::default())?;
            let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
            let backend = Backend::new(&graph, "", node, Permissions::sharing_all(taken))?;
            Ok(Self::new(backend, on))
        })
    }
}

/// Methods for the image and its drivers.
impl OpenOptions {
    /// Sets the format of the image. Set the format whenever you know it: a guest can write the header of another format to a
    /// raw disk. If the format is probed the next time, such a header can make the library open other files.
    #[must_use]
    pub fn format(self, format: Format) -> Self {
        self.option("driver", format.name())
    }

    /// Sets another option by its QEMU name: `("lazy-refcounts", true)`, `("encrypt.key-secret", "key")`.
    #[must_use]
    pub fn option(mut self, name: &str, value: impl Into<serde_json::Value>) -> Self {
        self.options.insert(name, value);
        self
    }

    /// Sets all of these options. [`Options`] parses them from an option string or from JSON.
    #[must_use]
    pub fn options(mut self, options: &Options) -> Self {
        self.options.overlay(options);
        self
    }

    /// Whether to open the backing file. The default is yes. Without the backing file, unallocated clusters read as zeroes.
    #[must_use]
    pub fn backing(mut self, backing: bool) -> Self {
        self.flags.no_backing = !backing;
        self
    }

    /// Whether only information on the image is needed, and no guest data. If so, the key of an encrypted image is not
    /// required.
    #[must_use]
    pub fn metadata_only(mut self, metadata_only: bool) -> Self {
        self.flags.no_io = metadata_only;
        self
    }

    /// Whether the image is opened for a check. If so, faults that the check reports are not errors of the opening.
    #[must_use]
    pub fn for_check(mut self, for_check: bool) -> Self {
        self.flags.check = for_check;
        self
    }

    /// Sets which files the image may refer to as its backing file and data file. By default, every path is allowed, but not a
    /// network address or a `json:{…}` name.
    #[must_use]
    pub fn gate(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    /// Sets the secrets that options may refer to. Replaces objects that were set before.
    #[must_use]
    pub fn secrets(mut self, secrets: Secrets) -> Self {
        self.objects = secrets.into();
        self
    }

    /// Sets the objects that options may refer to: secrets and throttle groups. [`define_object`](crate::define_object) adds
    /// objects to the set.
    #[must_use]
    pub fn objects(mut self, objects: Objects) -> Self {
        self.objects = objects;
        self
    }

    /// The graph to which the disk is added, for disks that share nodes. The gate and the objects of the graph are used, and
    /// [`gate`](Self::gate), [`secrets`](Self::secrets) and [`objects`](Self::objects) have no effect.
    #[must_use]
    pub fn graph(mut self, graph: Graph) -> Self {
        self.graph = Some(graph);
        self
    }
}

/// Methods for the access to the image, by this process and by others.
impl OpenOptions {
    /// Whether to open the disk for reading only.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.flags.read_only = read_only;
        self
    }

    /// Whether the opening fails if the image cannot be written, for example because of the option `read-only`. The default is
    /// no: the disk is opened read-only. With [`read_only`](Self::read_only), this has no effect.
    #[must_use]
    pub fn require_write(mut self, require: bool) -> Self {
        self.require_write = require;
        self
    }

    /// Whether the size may change. The default is yes, if the disk is writable.
    #[must_use]
    pub fn resizable(mut self, resizable: bool) -> Self {
        self.resize = resizable;
        self
    }

    /// Sets which operations other users of the image may perform while the disk is open.
    #[must_use]
    pub fn sharing(mut self, sharing: Sharing) -> Self {
        self.sharing = sharing;
        self
    }

    /// Whether to open the disk even if another process uses it. File locks are neither checked nor taken, and
    /// [`sharing`](Self::sharing) has no effect. Reads may return inconsistent data. The disk must be opened read-only.
    #[must_use]
    pub fn force_share(mut self, shared: bool) -> Self {
        self.flags.force_share = shared;
        self
    }

    /// Whether writes go to a temporary overlay, so that the image does not change. The overlay is deleted when the disk is
    /// closed.
    #[must_use]
    pub fn temporary(mut self, temporary: bool) -> Self {
        self.temporary = temporary;
        self
    }
}

/// Methods for the execution of requests.
impl OpenOptions {
    /// Sets the cache mode, which defines when writes reach the disk of the host, and whether the host's page cache is used.
    #[must_use]
    pub fn cache(mut self, cache: Cache) -> Self {
        cache.apply(&mut self.flags);
        self.write_through = cache.is_write_through();
        self
    }

    /// Sets how files are read and written. The default is `io_uring`.
    #[must_use]
    pub fn aio(mut self, aio: Aio) -> Self {
        self.flags.aio = Some(aio);
        self
    }

    /// Whether discards free space on the host. The default is yes.
    #[must_use]
    pub fn discard(mut self, discard: bool) -> Self {
        self.flags.unmap = discard;
        self
    }

    /// Whether data that is read from the backing file is stored in the image (copy-on-read).
    #[must_use]
    pub fn copy_on_read(mut self, copy_on_read: bool) -> Self {
        self.flags.copy_on_read = copy_on_read;
        self
    }

    /// Sets the I/O threads that run the requests of the disk.
    #[must_use]
    pub fn threads(mut self, threads: IoThreads) -> Self {
        self.threads = Some(threads);
        self
    }
}

/// Methods that open the image.
impl OpenOptions {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// The errors of the system and the format. After an error, no file stays open.
    pub fn open(self, path: impl AsRef<Path>) -> Request<Disk> {
        self.begin(Some(names::from_os(path.as_ref())))
    }

    /// Opens a name as QEMU interprets it: a path, an address, or `json:{…}`. Do not use this method for names from untrusted
    /// sources.
    ///
    /// # Errors
    /// The errors of [`Self::open`].
    pub fn open_name(self, name: &str) -> Request<Disk> {
        self.begin(Some(name.to_owned()))
    }

    /// Opens the image that the [options](Self::options) describe: `driver=qcow2,file.filename=disk.qcow2`.
    ///
    /// # Errors
    /// The errors of [`Self::open`].
    pub fn open_described(self) -> Request<Disk> {
        self.begin(None)
    }

    fn begin(self, name: Option<String>) -> Request<Disk> {
        let threads = match self.threads.clone().map_or_else(IoThreads::shared, Ok) {
            Ok(threads) => threads,
            Err(error) => return Request::failed(error),
        };
        let on = threads.clone();
        Request::begin(&threads, move || async move {
            let backend = self.open_backend(name.as_deref()).await?;
            Ok(Disk::new(backend, on))
        })
    }

    /// Opens an image on the calling I/O thread, for programs that run on their own I/O threads. `name` is interpreted as in
    /// [`open_name`](Self::open_name); `None`: the options describe the image.
    ///
    /// The caller must close the backend with [`Backend::close`]. If the backend is dropped without a close, cached metadata is
    /// lost. [`threads`](Self::threads) has no effect.
    ///
    /// # Errors
    /// The errors of [`Self::open`].
    pub async fn open_backend(self, name: Option<&str>) -> Result<Backend> {
        let graph = match &self.graph {
            Some(graph) => graph.clone(),
            None => Graph::with_objects(drivers(), self.gate.clone(), self.objects.clone()),
        };
        if self.temporary {
            return self.open_overlay(&graph, name).await;
        }
        let (options, flags) = (self.options.clone(), self.flags.clone());
        let node = match name {
            Some(name) => graph.open_image(name, options, flags).await?,
            None => graph.open(options, flags).await?,
        };
        let backend = self.attach(&graph, node).await?;
        backend.set_write_through(self.write_through);
        Ok(backend)
    }

    /// Opens the image read-only, and a temporary overlay whose backing file is the image.
    async fn open_overlay(self, graph: &Graph, name: Option<&str>) -> Result<Backend> {
        let base = Self { temporary: false, graph: Some(graph.clone()), ..self.clone() };
        let base = base.read_only(true).copy_on_read(false);
        let base = Box::pin(base.open_backend(name)).await?;
        let overlay = match base.node() {
            Ok(node) => temporary::overlay(graph, &node, self.flags.clone()).await,
            Err(error) => Err(error),
        };
        // The overlay has its own reference to the image, so the image stays open.
        let closed = base.close().await;
        let overlay = overlay?;
        if let Err(error) = closed {
            release(graph, overlay).await;
            return Err(error);
        }
        self.attach(graph, overlay).await
    }

    /// Attaches a backend to a node that has just been opened.
    async fn attach(&self, graph: &Graph, node: Arc<Node>) -> Result<Backend> {
        let permissions = self.permissions(&node);
        let attached =
            permissions.and_then(|both| Backend::new(graph, "", Arc::clone(&node), both));
        if attached.is_err() {
            release(graph, node).await;
        }
        attached
    }

    /// The permissions to take and to share on a node.
    fn permissions(&self, node: &Node) -> Result<Permissions> {
        let mut taken = Perm::empty();
        taken.set(Perm::CONSISTENT_READ, !self.flags.no_io);
        if !self.flags.read_only {
            if !node.is_read_only() {
                taken |= Perm::WRITE;
                taken.set(Perm::RESIZE, self.resize);
            } else if self.require_write {
                let message = "Block node is read-only";
                return Err(Error::new(ErrorKind::Denied, message).errno(Errno::ACCES));
            }
        }
        let sharing = if self.flags.force_share { Sharing::ReadWrite } else { self.sharing };
        Ok(sharing.permissions(taken))
    }
}

/// Closes a node after another failure. The caller returns the other failure.
async fn release(graph: &Graph, node: Arc<Node>) {
    let name = node.name().to_owned();
    if let Err(error) = graph.release(node).await {
        tracing::warn!(node = name, %error, "cannot close a node after another failure");
    }
}
