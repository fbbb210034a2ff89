//! Creates images by file name and format, as `img create` and `convert` do.

use std::sync::Arc;

use serde_json::Value;

use super::Graph;
use crate::control::run_to_completion;
use crate::create::{CreateOption, CreateRequest, CreateTarget, Created};
use crate::driver::{DriverFactory, DriverKind};
use crate::perm::{Perm, Permissions};
use crate::{ChildIdx, Edge, Error, Node, OpenFlags, Options, Result};

impl Graph {
    /// Creates the image `filename` with the format `format`. Options that the format does not know are passed to the
    /// protocol; of these options, `preallocation` is passed to both. Once begun, the creation runs to its end even if
    /// the returned future is dropped.
    ///
    /// # Errors
    /// When the format or the protocol is unknown or cannot create images, or when neither of them knows an option;
    /// otherwise the errors of the drivers. If the format fails after the protocol has created the file, the file is
    /// removed, even if the file existed before. The file is kept if the format is raw, if the file is a device, or if
    /// another program uses or has replaced the file.
    pub async fn create_image(
        &self,
        filename: &str,
        format: &str,
        options: &Options,
    ) -> Result<Created> {
        let driver = self.driver(format)?;
        let (protocol, _) = self.protocol_for(filename)?;
        let (own, below) = split_options(driver, protocol, options)?;
        let new = NewImage { graph: self.clone(), filename: filename.to_owned(), driver, protocol };
        run_to_completion(new.create(own, below)).await
    }
}

/// An image to create.
struct NewImage {
    graph: Graph,
    filename: String,
    driver: &'static dyn DriverFactory,
    protocol: &'static dyn DriverFactory,
}

impl NewImage {
    /// Creates the image with the options `own` of its driver and `below` of the protocol.
    async fn create(self, own: Options, below: Options) -> Result<Created> {
        let (graph, driver) = (&self.graph, self.driver);
        let target = CreateTarget::Filename(self.filename.clone());
        // After a success, the caller may remove a new file later, but not a file that existed before and was
        // overwritten.
        let existed = matches!(self.protocol.created_file(&self.filename), Ok(Some(_)));
        if driver.kind() == DriverKind::Protocol {
            run(driver, graph, CreateRequest { target, options: own }).await?;
            return Ok(if existed { Created::kept() } else { self.created() });
        }
        driver.check_create(graph, &own)?;
        run(self.protocol, graph, CreateRequest { target, options: below }).await?;
        let new_file = self.created();
        let node = match self.open().await {
            Ok(node) => node,
            Err(error) => {
                self.remove(new_file);
                return Err(error);
            }
        };
        let edge = match self.attach(&node) {
            Ok(edge) => edge,
            Err(error) => {
                // Another user has the file open, so the file is not removed.
                graph.release_after_failure(node).await;
                return Err(error);
            }
        };
        let target = CreateTarget::File(Arc::clone(&edge));
        let created = run(driver, graph, CreateRequest { target, options: own }).await;
        if let Err(error) = created {
            // The edge still holds the permissions (and file locks), so no other process that uses the locks writes to
            // the file.
            self.remove(new_file);
            edge.detach();
            graph.release_after_failure(node).await;
            return Err(error);
        }
        edge.detach();
        if let Err(error) = graph.release(node).await {
            self.remove_closed(new_file).await;
            return Err(error);
        }
        Ok(if existed { Created::kept() } else { new_file })
    }

    async fn open(&self) -> Result<Arc<Node>> {
        let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
        self.graph.open_protocol(&self.filename, Options::new(), flags).await
    }

    /// Attaches a user to the file. The permissions of this user keep other users and processes from resizing the file
    /// and, unless the format is raw, from writing to the file.
    fn attach(&self, node: &Arc<Node>) -> Result<Arc<Edge>> {
        // A format without metadata in the file only sets the size, so other users may write at the same time.
        let passes = self.driver.passes_permissions();
        let alone = if passes { Perm::RESIZE } else { Perm::WRITE | Perm::RESIZE };
        let permissions = Permissions {
            taken: Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE,
            shared: Perm::all() - alone,
        };
        let user = format!("creation of '{}'", self.filename);
        Edge::attach(Arc::clone(node), user, ChildIdx::FILE.name(), permissions)
    }

    /// Removes the file of an image that could not be created. A partly created image of a format is useless. A partly
    /// created raw image is a usable file, and is kept.
    fn remove(&self, created: Created) {
        if !self.driver.passes_permissions() {
            created.remove_incomplete(&self.filename);
        }
    }

    /// Like [`Self::remove`], for a file that has been closed. Another process may use the file now. The file is opened
    /// again to exclude other processes during the removal.
    async fn remove_closed(&self, created: Created) {
        let (filename, kept) = (&self.filename, "the incomplete image is kept");
        let node = match self.open().await {
            Ok(node) => node,
            Err(error) => return tracing::warn!(filename, %error, "{kept}"),
        };
        match self.attach(&node) {
            Ok(edge) => {
                self.remove(created);
                edge.detach();
            }
            Err(error) => tracing::warn!(filename, %error, "{kept}"),
        }
        self.graph.release_after_failure(node).await;
    }

    /// The file that the protocol has just created.
    fn created(&self) -> Created {
        Created::new(self.protocol.created_file(&self.filename))
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
