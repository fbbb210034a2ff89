//! Creates images by file name and format, as `img create` and `convert` do.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::Poll;

use serde_json::Value;

use super::Graph;
use crate::control::run_to_completion;
use crate::create::{CreateOption, CreateRequest, CreateTarget, Created, Creation, NewFile};
use crate::driver::{DriverFactory, DriverKind};
use crate::perm::{Perm, Permissions};
use crate::{Attachment, ChildIdx, Error, OpenFlags, Options, Result};

impl Graph {
    /// Creates the image `filename` with the format `format`. Options that the format does not know are passed to the
    /// protocol; of these options, `preallocation` is passed to both. Once begun, the creation runs to its end even if
    /// the returned future is dropped.
    ///
    /// # Errors
    /// When the format or the protocol is unknown or cannot create images, or when neither of them knows an option;
    /// otherwise the errors of the drivers. If the format fails after the protocol has created the file, the file is
    /// removed, even if the file existed before. A data file is removed if it did not exist before. The files are kept
    /// if the format is raw. A file is also kept if it is a device, or if another program uses or has replaced it.
    pub async fn create_image(
        &self,
        filename: &str,
        format: &str,
        options: &Options,
    ) -> Result<Created> {
        match self.create_image_until(filename, format, options, &Arc::default()).await? {
            Creation::Complete(created) | Creation::Stopped(created) => Ok(created),
        }
    }

    /// Like [`Self::create_image`]. If `stop` is set, the creation stops when the next operation on a file has ended. In
    /// this case, the caller can remove the new files with [`Created::remove`].
    ///
    /// # Errors
    /// The errors of [`Self::create_image`].
    pub async fn create_image_until(
        &self,
        filename: &str,
        format: &str,
        options: &Options,
        stop: &Arc<AtomicBool>,
    ) -> Result<Creation> {
        let driver = self.driver(format)?;
        let (protocol, _) = self.protocol_for(filename)?;
        let (own, below) = split_options(driver, protocol, options)?;
        let (graph, stop) = (self.clone(), Arc::clone(stop));
        let new = NewImage { graph, filename: filename.to_owned(), driver, protocol, stop };
        run_to_completion(new.create(own, below)).await
    }
}

/// An image to create.
struct NewImage {
    graph: Graph,
    filename: String,
    driver: &'static dyn DriverFactory,
    protocol: &'static dyn DriverFactory,
    stop: Arc<AtomicBool>,
}

/// The open files of an image that is being created. The permissions keep other users from changing the files.
struct Files {
    image: Attachment,
    data: Option<Attachment>,
}

impl NewImage {
    /// Creates the image with the options `own` of its driver and `below` of the protocol.
    async fn create(self, own: Options, below: Options) -> Result<Creation> {
        let target = CreateTarget::Filename(self.filename.clone());
        let existed = matches!(self.protocol.created_file(&self.filename), Ok(Some(_)));
        if self.driver.kind() == DriverKind::Protocol {
            let request = CreateRequest { target, options: own };
            let outcome = self.until_stopped(run(self.driver, &self.graph, request)).await;
            return self.ended(outcome, self.created(), existed);
        }
        self.driver.check_create(&self.graph, &own)?;
        run(self.protocol, &self.graph, CreateRequest { target, options: below }).await?;
        let mut created = self.created();
        let image = match self.open().await {
            Ok(image) => image,
            Err(error) => {
                self.remove_closed(created).await;
                return Err(error);
            }
        };
        let mut files = Files { image, data: None };
        let outcome = match self.create_data_file(&own, &mut files, &mut created).await {
            Ok(()) => {
                let request = CreateRequest { target: files.target(), options: own };
                self.until_stopped(run(self.driver, &self.graph, request)).await
            }
            Err(error) => Some(Err(error)),
        };
        if let Some(Err(error)) = outcome {
            // The attachments still hold the permissions (and file locks), so no other process that uses the locks writes to the
            // files.
            if self.removes_incomplete() {
                created.remove_locked();
            }
            if let Err(error) = files.close(&self.graph).await {
                tracing::warn!(filename = self.filename, %error, "cannot close an incomplete image");
            }
            return Err(error);
        }
        if let Err(error) = files.close(&self.graph).await {
            self.remove_closed(created).await;
            return Err(error);
        }
        self.ended(outcome, created, existed)
    }

    /// The end of a creation. `outcome` is `None` if the creation was stopped. `existed`: the image file existed before,
    /// so the caller must not remove it.
    fn ended(
        &self,
        outcome: Option<Result<()>>,
        mut created: Created,
        existed: bool,
    ) -> Result<Creation> {
        if existed && let Some(image) = created.files.first_mut() {
            image.file = Ok(None);
        }
        match outcome {
            Some(outcome) => outcome.map(|()| Creation::Complete(created)),
            None => Ok(Creation::Stopped(created)),
        }
    }

