//! Creating images: [`Create`] collects the options of a new image and then creates it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use oxblk_core::create::Creation;
use oxblk_core::{Gate, Graph, OpenFlags, Options, Secrets, names, relative_to};

use crate::{Format, IoThreads, Measure, NewFormat, Request, Result, drivers, measure};

/// The description of a new image; [`run`](Self::run) creates the image.
///
/// ```no_run
/// # fn main() -> oxblk::Result<()> {
/// use oxblk::{Create, Format, Qcow2Options};
///
/// let options = Qcow2Options { cluster_size: 1 << 20, ..Qcow2Options::default() };
/// Create::new("disk.qcow2", options, 10 << 30).run().wait()?;
/// Create::overlay("overlay.qcow2", "disk.qcow2", Format::Qcow2).run().wait()
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Create {
    name: String,
    format: NewFormat,
    /// The backing file's name and format.
    backing: Option<(String, Format)>,
    options: Options,
    secrets: Secrets,
    threads: Option<IoThreads>,
}

impl Create {
    /// An image of `size` bytes at `path`. An existing file is overwritten.
    pub fn new(path: impl AsRef<Path>, format: impl Into<NewFormat>, size: u64) -> Self {
        let mut create = Self::at(path.as_ref(), format.into());
        create.options.insert("size", size);
        create
    }

    /// A qcow2 image with the backing file `backing` and, by default, the size of the backing file. Clusters that have
    /// not been written in the image are read from the backing file. The image stores the name of the backing file; a
    /// relative name is relative to the folder of the image.
    pub fn overlay(path: impl AsRef<Path>, backing: impl AsRef<Path>, format: Format) -> Self {
        let mut create = Self::at(path.as_ref(), Format::Qcow2.into());
        create.backing = Some((names::from_os(backing.as_ref()), format));
        create
    }

    fn at(path: &Path, format: NewFormat) -> Self {
        let name = names::from_os(path);
        let (options, secrets) = (Options::new(), Secrets::default());
        Self { name, format, backing: None, options, secrets, threads: None }
    }

    /// Sets another option by its QEMU name: `("encrypt.format", "luks")`.
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

    /// Sets the I/O threads that create the image.
    #[must_use]
    pub fn threads(mut self, threads: IoThreads) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Creates the image.
    ///
    /// # Errors
    /// If an option is invalid, or if the backing file cannot be opened; otherwise the errors of the system.
    pub fn run(self) -> Request<()> {
        let threads = match self.threads.clone().map_or_else(IoThreads::shared, Ok) {
            Ok(threads) => threads,
            Err(error) => return Request::failed(error),
        };
        Request::begin(&threads, move || async { self.make(&Arc::default()).await.map(drop) })
    }

    /// Computes the size that the file of the image would have, without creating the image. An overlay is measured as an empty
    /// image of the size that [`option`](Self::option) sets.
    ///
    /// # Errors
    /// `ENOTSUP` if the format has no measurement; an error if an option is invalid or missing.
    pub fn measure(self) -> Request<Measure> {
        let threads = match self.threads.clone().map_or_else(IoThreads::shared, Ok) {
            Ok(threads) => threads,
            Err(error) => return Request::failed(error),
        };
        Request::begin(&threads, move || async move {
            let graph = Graph::with_secrets(drivers(), Gate::AnyFile, self.secrets);
            let mut options = self.format.to_options();
            options.overlay(&self.options);
            measure(&graph, self.format.format().name(), options, None).await
        })
    }

    pub(crate) fn format(&self) -> Format {
        self.format.format()
    }

    /// Creates the image, until `stop` is set. With the returned value, the caller can remove files that did not exist
    /// before.
    pub(crate) async fn make(self, stop: &Arc<AtomicBool>) -> Result<Creation> {
        let graph = Graph::with_secrets(drivers(), Gate::AnyFile, self.secrets);
        let mut options = self.format.to_options();
        options.overlay(&self.options);
        if let Some((backing, format)) = self.backing {
            let size = size_of(&graph, &relative_to(&self.name, &backing), format).await?;
            options.insert("backing_file", backing);
            options.insert("backing_fmt", format.name());
            options.insert_default("size", size);
        }
        let format = self.format.format().name();
        graph.create_image_until(&self.name, format, &options, stop).await
    }
}

/// The virtual size of an existing image, in bytes.
async fn size_of(graph: &Graph, name: &str, format: Format) -> Result<u64> {
    let mut options = Options::new();
    options.insert("driver", format.name());
    let flags = OpenFlags { read_only: true, no_backing: true, ..OpenFlags::default() };
    let disk = graph.open_backend(Some(name), options, flags).await?;
    let size = disk.size();
    disk.close().await?;
    Ok(size)
}
