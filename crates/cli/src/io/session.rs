//! State that lasts from one command to the next: the open image, and requests in flight.

use std::cell::RefCell;
use std::future::Future;

use oxblk_core::{Backend, Error, Graph, OpenFlags, Options, Perm, Permissions};
use oxblk_ring::Task;

use crate::cache::{CacheMode, parse_aio, parse_discard};
use crate::flags::Stored;
use crate::flags::refusal::Refusal;
use crate::image::Image;
use crate::program::{Program, err};
use crate::text::option_list;

/// Options for opening an image.
#[derive(Debug, Clone)]
pub(super) struct Opening {
    pub(super) format: Option<String>,
    pub(super) is_options: bool,
    pub(super) flags: OpenFlags,
    pub(super) write_through: bool,
    pub(super) options: Options,
    /// Writes go to a temporary overlay and are lost when the image is closed.
    pub(super) temporary: bool,
}

impl Default for Opening {
    /// A writable image whose discards reach the host.
    fn default() -> Self {
        Self {
            format: None,
            is_options: false,
            flags: OpenFlags { unmap: true, ..OpenFlags::default() },
            write_through: false,
            options: Options::new(),
            temporary: false,
        }
    }
}

impl Opening {
    /// Stores the name of a cache mode.
    pub(super) fn set_cache(&mut self, name: &str) -> Stored {
        let unknown = || Refusal::failed(format!("Invalid cache option: {name}"));
        self.cache(CacheMode::parse(name).ok_or_else(unknown)?);
        Ok(())
    }

    /// Stores that the host's page cache is bypassed.
    pub(super) fn set_direct(&mut self) -> Stored {
        self.cache(CacheMode { direct: true, ..CacheMode::WRITEBACK });
        Ok(())
    }

    /// Stores whether discards reach the host.
    pub(super) fn set_discard(&mut self, name: &str) -> Stored {
        let unknown = || Refusal::failed(format!("Invalid discard option: {name}"));
        self.flags.unmap = parse_discard(name).ok_or_else(unknown)?;
        Ok(())
    }

    /// Stores the name of an AIO mode.
    pub(super) fn set_aio(&mut self, name: &str) -> Stored {
        let unknown = || Refusal::failed(format!("Invalid aio option: {name}"));
        self.flags.aio = Some(parse_aio(name).ok_or_else(unknown)?);
        Ok(())
    }

    /// Sets the cache mode.
    fn cache(&mut self, mode: CacheMode) {
        mode.apply(&mut self.flags);
        self.write_through = mode.write_through;
    }
}

/// The open image.
#[derive(Debug, Clone)]
pub(super) struct Open {
    pub(super) backend: Backend,
}

/// The state of the tool.
pub(super) struct Session {
    pub(super) program: Program,
    /// Names are option strings (`--image-opts`).
    pub(super) image_options: bool,
    graph: Graph,
    open: RefCell<Option<Open>>,
    in_flight: RefCell<Vec<Task<()>>>,
}

impl Session {
    /// A session without an open image.
    pub(super) fn new(program: Program, image_options: bool) -> Self {
        Self {
            program,
            image_options,
            graph: crate::img::graph(),
            open: RefCell::new(None),
            in_flight: RefCell::new(Vec::new()),
        }
    }

    /// The open image, if any.
    pub(super) fn current(&self) -> Option<Open> {
        self.open.borrow().clone()
    }

    /// Opens an image and returns whether that succeeded. Errors are printed.
    pub(super) async fn open(&self, filename: Option<&str>, opening: &Opening) -> bool {
        let given = filename.filter(|_| opening.is_options);
        if let Some(Err(error)) = given.map(|text| option_list::check_id(text, None)) {
            self.program.report(&error);
            return false;
        }
        if self.open.borrow().is_some() {
            // Print the warnings about the options in this case too.
            drop(given.map(|text| option_list::list(text, None)));
            self.program.error("file open already, try 'help close'");
            return false;
        }
        match self.try_open(filename, opening).await {
            Ok(()) => true,
            Err(error) => {
                let shown = filename.filter(|_| !opening.is_options);
                let device = shown.map(|name| format!(" device {name}")).unwrap_or_default();
                self.program.report_in(format_args!("can't open{device}: "), &error);
                false
            }
        }
    }

    /// Opens an image while none is open.
    ///
    /// # Errors
    /// The reason.
    async fn try_open(&self, filename: Option<&str>, opening: &Opening) -> Result<(), Error> {
        let mut image = Image::writable(filename.unwrap_or_default())
            .options_if(opening.is_options || filename.is_none())
            .format(opening.format.as_deref());
        image.implied = None;
        image.flags = opening.flags.clone();
        image.write_through = opening.write_through;
        image.options = opening.options.clone();
        let read_only = image.flags.read_only;
        if opening.temporary {
            image.flags = OpenFlags { read_only: true, copy_on_read: false, ..image.flags };
        }
        let mut backend = image.open(&self.graph).await?;
        if opening.temporary {
            backend = self.open_over(backend, read_only, opening).await?;
        }
        *self.open.borrow_mut() = Some(Open { backend });
        Ok(())
    }

    /// Opens a temporary overlay over an image.
    async fn open_over(
        &self,
        base: Backend,
        read_only: bool,
        opening: &Opening,
    ) -> Result<Backend, Error> {
        let flags = OpenFlags { read_only, ..opening.flags.clone() };
        let overlay = oxblk::temporary::overlay(&self.graph, &base.node()?, flags).await;
        // The overlay has its own reference to the image.
        let closed = base.close().await;
        let overlay = overlay?;
        closed?;
        let mut taken = Perm::CONSISTENT_READ;
        if !read_only {
            taken |= Perm::WRITE | Perm::RESIZE;
        }
        Backend::new(&self.graph, "", overlay, Permissions::sharing_all(taken))
    }

    /// Waits for requests in flight, closes the open image, and returns whether that succeeded.
    pub(super) async fn close(&self) -> bool {
        self.settle().await;
        let open = self.open.borrow_mut().take();
        let Some(open) = open else { return true };
        match open.backend.close().await {
            Ok(()) => true,
            Err(error) => {
                self.program.report(&error);
                false
            }
        }
    }

    /// Starts a request that runs while further commands run.
    pub(super) async fn start(&self, request: impl Future<Output = ()> + 'static) {
        self.in_flight.borrow_mut().push(oxblk_ring::spawn(request));
        // Let the request start before the next command does.
        oxblk_ring::yield_now().await;
    }

    /// Waits for all requests started by [`Self::start`].
    pub(super) async fn settle(&self) {
        let tasks = self.in_flight.take();
        for task in tasks {
            task.await;
        }
    }

    /// Prints the error for a command that needs an image while none is open.
    pub(super) fn nothing_open(&self) {
        err(format_args!("no file open, try 'help open'\n"));
    }
}
