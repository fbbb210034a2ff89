//! Opens children for drivers that open their children themselves
//! ([`DriverFactory::opens_children`](crate::DriverFactory::opens_children)), and further children of other drivers.

use std::sync::Arc;

use serde_json::Value;

use super::OpenContext;
use super::open::{PLAIN_AND_NESTED, Target};
use crate::perm::{NodeAccess, Permissions};
use crate::{ChildIdx, ChildSpec, Error, Node, Options, Result, Roles};

impl OpenContext {
    /// Opens the child `spec` and attaches it. The option with the name of the child refers to a node or describes the child. If
    /// neither a driver nor a file name is given, `named` is the file name. Only the protocol of the child is opened, unless
    /// `is_image` is set or the options choose a format.
    ///
    /// # Errors
    /// When the option is missing or not valid; the errors of the child; when the permissions conflict with those of another
    /// user.
    pub async fn open_child(
        &mut self,
        spec: ChildSpec,
        named: Option<String>,
        is_image: bool,
    ) -> Result<()> {
        let option = self.options.take(spec.name);
        let node = self.child_node(spec.name, option, named, is_image).await?;
        let access = NodeAccess { writable: !self.flags.read_only, no_io: self.flags.no_io };
        let permissions = Permissions::for_child(spec.roles, Permissions::NONE, access);
        self.attach(spec.child, spec.name, spec.roles, node, permissions).await
    }

    /// Opens a child that has no slot, and attaches it. `name` is the name of the child (`children.0`). `option` refers to a node
    /// or describes the child. Of a child with the role [`Roles::METADATA`], only the protocol is opened, unless the options choose
    /// a format. Other children are opened as images. If the option gives neither a driver nor a file name, `named` is the
    /// file name. The driver gives the permissions that it takes while no parent uses the node.
    ///
    /// # Errors
    /// The errors of [`Self::open_child`].
    pub async fn open_further(
        &mut self,
        name: &str,
        option: Option<Value>,
        named: Option<String>,
        roles: Roles,
        permissions: Permissions,
    ) -> Result<ChildIdx> {
        let node = self.child_node(name, option, named, !roles.contains(Roles::METADATA)).await?;
        let child = self.children.new_further();
        self.attach(child, name, roles, node, permissions).await?;
        Ok(child)
    }

    async fn attach(
        &mut self,
        child: ChildIdx,
        name: &str,
        roles: Roles,
        node: Arc<Node>,
        permissions: Permissions,
    ) -> Result<()> {
        let attached = match node.is_read_only() && !self.flags.read_only {
            true => self.fall_back_to_read_only("Block node is read-only"),
            false => Ok(()),
        };
        let parent = &self.node_name;
        let attached = attached
            .and_then(|()| self.children.attach_as(parent, child, name, roles, &node, permissions));
        if let Err(error) = attached {
            self.opening.release_later(node);
            return Err(error);
        }
        Ok(())
    }

    async fn child_node(
        &self,
        key: &str,
        option: Option<Value>,
        named: Option<String>,
        is_image: bool,
    ) -> Result<Arc<Node>> {
        let missing = || Error::invalid(format!("A block device must be specified for \"{key}\""));
        let options = match option {
            Some(Value::String(name)) => {
                return self.opening.node(&self.graph, &name);
            }
            Some(Value::Object(map)) if map.len() > 1 && map.contains_key("") => {
                return Err(Error::invalid(PLAIN_AND_NESTED));
            }
            Some(Value::Object(map)) => Options::from_map(map)?,
            Some(_) => return Err(missing()),
            None => Options::new(),
        };
        if named.is_none() && options.is_empty() {
            return Err(missing());
        }
        let is_named = options.contains("driver") || options.contains("filename");
        let mut flags = self.flags.clone();
        flags.probed = false;
        flags.unmap = true;
        flags.copy_on_read = false;
        flags.no_backing = false;
        flags.no_io = false;
        let target = Target {
            filename: named.filter(|_| !is_named),
            options,
            flags,
            protocol: !is_image,
            nesting: self.nesting.saturating_add(1),
            opening: Arc::clone(&self.opening),
            ..Target::default()
        };
        let node = Box::pin(self.graph.open_chain(target)).await?;
        node.follow_parent();
        Ok(node)
    }
}
