//! How a disk is opened.

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
    /// Flushes do nothing. For disks that are worthless after a crash anyway.
    Unsafe,
}

/// How to open a disk.
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
    /// A disk whose bytes a driver of your own provides. `kind` is what such drivers have in common.
    ///
    /// # Errors
    /// When no I/O thread can be started.
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
    /// The image's format. Name it wherever it is known: a guest can write another format's header into a raw disk, and
    /// have other files opened when the format is probed the next time.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = Some(format);
        self
    }

    /// Whether the disk is only read.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Whether the disk is opened although another process uses it: its locks are neither looked at nor taken. What is read
    /// may be inconsistent.
    #[must_use]
    pub fn force_share(mut self, shared: bool) -> Self {
        self.shared = shared;
        self
    }

    /// When writes reach the medium.
    #[must_use]
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = cache;
        self
    }

    /// Whether discards give space back to the host, as they do by default.
    #[must_use]
    pub fn discard(mut self, discard: bool) -> Self {
        self.discard = discard;
        self
    }

    /// Whether the backing file is opened, as it is by default. Without it, what the image does not store reads as zeroes.
    #[must_use]
    pub fn backing(mut self, backing: bool) -> Self {
        self.backing = backing;
        self
    }

    /// Which files the image may name as its backing and data files. By default any file, but no network address and no
    /// `json:{…}`.
    #[must_use]
    pub fn gate(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    /// Another option, by the name that QEMU gives it: `("lazy-refcounts", true)`, `("encrypt.key-secret", "key")`.
    #[must_use]
    pub fn option(mut self, name: &str, value: impl Into<serde_json::Value>) -> Self {
        self.options.insert(name, value);
        self
    }

    /// The secrets that options may name.
    #[must_use]
    pub fn secrets(mut self, secrets: Secrets) -> Self {
        self.secrets = secrets;
        self
    }

    /// The graph that the disk becomes a part of, for disks that use nodes together. It decides on gate and secrets.
    #[must_use]
    pub fn graph(mut self, graph: Graph) -> Self {
        self.graph = Some(graph);
        self
    }

    /// The I/O threads that carry out the disk's requests.
    #[must_use]
    pub fn threads(mut self, threads: IoThreads) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Opens the image at `path`.
    ///
    /// # Errors
    /// As the system and the format report; nothing stays open.
    pub fn open(self, path: impl AsRef<Path>) -> Request<Disk> {
        self.open_name(&names::from_os(path.as_ref()))
    }

    /// Opens what a name means to QEMU: a path, an address, or `json:{…}`. Never for a name from strangers.
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

    /// Opens it on the calling I/O thread.
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
