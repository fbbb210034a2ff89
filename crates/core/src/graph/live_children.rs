//! Adds and removes children of a node while the node is used (`x-blockdev-change`).

use std::sync::Arc;

use super::Graph;
use crate::perm::Roles;
use crate::{Error, Node, Result};

impl Graph {
    /// Adds the node with the name `node` to the children of `parent`, or removes the child with the name `child`. One of the two
    /// must be given. Requests of `parent` wait meanwhile. A removed node without further users is closed.
    ///
    /// # Errors
    /// When a name is not known; when the driver of `parent` does not support the change or refuses it; when the new child has a
    /// parent already; otherwise the errors of [`GraphChange::run`](super::GraphChange::run). After an error, nothing has changed.
    pub async fn change_children(
        &self,
        parent: &str,
        child: Option<&str>,
        node: Option<&str>,
    ) -> Result<()> {
        let parent = self.node(parent).ok_or_else(|| {
            Error::invalid(format!("Cannot find device='{parent}' nor node-name='{parent}'"))
        })?;
        match (child, node) {
            (Some(_), Some(_)) => {
                Err(Error::invalid("The parameters child and node are in conflict"))
            }
            (None, None) => Err(Error::invalid("Either child or node must be specified")),
            (Some(child), None) => self.remove_child(parent, child).await,
            (None, Some(node)) => {
                let found = self.node(node);
                let found =
                    found.ok_or_else(|| Error::invalid(format!("Node '{node}' not found")))?;
                self.add_child(parent, found).await
            }
        }
    }

    async fn add_child(&self, parent: Arc<Node>, node: Arc<Node>) -> Result<()> {
        let structure = self.lock_structure().await;
        let Some(list) = parent.driver().child_list() else {
            let name = parent.name();
            return Err(Error::unsupported(format!(
                "The node {name} does not support adding a child"
            )));
        };
        if node.has_parents() {
            let name = node.name();
            return Err(Error::invalid(format!("The node {name} already has a parent")));
        }
        let name = list.check_new(&node)?;
        let mut change = self.change();
        change.add_child(&parent, &name, Roles::DATA, &node);
        let made = move || {
            if let Some(list) = parent.driver().child_list() {
                list.added(&name);
            }
        };
        change.run_locked(structure, made).await
    }

    async fn remove_child(&self, parent: Arc<Node>, child: &str) -> Result<()> {
        let structure = self.lock_structure().await;
        let found = parent.children().iter().find(|(_, edge)| edge.name() == child);
        let Some((at, _)) = found else {
            let name = parent.name();
            return Err(Error::invalid(format!("Node '{name}' does not have child '{child}'")));
        };
        let Some(list) = parent.driver().child_list() else {
            let name = parent.name();
            return Err(Error::unsupported(format!(
                "The node {name} does not support removing a child"
            )));
        };
        list.check_removal(child)?;
        let mut change = self.change();
        change.unlist_child(&parent, at);
        let name = child.to_owned();
        let made = move || {
            if let Some(list) = parent.driver().child_list() {
                list.removed(&name);
            }
        };
        change.run_locked(structure, made).await
    }
}
