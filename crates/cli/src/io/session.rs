//! The state of the tool between commands: the open image, and requests in flight.

use std::cell::RefCell;
use std::future::Future;

use oxblk::{Aio, Cache, OpenOptions, parse_discard};
use oxblk_core::{Backend, Error, Graph, Options};
use oxblk_ring::Task;

use crate::flags::Stored;
use crate::flags::refusal::Refusal;
use crate::image::{ImageName, writing};
use crate::program::{Program, err};
use crate::text::option_list;

/// Options for opening an image.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "independent switches of the command line")]
pub(super) struct Opening {
    pub(super) format: Option<String>,
    pub(super) is_options: bool,
    pub(super) read_only: bool,
    pub(super) force_share: bool,
    pub(super) copy_on_read: bool,
    /// Writes go to a temporary overlay and are lost when the image is closed.
    pub(super) temporary: bool,
    pub(super) options: Options,
    pub(super) cache: Cache,
    pub(super) discard: bool,
    pub(super) aio: Option<Aio>,
}

impl Default for Opening {
    /// A writable image. Discards are passed to the host.
    fn default() -> Self {
        Self {
            format: None,
            is_options: false,
            read_only: false,
            force_share: false,
            copy_on_read: false,
            temporary: false,
            options: Options::new(),
            // As in qemu-io, a write is on stable storage when its command ends.
            cache: Cache::Writethrough,
            discard: true,
            aio: None,
        }
    }
}

impl Opening {
    /// Stores the name of a cache mode.
    pub(super) fn set_cache(&mut self, name: &str) -> Stored {
        let unknown = || Refusal::failed(format!("Invalid cache option: {name}"));
        self.cache = Cache::parse(name).ok_or_else(unknown)?;
        Ok(())
    }

    /// Makes the image bypass the host's page cache.
    pub(super) fn set_direct(&mut self) -> Stored {
        self.cache = Cache::None;
        Ok(())
    }

    /// Stores whether discards are passed to the host.
    pub(super) fn set_discard(&mut self, name: &str) -> Stored {
        let unknown = || Refusal::failed(format!("Invalid discard option: {name}"));
        self.discard = parse_discard(name).ok_or_else(unknown)?;
        Ok(())
    }

    /// Stores the name of an AIO mode.
    pub(super) fn set_aio(&mut self, name: &str) -> Stored {
        let unknown = || Refusal::failed(format!("Invalid aio option: {name}"));
        self.aio = Some(Aio::parse(name).ok_or_else(unknown)?);
        Ok(())
    }

    fn to_open_options(&self) -> OpenOptions {
        let options = writing()
            .read_only(self.read_only)
            .force_share(self.force_share)
            .copy_on_read(self.copy_on_read)
            .temporary(self.temporary)
            .cache(self.cache)
            .discard(self.discard)
            .options(&self.options);
        match self.aio {
            Some(aio) => options.aio(aio),
            None => options,
        }
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

    /// Opens an image and returns whether the open succeeded. Errors are printed.
    pub(super) async fn open(&self, filename: Option<&str>, opening: &Opening) -> bool {
        let given = filename.filter(|_| opening.is_options);
        if let Some(Err(error)) = given.map(|text| option_list::check_id(text, None)) {
            self.program.report(&error);
            return false;
        }
        if self.open.borrow().is_some() {
            // The options are not used. Parsing them prints the warnings about them.
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

    /// Opens an image. No image is open before the call.
    ///
    /// # Errors
    /// If the image cannot be opened.
    async fn try_open(&self, filename: Option<&str>, opening: &Opening) -> Result<(), Error> {
        let image = ImageName::file(filename.unwrap_or_default(), opening.format.as_deref())
            .options_if(opening.is_options || filename.is_none())
            .with_all_keys();
        let backend = image.open(&self.graph, opening.to_open_options()).await?;
        *self.open.borrow_mut() = Some(Open { backend });
        Ok(())
    }

    /// Waits for requests in flight, closes the open image, and returns whether the close succeeded.
    pub(super) async fn close(&self) -> bool {
        let open = self.open.borrow_mut().take();
        let Some(open) = open else { return true };
        // The requests in flight wait no longer for rate limits and breakpoints.
        if let Ok(node) = open.backend.node() {
            drop(open.backend.graph().drain(&node).await);
        }
        self.wait_for_requests().await;
        match open.backend.close().await {
            Ok(()) => true,
            Err(error) => {
                self.program.report(&error);
                false
            }
        }
    }

    /// Starts a request that is in flight while the next commands run.
    pub(super) async fn start(&self, request: impl Future<Output = ()> + 'static) {
        self.in_flight.borrow_mut().push(oxblk_ring::spawn(request));
        // Let the request start before the next command starts.
        oxblk_ring::yield_now().await;
    }

    /// Waits for all requests started by [`Self::start`].
    pub(super) async fn wait_for_requests(&self) {
        let tasks = self.in_flight.take();
        for task in tasks {
            task.await;
        }
    }

    /// Prints the error of a command that needs an open image, if no image is open.
    pub(super) fn nothing_open(&self) {
        err(format_args!("no file open, try 'help open'\n"));
    }
}