    /// Runs `work` until it has ended or [`Self::stop`] is set. Returns `None` if `work` was stopped. In this case, no
    /// operation on a file is in flight any more.
    async fn until_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let outcome = {
            let (mut work, mut has_begun) = (pin!(work), false);
            // The end of each operation on a file polls this future, so the stop needs no waker.
            poll_fn(|context| {
                if has_begun && self.stop.load(Relaxed) {
                    return Poll::Ready(None);
                }
                has_begun = true;
                work.as_mut().poll(context).map(Some)
            })
            .await
        };
        if outcome.is_none() {
            oxblk_ring::settled().await;
        }
        outcome
    }

    /// Opens the image file. The permissions keep other users and processes from resizing the file and,
    /// unless the format is raw, from writing to the file.
    async fn open(&self) -> Result<Attachment> {
        let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
        let node = self.graph.open_protocol(&self.filename, Options::new(), flags).await?;
        // A format without metadata in the file only sets the size, so other users may write at the same time.
        let passes = self.driver.passes_permissions();
        let alone = if passes { Perm::RESIZE } else { Perm::WRITE | Perm::RESIZE };
        let reads = if passes { Perm::empty() } else { Perm::CONSISTENT_READ };
        let taken = reads | Perm::WRITE | Perm::RESIZE;
        let permissions = Permissions { taken, shared: Perm::all() - alone };
        let user = format!("creation of '{}'", self.filename);
        match Attachment::new(&node, user, ChildIdx::FILE.name(), permissions) {
            Ok(image) => Ok(image),
            Err(error) => {
                self.graph.release_after_failure(node).await;
                Err(error)
            }
        }
    }

    /// Creates and opens the data file, if the image gets one.
    async fn create_data_file(
        &self,
        options: &Options,
        files: &mut Files,
        created: &mut Created,
    ) -> Result<()> {
        if let Some(name) = self.driver.new_data_file(options) {
            let (attached, data) = self.graph.create_data_file(name).await?;
            files.data = Some(attached);
            created.files.extend(data.files);
        }
        Ok(())
    }

    /// Whether the files are removed when the creation fails. A partly created image of a format is useless. A partly
    /// created raw image is a usable file.
    fn removes_incomplete(&self) -> bool {
        !self.driver.passes_permissions()
    }

    /// Removes the closed files of an image that could not be created.
    async fn remove_closed(&self, created: Created) {
        if self.removes_incomplete() {
            created.remove_incomplete(&self.graph).await;
        }
    }

    /// The file that the protocol has just created.
    fn created(&self) -> Created {
        let file = self.protocol.created_file(&self.filename);
        Created { files: vec![NewFile { filename: self.filename.clone(), file }] }
    }
}

impl Files {
    fn target(&self) -> CreateTarget {
        let file = Arc::clone(self.image.edge());
        match &self.data {
            Some(data) => CreateTarget::Files { file, data: Arc::clone(data.edge()) },
            None => CreateTarget::File(file),
        }
    }

    /// Closes the files. Returns the first error.
    async fn close(self, graph: &Graph) -> Result<()> {
        let mut outcome = Ok(());
        for attached in self.data.into_iter().chain([self.image]) {
            let node = Arc::clone(attached.node());
            drop(attached);
            outcome = outcome.and(graph.release(node).await);
        }
        outcome
    }
}

async fn run(driver: &dyn DriverFactory, graph: &Graph, request: CreateRequest) -> Result<()> {
    match driver.create(graph, request) {
        Some(created) => created.await,
        None => {
            let what = if driver.kind() == DriverKind::Protocol { "Protocol" } else { "Format" };
            Err(Error::unsupported(format!(
                "{what} driver '{}' does not support image creation",
                driver.name()
            )))
        }
    }
}

/// Splits the options between format and protocol. `size` goes to the format; the protocol creates an empty file.
fn split_options(
    driver: &dyn DriverFactory,
    protocol: &dyn DriverFactory,
    options: &Options,
) -> Result<(Options, Options)> {
    // Options with dotted names may be nested (`encrypt.format`). In this case, their first component is compared.
    let knows = |list: &[CreateOption], key: &str| {
        let nested = options.get(key).is_some_and(Value::is_object);
        let first = |name: &'static str| name.split('.').next().unwrap_or_default();
        list.iter().any(|option| option.name == key || nested && first(option.name) == key)
    };
    let (mut own, mut below) = (Options::new(), Options::new());
    for (key, value) in options.iter() {
        if knows(driver.create_options(), key) {
            own.insert(key, value.clone());
        } else if driver.kind() != DriverKind::Protocol && knows(protocol.create_options(), key) {
            // The protocol creates an empty file, and the format resizes it. Both need the preallocation mode: the
            // protocol refuses a mode that it does not support, and the format uses the mode for the resize.
            if key == "preallocation" {
                own.insert(key, value.clone());
            }
            below.insert(key, value.clone());
        } else {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
    }
    below.insert("size", 0_u64);
    Ok((own, below))
}
