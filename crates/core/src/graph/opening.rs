//! [`Opening`]: the state that all nodes of one open share.
//!
//! An image may refer to nodes that exist already (`file=NODE`). The requests of the open to such a node pass through no
//! backend, so no drain holds them back. Therefore no control operation may run on these nodes and on the nodes below them
//! until the open has ended: the open holds their control locks.
//!
//! The locks are taken together before the open begins, because several control locks are always taken in the order of the nodes'
//! addresses. A `json:` name in an image may contain a name that was not known then. In this case the open fails, all its nodes
//! are closed, and the open begins again with this name ([`Opening::reference`]).
//!
//! A failed open closes its nodes after it has released the locks, because closing a node takes the control locks of the nodes
//! below.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use oxblk_ring::RwLockReadGuardArc;
use serde_json::Value;

use super::Graph;
use super::open::Target;
use super::walk::nodes_from;
use crate::control::{Controls, lock_set};
use crate::epoch::Epochs;
use crate::{Children, Errno, Error, ErrorKind, Node, Options, Result};

/// The state that all nodes of one open share.
#[derive(Default)]
pub(super) struct Opening {
    /// The epochs of all nodes that are opened together.
    pub(super) epochs: Arc<Epochs>,
    /// The nodes whose control locks the open holds.
    locked: Vec<Arc<Node>>,
    late: Mutex<Late>,
}

/// What an open has opened, and what it must do after it has released its locks.
#[derive(Default)]
struct Late {
    /// Names of nodes whose control locks the open would have needed.
    missing: Vec<String>,
    /// Nodes to close, if they have no user.
    unused: Vec<Arc<Node>>,
    /// The nodes that this open has opened. An image may refer to them too.
    opened: Vec<Weak<Node>>,
}

/// The locks that an open with references to nodes holds.
struct Locks {
    _controls: Controls,
    _structure: RwLockReadGuardArc<()>,
}

impl Opening {
    fn late(&self) -> MutexGuard<'_, Late> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node with this name, to which an image refers. `None` if there is no such node.
    ///
    /// # Errors
    /// `EBUSY` if the open does not hold the control lock of the node. The open then begins again.
    pub(super) fn reference(&self, graph: &Graph, name: &str) -> Result<Option<Arc<Node>>> {
        let Some(node) = graph.node(name) else { return Ok(None) };
        if self.locked.iter().any(|locked| Arc::ptr_eq(locked, &node)) {
            return Ok(Some(node));
        }
        let mut late = self.late();
        if late.opened.iter().any(|opened| std::ptr::eq(opened.as_ptr(), Arc::as_ptr(&node))) {
            return Ok(Some(node));
        }
        late.missing.push(name.to_owned());
        let text = format!("Another operation uses node '{name}'");
        Err(Error::new(ErrorKind::Busy, text).errno(Errno::BUSY))
    }

    /// Like [`Self::reference`]. A name without a node is an error.
    ///
    /// # Errors
    /// When there is no such node; the errors of [`Self::reference`].
    pub(super) fn node(&self, graph: &Graph, name: &str) -> Result<Arc<Node>> {
        self.reference(graph, name)?.ok_or_else(|| {
            Error::invalid(format!("Cannot find device='{name}' nor node-name='{name}'"))
        })
    }

    /// Checks that the open holds the control locks of all nodes to which `options` may refer.
    ///
    /// # Errors
    /// The errors of [`Self::reference`].
    pub(super) fn check_references(&self, graph: &Graph, options: &Options) -> Result<()> {
        let mut checked = Ok(());
        for name in possible_names(options) {
            checked = checked.and(self.reference(graph, &name).map(drop));
        }
        checked
    }

    /// Removes the children of an image that failed to open, and closes them after the open.
    pub(super) fn release_children(&self, children: &Children, file: Option<Arc<Node>>) {
        children.detach().into_iter().rev().chain(file).for_each(|node| self.release_later(node));
    }

    /// Records a node that this open has opened.
    pub(super) fn has_opened(&self, node: &Arc<Node>) {
        self.late().opened.push(Arc::downgrade(node));
    }

    /// Closes `node` after the open, if it has no user then.
    pub(super) fn release_later(&self, node: Arc<Node>) {
        self.late().unused.push(node);
    }
}

impl Graph {
    /// Opens an image, its backing chain and all nodes below. No control operation runs on a node to which the image refers until
    /// the open has ended.
    pub(super) async fn open_tree(&self, target: &Target) -> Result<Arc<Node>> {
        let mut names = possible_names(&target.options);
        loop {
            let (opening, locks) = self.begin_opening(&names).await;
            let opening = Arc::new(opening);
            let attempt = Target { opening: Arc::clone(&opening), ..target.clone() };
            let outcome = self.open_chain(attempt).await;
            drop(locks);
            let Late { missing, mut unused, .. } = std::mem::take(&mut *opening.late());
            if !missing.is_empty() {
                unused.extend(outcome.as_ref().ok().cloned());
            }
            for node in unused {
                self.release_after_failure(node).await;
            }
            if missing.is_empty() {
                return outcome;
            }
            names.extend(missing);
        }
    }

    /// Takes the locks for an open whose options may refer to the nodes with these names.
    async fn begin_opening(&self, names: &[String]) -> (Opening, Option<Locks>) {
        let find = || names.iter().filter_map(|name| self.node(name)).collect::<Vec<_>>();
        if find().is_empty() {
            return (Opening::default(), None);
        }
        // The requests of the open are in no drain. So no link of these nodes may change meanwhile.
        let structure = self.share_structure().await;
        let controls = lock_set(|| nodes_from(&find(), |_| true)).await;
        let locked = controls.nodes().to_vec();
        let locks = Locks { _controls: controls, _structure: structure };
        (Opening { locked, ..Opening::default() }, Some(locks))
    }
}

/// The strings in `options`, each of which may be the name of a node.
fn possible_names(options: &Options) -> Vec<String> {
    let mut names = Vec::new();
    let mut values: Vec<_> = options.iter().map(|(_, value)| value).collect();
    while let Some(value) = values.pop() {
        match value {
            Value::String(name) => names.push(name.clone()),
            Value::Object(map) => values.extend(map.values()),
            Value::Array(list) => values.extend(list),
            _ => {}
        }
    }
    names
}
