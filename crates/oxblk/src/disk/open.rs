//! Opening a disk: [`OpenOptions`] collects the options and then opens an image.

use std::path::Path;

use oxblk_core::{
    Backend, Driver, DriverFactory, Gate, Graph, OpenFlags, Options, Perm, Permissions, Secrets,
    names,
};

use super::Disk;
use crate::{Format, IoThreads, Request, Result, drivers};

/// When writes reach the medium, and whether the host's page cache is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cache {
    /// Through the host's page cache; durable after a flush. The default.
    #[default]
    Writeback,
    /// Past the host's page cache (`O_DIRECT`); durable after a flush.
    None,
    /// Through the host's page cache; each write is durable when it completes.
    Writethrough,
    /// Past the host's page cache; each write is durable when it completes.
    Directsync,
    /// Flushes do nothing. For disks that are not needed after a crash.
    Unsafe,
}

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
    format: Option<Format>,
    read_only: bool,
    shared: bool,
    cache: Cache,
    discard: bool,
    backing: bool,
    gate: Gate,
    options: Options,
    secrets: Secrets,
    graph: Option<Graph>,
    threads: Option<IoThreads>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            format: None,
            read_only: false,
            shared: false,
            cache: Cache::default(),
            discard: true,
            backing: true,
            gate: Gate::AnyFile,
            options: Options::new(),
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

impl OpenOptions {
    /// The image's format. Set it wherever it is known: a guest can write the header of another format into a raw disk. If
    /// the format is probed at the next opening, such a header can make the library open other files.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = Some(format);
        self
    }

    /// Whether to open the disk for reading only.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Whether to open the disk even if another process uses it. File locks are neither checked nor taken. Reads may return
    /// inconsistent data.
    #[must_use]
    pub fn force_share(mut self, shared: bool) -> Self {
        self.shared = shared;
        self
    }

    /// When writes become durable, and whether the host's page cache is used.
    #[must_use]
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = cache;
        self
    }

    /// Whether discards free space on the host. The default is yes.
    #[must_use]
    pub fn discard(mut self, discard: bool) -> Self {
        self.discard = discard;
        self
    }

    /// Whether to open the backing file. The default is yes. Without it, unallocated clusters read as zeroes.
    #[must_use]
    pub fn backing(mut self, backing: bool) -> Self {
        self.backing = backing;
        self
    }

    /// Which files the image may refer to as its backing and data files. The default allows any file, but no network
    /// address and no `json:{…}`.
    #[must_use]
    pub fn gate(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    /// Sets another option by its QEMU name: `("lazy-refcounts", true)`, `("encrypt.key-secret", "key")`.
    #[must_use]
    pub fn option(mut self, name: &str, value: impl Into<serde_json::Value>) -> Self {
        self.options.insert(name, value);
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

    /// The I/O threads that run the disk's requests.
    #[must_use]
    pub fn threads(mut self, threads: IoThreads) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Opens the image at `path`.
    ///
    /// # Errors
    /// As the system and the format report. No file stays open then.
    pub fn open(self, path: impl AsRef<Path>) -> Request<Disk> {
        self.open_name(&names::from_os(path.as_ref()))
    }

    /// Opens a name as QEMU interprets it: a path, an address, or `json:{…}`. Do not use it for names from untrusted
    /// sources.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_name(self, name: &str) -> Request<Disk> {
        let threads = match self.threads.clone().map_or_else(IoThreads::shared, Ok) {
            Ok(threads) => threads,
            Err(error) => return Request::failed(error),
        };
        let (name, on) = (name.to_owned(), threads.clone());
        Request::begin(&threads, move || async move {
            let backend = self.open_backend(&name).await?;
            Ok(Disk::new(backend, on))
        })
    }

    /// Opens the image on the calling I/O thread.
    pub(crate) async fn open_backend(self, name: &str) -> Result<Backend> {
        let graph =
            self.graph.unwrap_or_else(|| Graph::with_secrets(drivers(), self.gate, self.secrets));
        let mut options = self.options;
        if let Some(format) = self.format {
            options.insert("driver", format.name());
        }
        let (direct, no_flush, through) = match self.cache {
            Cache::Writeback => (false, false, false),
            Cache::None => (true, false, false),
            Cache::Writethrough => (false, false, true),
            Cache::Directsync => (true, false, true),
            Cache::Unsafe => (false, true, false),
        };
        let flags = OpenFlags {
            read_only: self.read_only,
            direct,
            no_flush,
            unmap: self.discard,
            force_share: self.shared,
            no_backing: !self.backing,
            ..OpenFlags::default()
        };
        let backend = graph.open_backend(Some(name), options, flags).await?;
        backend.set_write_through(through);
        Ok(backend)
    }
}
