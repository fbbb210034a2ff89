//! Opens and creates data files: separate files that contain the guest data of an image. The format driver calls these
//! functions itself.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use super::{Graph, OpenContext, OpenFlags};
use crate::create::Created;
use crate::driver::DriverKind;
use crate::gate::Purpose;
use crate::perm::{Perm, Permissions, Role};
use crate::{ChildIdx, Edge, Error, Node, Options, Result};

impl OpenContext {
    /// Opens the data file and puts the edge to it into the slot [`ChildIdx::DATA`]. The `data-file` option describes
    /// the data file. Without this option, the image's own reference `named` is used. Returns false if both are
    /// missing.
    ///
    /// The name `named` is always a path. Unlike a backing file name, this path is not relative to the directory of the
    /// image.
    ///
    /// # Errors
    /// When the option is not valid, when the graph's gate refuses the name, or when the permissions conflict with
    /// those of another user; otherwise the errors of the protocol.
    pub async fn open_data_file(&mut self, named: Option<&str>) -> Result<bool> {
        let mut flags = self.flags.clone();
        flags.probed = false;
        flags.unmap = true;
        flags.copy_on_read = false;
        let node = match self.options.take(ChildIdx::DATA.name()) {
            Some(Value::String(name)) => self.graph.node(&name).ok_or_else(|| {
                Error::invalid(format!("Cannot find device='{name}' nor node-name='{name}'"))
            })?,
            Some(Value::Object(map)) => {
                self.graph.open_storage(None, Options::from_map(map)?, flags).await?
            }
            Some(_) => return Err(Error::invalid("Invalid parameter type for 'data-file'")),
            None => {
                let Some(name) = named else { return Ok(false) };
                let admitted = self.graph.gate().admit(Purpose::Data, name)?;
                flags.no_symlinks = admitted.no_symlinks;
                self.graph.open_storage(Some(&admitted.name), Options::new(), flags).await?
            }
        };
        let writable = !self.flags.read_only;
        let permissions =
            Permissions::for_child(DriverKind::Format, Role::Data, Permissions::NONE, writable);
        let user = format!("node '{}'", self.node_name);
        match Edge::attach(Arc::clone(&node), user, ChildIdx::DATA.name(), permissions) {
            Ok(edge) => {
                self.children.set(ChildIdx::DATA, Some(edge));
                Ok(true)
            }
            Err(error) => {
                self.graph.release_after_failure(node).await;
                Err(error)
            }
        }
    }
}

impl Graph {
    /// Creates an empty file for the guest data of a new image and opens it for writing. An existing file is
    /// overwritten.
    ///
    /// # Errors
    /// The errors of the protocol, and when another user holds conflicting permissions on the file. A new file that cannot
    /// be opened is removed. A file that another user has open is kept.
    pub async fn create_data_file(&self, filename: &str) -> Result<NewDataFile> {
        let (protocol, _) = self.protocol_for(filename)?;
        let mut options = Options::new();
        options.insert("size", 0_u64);
        let created = self.create_image(filename, protocol.name(), &options).await?;
        let node = match self.open_new_data(filename).await {
            Ok(node) => node,
            Err(error) => {
                created.remove_incomplete(filename);
                return Err(error);
            }
        };
        let edge = self.attach_new_data(filename, node).await?;
        Ok(NewDataFile { graph: self.clone(), filename: filename.to_owned(), edge, created })
    }

    async fn open_new_data(&self, filename: &str) -> Result<Arc<Node>> {
        let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
        self.open_storage(Some(filename), Options::new(), flags).await
    }

    /// Attaches a user to a new data file. The permissions of this user keep other users and processes from writing to the
    /// file. If the file has another user, the node is released.
    async fn attach_new_data(&self, filename: &str, node: Arc<Node>) -> Result<Arc<Edge>> {
        let writes = Perm::WRITE | Perm::RESIZE;
        let permissions =
            Permissions { taken: Perm::CONSISTENT_READ | writes, shared: Perm::all() - writes };
        let user = format!("creation of '{filename}'");
        match Edge::attach(Arc::clone(&node), user, ChildIdx::DATA.name(), permissions) {
            Ok(edge) => Ok(edge),
            Err(error) => {
                self.release_after_failure(node).await;
                Err(error)
            }
        }
    }
}

/// The open data file of an image that is being created. The creator calls [`Self::complete`] or [`Self::remove`].
pub struct NewDataFile {
    graph: Graph,
    filename: String,
    edge: Arc<Edge>,
    created: Created,
}

impl NewDataFile {
    /// The edge for reads and writes.
    pub fn edge(&self) -> &Arc<Edge> {
        &self.edge
    }

    /// Closes the file of a complete image.
    ///
    /// # Errors
    /// When the file cannot be closed. The file is then removed if it is new and has no other user.
    pub async fn complete(self) -> Result<()> {
        let Self { graph, filename, edge, created } = self;
        let closed = graph.release(detached(&edge)).await;
        if closed.is_err() {
            // Another process may use the file now. The file is opened again to exclude other processes during the removal.
            let reopened = match graph.open_new_data(&filename).await {
                Ok(node) => graph.attach_new_data(&filename, node).await,
                Err(error) => Err(error),
            };
            match reopened {
                Ok(edge) => Self { graph, filename, edge, created }.remove().await,
                Err(error) => tracing::warn!(filename, %error, "the incomplete data file is kept"),
            }
        }
        closed
    }

    /// Removes the file if it is new, because the creation of the image has failed.
    pub async fn remove(self) {
        // The edge still holds its file locks, so no other process uses the file.
        self.created.remove_incomplete(&self.filename);
        self.graph.release_after_failure(detached(&self.edge)).await;
    }
}

/// Detaches an edge, and returns its node.
fn detached(edge: &Edge) -> Arc<Node> {
    edge.detach();
    Arc::clone(edge.node())
}

impl fmt::Debug for NewDataFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewDataFile").field("filename", &self.filename).finish_non_exhaustive()
    }
}
