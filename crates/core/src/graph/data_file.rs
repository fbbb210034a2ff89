//! Opens and creates data files: separate files that contain the guest data of an image. The format driver opens the data
//! file of an image. The creation of an image creates the data file and gives it to the format driver.

use serde_json::Value;

use super::open::Target;
use super::{Graph, OpenContext, OpenFlags};
use crate::create::Created;
use crate::gate::Purpose;
use crate::perm::{NodeAccess, Perm, Permissions, Roles};
use crate::{Attachment, ChildIdx, ChildSpec, Error, Options, Result};

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
            Some(Value::String(name)) => self.opening.node(&self.graph, &name)?,
            Some(Value::Object(map)) => {
                let options = Options::from_map(map)?;
                self.graph.open_storage(&self.opening, None, options, flags).await?
            }
            Some(_) => return Err(Error::invalid("Invalid parameter type for 'data-file'")),
            None => {
                let Some(name) = named else { return Ok(false) };
                let admitted = self.graph.gate().admit(Purpose::Data, name)?;
                flags.no_symlinks = admitted.no_symlinks;
                let (name, none) = (Some(admitted.name.as_str()), Options::new());
                self.graph.open_storage(&self.opening, name, none, flags).await?
            }
        };
        // The driver reads and changes the data file while it opens the image.
        let access = NodeAccess { writable: true, no_io: false };
        let mut permissions = Permissions::for_child(Roles::DATA, Permissions::NONE, access);
        permissions.taken = Perm::CONSISTENT_READ;
        if !self.flags.read_only {
            permissions.taken |= Perm::WRITE | Perm::RESIZE;
        }
        match self.children.attach(&self.node_name, ChildSpec::DATA, &node, permissions) {
            Ok(()) => Ok(true),
            Err(error) => {
                self.opening.release_later(node);
                Err(error)
            }
        }
    }
}

impl Graph {
    /// Creates an empty file for the guest data of a new image and opens it for writing. An existing file is
    /// overwritten, and must not be removed later.
    ///
    /// # Errors
    /// The errors of the protocol, and when another user holds conflicting permissions on the file. After an error, a
    /// new file is removed, unless another program uses it.
    pub(super) async fn create_data_file(&self, filename: &str) -> Result<(Attachment, Created)> {
        let (protocol, _) = self.protocol_for(filename)?;
        let mut options = Options::new();
        options.insert("size", 0_u64);
        let created = Box::pin(self.create_image(filename, protocol.name(), &options)).await?;
        match self.open_new_data_file(filename).await {
            Ok(attached) => Ok((attached, created)),
            Err(error) => {
                created.remove_incomplete(self).await;
                Err(error)
            }
        }
    }

    async fn open_new_data_file(&self, filename: &str) -> Result<Attachment> {
        let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
        let filename_only = Target {
            filename: Some(filename.to_owned()),
            flags,
            protocol: true,
            ..Target::default()
        };
        let node = self.open_tree(&filename_only).await?;
        node.follow_parent();
        let writes = Perm::WRITE | Perm::RESIZE;
        let permissions =
            Permissions { taken: Perm::CONSISTENT_READ | writes, shared: Perm::all() - writes };
        let user = format!("creation of '{filename}'");
        match Attachment::new(&node, user, ChildIdx::DATA.name(), permissions) {
            Ok(attached) => Ok(attached),
            Err(error) => {
                self.release_after_failure(node).await;
                Err(error)
            }
        }
    }
}
