//! Opening the images of a command line with [`oxblk::OpenOptions`], with QEMU's messages.

use oxblk::{Disk, OpenOptions};
use std::error::Error as _;

use oxblk_core::{Backend, Error, Graph, Options, Purpose, RefusedName};

use crate::program::{Program, err};
use crate::text::option_list;

/// Options for opening an image for reading, as the commands do.
pub(crate) fn reading() -> OpenOptions {
    Disk::options().discard(false).read_only(true)
}

/// Options for opening an image for reading and writing, as the commands do. Commands that change the size add
/// [`OpenOptions::resizable`]. The others must not make a raw file longer, for example with a write to its last block and
/// `O_DIRECT`.
pub(crate) fn writing() -> OpenOptions {
    Disk::options().discard(false).require_write(true).resizable(false)
}

/// The name of an image on the command line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ImageName<'a> {
    /// File name or option string.
    name: &'a str,
    /// The format. `None`: the format is probed.
    format: Option<&'a str>,
    /// The name is an option string (`--image-opts`).
    is_options: bool,
    /// The key of the first word in an option string, if that word has no key.
    implied: Option<&'static str>,
    /// A hint for the user if `--untrusted` refuses the backing file of the image.
    without_backing: Option<&'static str>,
}

impl<'a> ImageName<'a> {
    /// A file name, with the format if one was given.
    pub(crate) fn file(name: &'a str, format: Option<&'a str>) -> Self {
        Self { name, format, is_options: false, implied: Some("file"), without_backing: None }
    }

    /// Sets whether the name is an option string.
    #[must_use]
    pub(crate) fn options_if(self, is_options: bool) -> Self {
        Self { is_options, ..self }
    }

    /// Sets the hint for the user if `--untrusted` refuses the backing file of the image.
    #[must_use]
    pub(crate) fn hint_without_backing(self, hint: &'static str) -> Self {
        Self { without_backing: Some(hint), ..self }
    }

    /// Requires a key for every word of an option string.
    #[must_use]
    pub(crate) fn with_all_keys(self) -> Self {
        Self { implied: None, ..self }
    }

    /// Opens the image.
    ///
    /// # Errors
    /// The reason of the failure, without the name of the image.
    pub(crate) async fn open(self, graph: &Graph, options: OpenOptions) -> Result<Backend, Error> {
        let mut options = options.graph(graph.clone());
        let mut name = Some(self.name);
        if self.is_options {
            options = options.options(&option_list::tree(self.name, self.implied)?);
            name = None;
        } else if let Some(format) = self.format {
            options = options.option("driver", format);
        }
        if let Some(json) = name.and_then(|name| name.strip_prefix("json:"))
            && let Ok(described) = Options::from_json(json)
        {
            option_list::warn_of_empty_backing(&described.to_json());
        }
        let backend = options.open_backend(name).await.map_err(|error| self.advise(error))?;
        self.warn_of_probed_raw(&backend);
        Ok(backend)
    }

    fn advise(self, error: Error) -> Error {
        let refused = error.source().and_then(|source| source.downcast_ref::<RefusedName>());
        let is_backing = refused.is_some_and(|refused| refused.purpose == Purpose::Backing);
        match self.without_backing.filter(|_| is_backing) {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }

    /// Warns if a writable image was opened as raw because its format was probed. Writes that would make such an image
    /// look like another format are refused.
    pub(crate) fn warn_of_probed_raw(self, backend: &Backend) {
        let Ok(node) = backend.node() else { return };
        if !node.flags().probed || node.factory().name() != "raw" || node.is_read_only() {
            return;
        }
        // For an image that is described by options, print the name of its file.
        let is_name = !self.is_options && !self.name.starts_with("json:");
        let found = node.filename().filter(|_| !is_name);
        let name = found.as_deref().unwrap_or(self.name);
        err(format_args!(
            "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
             Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n         \
             Specify the 'raw' format explicitly to remove the restrictions.\n"
        ));
    }

    /// Opens the image. If the open fails, prints the error.
    ///
    /// # Errors
    /// If the image cannot be opened. The error has been printed.
    pub(crate) async fn open_or_report(
        self,
        program: &Program,
        graph: &Graph,
        options: OpenOptions,
    ) -> Result<Backend, Unopened> {
        if self.is_options && self.format.is_some() {
            program.error("--image-opts and --format are mutually exclusive");
            return Err(Unopened);
        }
        if self.is_options
            && let Err(error) = option_list::check_id(self.name, self.implied)
        {
            program.report(&error);
            return Err(Unopened);
        }
        self.open(graph, options).await.map_err(|error| {
            program.report_in(format_args!("Could not open '{}': ", self.name), &error);
            Unopened
        })
    }
}

/// An image could not be opened, and the error has been printed.
#[derive(Debug)]
pub(crate) struct Unopened;
