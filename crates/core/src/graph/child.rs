//! Opens a child for a driver that opens its storage itself ([`DriverFactory::is_protocol`](crate::DriverFactory::is_protocol)).

use std::sync::Arc;

use serde_json::Value;

use super::OpenContext;
use super::open::{PLAIN_AND_NESTED, Target};
use crate::perm::{NodeAccess, Permissions};
use crate::{ChildSpec, Error, Node, Options, Result};

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
        let node = self.child_node(spec.name, named, is_image).await?;
        let access = NodeAccess { writable: !self.flags.read_only, no_io: self.flags.no_io };
        let permissions = Permissions::for_child(spec.roles, Permissions::NONE, access);
        let attached = match node.is_read_only() && !self.flags.read_only {
            true => self.fall_back_to_read_only("Block node is read-only"),
            false => Ok(()),
        };
        let attached =
            attached.and_then(|()| self.children.attach(&self.node_name, spec, &node, permissions));
        if let Err(error) = attached {
            self.graph.release_after_failure(node).await;
            return Err(error);
        }
        Ok(())
    }

    async fn child_node(
        &mut self,
        key: &str,
        named: Option<String>,
        is_image: bool,
    ) -> Result<Arc<Node>> {
        let missing = || Error::invalid(format!("A block device must be specified for \"{key}\""));
        let options = match self.options.take(key) {
            Some(Value::String(name)) => {
                return self.graph.node(&name).ok_or_else(|| {
                    Error::invalid(format!("Cannot find device='{name}' nor node-name='{name}'"))
                });
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
            epochs: Arc::clone(&self.epochs),
            ..Target::default()
        };
        let node = Box::pin(self.graph.open_chain(target)).await?;
        node.follow_parent();
        Ok(node)
    }
}
