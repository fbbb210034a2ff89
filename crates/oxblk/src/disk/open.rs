//! Opening a disk: [`OpenOptions`] collects the options and then opens an image.
//!
//! The library has no other way to open images, and the tools use it too. [`OpenOptions::open_backend`] does the work on an
//! I/O thread; the other methods send it there. After a failure, no file stays open.

use std::path::Path;
use std::sync::Arc;

use oxblk_core::{
    Backend, Driver, DriverFactory, Errno, Error, ErrorKind, Gate, Graph, Node, OpenFlags, Options,
    Perm, Permissions, Secrets, names,
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
    secrets: Secrets,
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
            secrets: Secrets::default(),
            graph: None,
            threads: None,
        }
    }
}

impl Disk {
    /// Opens a disk whose bytes a driver of the caller provides. `kind` is the factory of that type of driver.
    ///
    /// # Errors
    /// If no I/O thread can be started.
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

/// The image and its drivers.
impl OpenOptions {
    /// The image's format. Set it wherever it is known: a guest can write the header of another format into a raw disk. If
    /// the format is probed at the next opening, such a header can make the library open other files.
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

    /// Whether to open the backing file. The default is yes. Without it, unallocated clusters read as zeroes.
    #[must_use]
    pub fn backing(mut self, backing: bool) -> Self {
        self.flags.no_backing = !backing;
        self
    }

    /// Whether only information on the image is needed, and no data. The key of an encrypted image is then not required.
    #[must_use]
    pub fn metadata_only(mut self, metadata_only: bool) -> Self {
        self.flags.no_io = metadata_only;
        self
    }

    /// Whether the image is opened for a check. Faults that the check would report do not make the opening fail then.
    #[must_use]
    pub fn for_check(mut self, for_check: bool) -> Self {
        self.flags.check = for_check;
        self
    }

    /// Which files the image may refer to as its backing and data files. The default allows any file, but no network
    /// address and no `json:{…}`.
    #[must_use]
    pub fn gate(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    /// Sets the secrets that options may refer to.
    #[must_use]
    pub fn secrets(mut self, secrets: Secrets) -> Self {
        self.secrets = secrets;
        self
    }

    /// The graph to add the disk to, for disks that share nodes. The gate and the secrets are then those of the graph.
    #[must_use]
    pub fn graph(mut self, graph: Graph) -> Self {
        self.graph = Some(graph);
        self
    }
}

/// Access to the image, by this process and by others.
impl OpenOptions {
    /// Whether to open the disk for reading only.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.flags.read_only = read_only;
        self
    }

    /// Whether the opening fails if the image can only be read, for example because an option says so. The default is no:
    /// the disk is then read-only. This has no effect together with [`read_only`](Self::read_only).
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

    /// What other users of the image may do while the disk is open.
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

/// How requests are carried out.
impl OpenOptions {
    /// When writes become durable, and whether the host's page cache is used.
    #[must_use]
    pub fn cache(mut self, cache: Cache) -> Self {
        cache.apply(&mut self.flags);
        self.write_through = cache.is_write_through();
        self
    }

    /// How files are read and written. The default is `io_uring`.
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

    /// Whether reads store in the image the data that they fetch from its backing file.
    #[must_use]
    pub fn copy_on_read(mut self, copy_on_read: bool) -> Self {
        self.flags.copy_on_read = copy_on_read;
        self
    }

    /// The I/O threads that run the disk's requests.
    #[must_use]
    pub fn threads(mut self, threads: IoThreads) -> Self {
        self.threads = Some(threads);
        self
    }
}

/// Opening.
impl OpenOptions {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// As the system and the format report. No file stays open then.
    pub fn open(self, path: impl AsRef<Path>) -> Request<Disk> {
        self.begin(Some(names::from_os(path.as_ref())))
    }

    /// Opens a name as QEMU interprets it: a path, an address, or `json:{…}`. Do not use it for names from untrusted
    /// sources.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_name(self, name: &str) -> Request<Disk> {
        self.begin(Some(name.to_owned()))
    }

    /// Opens the image that the [options](Self::options) describe: `driver=qcow2,file.filename=disk.qcow2`.
    ///
    /// # Errors
    /// As [`Self::open`].
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

    /// Opens an image on the calling I/O thread. This is for programs that run on I/O threads of their own. `name` is
    /// interpreted as by [`open_name`](Self::open_name); `None`: the options describe the image.
    ///
    /// The caller closes the backend with [`Backend::close`]; no [`Disk`] does it. A backend that is dropped without a close
    /// loses cached metadata. [`threads`](Self::threads) has no effect.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_backend(self, name: Option<&str>) -> Result<Backend> {
        let graph = match &self.graph {
            Some(graph) => graph.clone(),
            None => Graph::with_secrets(drivers(), self.gate.clone(), self.secrets.clone()),
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

    /// Opens the image read-only and a temporary overlay over it.
    async fn open_overlay(self, graph: &Graph, name: Option<&str>) -> Result<Backend> {
        let base = Self { temporary: false, graph: Some(graph.clone()), ..self.clone() };
        let base = base.read_only(true).copy_on_read(false);
        let base = Box::pin(base.open_backend(name)).await?;
        let overlay = match base.node() {
            Ok(node) => temporary::overlay(graph, &node, self.flags.clone()).await,
            Err(error) => Err(error),
        };
        // The overlay has its own reference to the image.
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
        let mut taken = Perm::CONSISTENT_READ;
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

/// Closes a node after another failure, which the caller returns.
async fn release(graph: &Graph, node: Arc<Node>) {
    let name = node.name().to_owned();
    if let Err(error) = graph.release(node).await {
        tracing::warn!(node = name, %error, "cannot close a node after another failure");
    }
}
