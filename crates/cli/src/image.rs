//! Opening images for the tools, by file name or option string, with QEMU's error messages.

use std::sync::Arc;

use oxblk_core::{Backend, Errno, Error, ErrorKind, Graph, OpenFlags, Options, Perm, Permissions};

use crate::cache::CacheMode;
use crate::program::{Program, err};
use crate::text::option_list;

/// An image to be opened, with the options for opening it.
#[derive(Debug, Clone)]
pub(crate) struct Image<'a> {
    /// File name or option string.
    pub(crate) name: &'a str,
    /// The name is an option string (`--image-opts`).
    pub(crate) is_options: bool,
    /// The key of the first word in an option string, if that word has no key.
    pub(crate) implied: Option<&'static str>,
    /// The format; `None`: it is probed.
    pub(crate) format: Option<&'a str>,
    /// Flags for opening.
    pub(crate) flags: OpenFlags,
    /// Every write is durable when it completes.
    pub(crate) write_through: bool,
    /// Options in addition to those in the name.
    pub(crate) options: Options,
    /// The permissions to take and to share.
    pub(crate) permissions: Permissions,
}

impl<'a> Image<'a> {
    /// An image opened for reading.
    pub(crate) fn read_only(name: &'a str) -> Self {
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        let permissions = Permissions::sharing_all(Perm::CONSISTENT_READ);
        Self { flags, permissions, ..Self::writable(name) }
    }

    /// An image opened for reading and writing.
    pub(crate) fn writable(name: &'a str) -> Self {
        Self {
            name,
            is_options: false,
            implied: Some("file"),
            format: None,
            flags: OpenFlags::default(),
            write_through: false,
            options: Options::new(),
            permissions: Permissions::sharing_all(
                Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE,
            ),
        }
    }

    /// Lets no other user write to the image while it is open, unless `--force-share` was given.
    #[must_use]
    pub(crate) fn unchanging(mut self) -> Self {
        if !self.flags.force_share {
            self.permissions.shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        }
        self
    }

    /// Sets whether the name is an option string.
    #[must_use]
    pub(crate) fn options_if(mut self, is_options: bool) -> Self {
        self.is_options = is_options;
        self
    }

    /// Sets the format.
    #[must_use]
    pub(crate) fn format(mut self, format: Option<&'a str>) -> Self {
        self.format = format;
        self
    }

    /// Sets the cache mode.
    #[must_use]
    pub(crate) fn cache(mut self, mode: CacheMode) -> Self {
        mode.apply(&mut self.flags);
        self.write_through = mode.write_through;
        self
    }

    /// Sets whether to open without locks that exclude others.
    #[must_use]
    pub(crate) fn share_if(mut self, share: bool) -> Self {
        self.flags.force_share = share;
        self
    }

    /// Opens the image.
    ///
    /// # Errors
    /// The reason, without the image's name in front of it.
    pub(crate) async fn open(&self, graph: &Graph) -> Result<Backend, Error> {
        let mut options = self.options.clone();
        let mut name = Some(self.name);
        if self.is_options {
            options.overlay(&option_list::tree(self.name, self.implied)?);
            name = None;
        } else if let Some(format) = self.format {
            options.insert("driver", format);
        }
        if let Some(json) = name.and_then(|name| name.strip_prefix("json:"))
            && let Ok(described) = Options::from_json(json)
        {
            option_list::warn_of_empty_backing(&described.to_json());
        }
        let node = match name {
            Some(name) => graph.open_image(name, options, self.flags.clone()).await?,
            None => graph.open(options, self.flags.clone()).await?,
        };
        let mut permissions = self.permissions;
        if self.flags.read_only {
            permissions.taken = Perm::CONSISTENT_READ;
        }
        let refused = node.is_read_only() && permissions.taken.contains(Perm::WRITE);
        let attached = if refused {
            Err(Error::new(ErrorKind::Denied, "Block node is read-only").errno(Errno::ACCES))
        } else {
            Backend::new(graph, "", Arc::clone(&node), permissions)
        };
        let backend = match attached {
            Ok(backend) => backend,
            Err(error) => {
                drop(graph.release(node).await);
                return Err(error);
            }
        };
        backend.set_write_through(self.write_through);
        self.warn_of_probed_raw(&backend);
        Ok(backend)
    }

    /// Warns if a writable image was opened as raw because its format was probed. Writes that would make it look like
    /// another format are then refused.
    pub(crate) fn warn_of_probed_raw(&self, backend: &Backend) {
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

    /// Opens the image, and prints the error if that fails.
    ///
    /// # Errors
    /// If the image cannot be opened. The error has been printed.
    pub(crate) async fn open_or_say(
        &self,
        program: &Program,
        graph: &Graph,
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
        self.open(graph).await.map_err(|error| {
            program.report_in(format_args!("Could not open '{}': ", self.name), &error);
            Unopened
        })
    }
}

/// An image could not be opened, and the error has been printed.
#[derive(Debug)]
pub(crate) struct Unopened;
