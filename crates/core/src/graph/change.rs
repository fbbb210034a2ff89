//! [`GraphChange`]: changes of the links between nodes, and of the root nodes of backends, while requests are made.
//!
//! 1. The structure lock is taken, so that there is only one such change at a time. Then the control locks of the nodes whose
//!    users or children change, of the nodes that a flush of them reaches, and of all nodes above them.
//! 2. The nodes whose users or children change are drained and flushed: afterwards, a flush may no longer reach them. The backends
//!    whose root nodes change are drained too, also if they are empty.
//! 3. The [`Action`] of the change does its work. Then a [`Change`] of the graph is made: all steps take effect or none.
//! 4. Limits and sizes of all nodes above are updated, from the lowest node up.
//! 5. Requests resume. Nodes that have lost their last user are closed.
//!
//! Once the nodes are drained, the change runs to its end even if its future is dropped.

use std::collections::HashSet;
use std::sync::Arc;

use oxblk_ring::{RwLockWriteGuardArc, UntilSettled};

use super::Graph;
use super::action::{Action, mark_unflushed};
use super::walk::{Above, nodes_above};
use crate::change::Change;
use crate::control::run_to_completion;
use crate::perm::Roles;
use crate::{Backend, BlockEvent, ChildIdx, Edge, Error, Node, Result, request};

/// The steps of a change of the graph. Nothing changes before [`GraphChange::run`].
///
/// ```no_run
/// # async fn example(graph: oxblk_core::Graph, node: std::sync::Arc<oxblk_core::Node>,
/// #     filter: std::sync::Arc<oxblk_core::Node>) -> oxblk_core::Result<()> {
/// // `filter` was opened with `node` as its `file`. Afterwards, all users of `node` use `filter`.
/// let mut change = graph.change();
/// change.replace_node(&node, &filter, |_| true);
/// change.run().await?;
/// # Ok(())
/// # }
/// ```
#[must_use]
pub struct GraphChange {
    graph: Graph,
    steps: Vec<Step>,
    pub(super) action: Option<Box<dyn Action>>,
}

/// Accepts the users of a node that are moved.
type Which = Box<dyn Fn(&Edge) -> bool + Send>;

enum Step {
    Child {
        parent: Arc<Node>,
        child: ChildIdx,
        new: Option<Arc<Node>>,
    },
    NewChild {
        parent: Arc<Node>,
        child: ChildIdx,
        name: String,
        roles: Roles,
        node: Arc<Node>,
    },
    /// A child of a driver with a [`ChildList`](crate::ChildList) is removed.
    Unlist {
        parent: Arc<Node>,
        child: ChildIdx,
    },
    Node {
        old: Arc<Node>,
        new: Arc<Node>,
        which: Which,
    },
    Root {
        backend: Backend,
        node: Option<Arc<Node>>,
    },
    Insert {
        backend: Backend,
        node: Arc<Node>,
    },
    RemoveFilter {
        filter: Arc<Node>,
    },
}

impl Graph {
    /// A change without steps.
    pub fn change(&self) -> GraphChange {
        GraphChange { graph: self.clone(), steps: Vec::new(), action: None }
    }
}

impl GraphChange {
    /// Replaces a child of `parent`. `None` removes the child, which must be a backing file. [`Graph::change_children`] removes
    /// children of other kinds.
    pub fn replace_child(&mut self, parent: &Arc<Node>, child: ChildIdx, new: Option<&Arc<Node>>) {
        let (parent, new) = (Arc::clone(parent), new.cloned());
        self.steps.push(Step::Child { parent, child, new });
    }

    /// Adds a child that has no slot. `name` is the parent's name for the child (`children.2`). The caller has checked the child
    /// with the [`ChildList`](crate::ChildList) of the parent.
    pub(super) fn add_child(
        &mut self,
        parent: &Arc<Node>,
        name: &str,
        roles: Roles,
        node: &Arc<Node>,
    ) -> ChildIdx {
        let child = parent.children().new_further();
        let (parent, node, name) = (Arc::clone(parent), Arc::clone(node), name.to_owned());
        self.steps.push(Step::NewChild { parent, child, name, roles, node });
        child
    }

    /// Removes a child that has no slot. The caller has checked this with the [`ChildList`](crate::ChildList) of the parent.
    pub(super) fn unlist_child(&mut self, parent: &Arc<Node>, child: ChildIdx) {
        self.steps.push(Step::Unlist { parent: Arc::clone(parent), child });
    }

    /// Moves the users of `old` that `which` accepts to `new`. The users that exist when the change is made are moved, also if
    /// they are new. `new` and the nodes below `new` stay users of `old`, so `new` may be a filter above `old`. Users that need
    /// this node stay: jobs, and images that are being created.
    pub fn replace_node(
        &mut self,
        old: &Arc<Node>,
        new: &Arc<Node>,
        which: impl Fn(&Edge) -> bool + Send + 'static,
    ) {
        let (old, new, which) = (Arc::clone(old), Arc::clone(new), Box::new(which));
        self.steps.push(Step::Node { old, new, which });
    }

    /// Moves the users of a filter to the node that the filter shows when the change is made. If the filter has no user then, it
    /// is closed.
    pub fn remove_filter(&mut self, filter: &Arc<Node>) {
        self.steps.push(Step::RemoveFilter { filter: Arc::clone(filter) });
    }

    /// Makes `node` the root node of `backend`. The backend keeps its permissions.
    pub fn set_root(&mut self, backend: &Backend, node: &Arc<Node>) {
        self.steps.push(Step::Root { backend: backend.clone(), node: Some(Arc::clone(node)) });
    }

    /// Gives `backend` a root node. The change fails if the backend has a root node then.
    pub(crate) fn insert_root(&mut self, backend: &Backend, node: &Arc<Node>) {
        self.steps.push(Step::Insert { backend: backend.clone(), node: Arc::clone(node) });
    }

    /// Takes the root node of `backend` away. The backend is empty afterwards ([`Backend::empty`]).
    pub fn remove_root(&mut self, backend: &Backend) {
        self.steps.push(Step::Root { backend: backend.clone(), node: None });
    }

    /// Makes the change. Nodes that have no user afterwards are closed; the log reports an error of such a close.
    ///
    /// # Errors
    /// When a node is closed or belongs to another graph, when a node of the change is just being opened, when a link is frozen
    /// by a job, when a node would be below itself, when permissions conflict, or when a flush fails. After an error, nothing
    /// has changed.
    pub async fn run(self) -> Result<()> {
        let structure = self.graph.lock_structure().await;
        self.run_locked(structure, || {}).await
    }

    /// Like [`Self::run`], for a caller that holds the lock of changes to several nodes. `made` is called when the change has been
    /// made, before requests resume.
    pub(super) async fn run_locked(
        self,
        structure: RwLockWriteGuardArc<()>,
        made: impl FnOnce() + 'static,
    ) -> Result<()> {
        let Self { graph, steps, mut action } = self;
        steps.iter().try_for_each(Step::check)?;
        let used = action.iter().flat_map(|action| action.nodes());
        let touched = graph.touched(steps.iter().flat_map(Step::touched).chain(used))?;
        let controls = graph.controls_for_change(&touched).await;
        // An empty backend is above no node yet.
        let backends: Vec<_> = steps.iter().filter_map(Step::backend).cloned().collect();
        let drained = graph.drain_all(&touched, &backends).await?;
        // If the thread ends halfway, the nodes stay locked until the host has completed the operations that were begun.
        let guards = UntilSettled::new((drained, controls));
        run_to_completion(async move {
            let changed = each_once(steps.iter().filter_map(Step::changed));
            let losing = each_once(steps.iter().filter_map(Step::losing));
            let media: Vec<_> = steps.iter().filter_map(Step::medium).collect();
            let released = match flush(&losing).await {
                Ok(()) => make(change(&graph, steps), action.as_deref_mut()).await,
                Err(error) => Err(error),
            };
            let released = match released {
                Ok(released) => released,
                Err(error) => {
                    // A failed flush may leave host I/O in flight.
                    oxblk_ring::settled().await;
                    drop(guards.release());
                    return Err(error);
                }
            };
            if let Some(action) = &mut action {
                action.commit();
            }
            made();
            media.iter().for_each(MediumChange::made);
            for node in nodes_above(&changed).iter().filter(|node| !node.is_read_only()) {
                // The children are others now and may have data to flush.
                node.mark_unflushed();
            }
            graph.extend_drains();
            refresh(&changed).await;
            media.iter().for_each(MediumChange::report);
            // Requests resume before the next control operation gets a lock.
            drop(guards.release());
            for node in released {
                graph.close_released(node).await;
            }
            drop(structure);
            Ok(())
        })
        .await
    }
}

impl Graph {
    /// The nodes that the steps and the action concern, each once. They are drained.
    fn touched(&self, nodes: impl Iterator<Item = Arc<Node>>) -> Result<Vec<Arc<Node>>> {
        let nodes = each_once(nodes);
        for node in &nodes {
            if !Arc::ptr_eq(node.change_lock(), self.change_lock()) {
                let text = format!("Node '{}' belongs to another graph", node.name());
                return Err(Error::invalid(text));
            }
        }
        Ok(nodes)
    }
}

fn each_once(nodes: impl Iterator<Item = Arc<Node>>) -> Vec<Arc<Node>> {
    let mut seen = HashSet::new();
    nodes.filter(|node| seen.insert(Arc::as_ptr(node))).collect()
}

/// Flushes nodes that are drained and will lose a user or a child. A write marks only the node through which it enters the graph as
/// unflushed, so the nodes are marked first.
async fn flush(nodes: &[Arc<Node>]) -> Result<()> {
    for node in nodes_above(nodes) {
        if let Some(work) = node.driver().before_below_changes() {
            work.await?;
        }
    }
    for node in nodes.iter().filter(|node| !node.is_read_only()) {
        node.mark_unflushed();
        request::flush(node).await?;
    }
    Ok(())
}

impl Step {
    /// Refuses to remove a child that is no backing file. The caller holds the lock of changes, so the child stays the same.
    fn check(&self) -> Result<()> {
        let Self::Child { parent, child, new: None } = self else { return Ok(()) };
        match parent.children().get(*child) {
            Some(old) if !old.roles().contains(Roles::COW) => {
                let (name, parent) = (old.name(), parent.name());
                Err(Error::invalid(format!("Cannot remove the '{name}' child of '{parent}'")))
            }
            _ => Ok(()),
        }
    }

    /// The nodes that get other users or children. The node that loses a user or a child comes first.
    fn touched(&self) -> Vec<Arc<Node>> {
        match self {
            Self::Child { parent, .. }
            | Self::NewChild { parent, .. }
            | Self::Unlist { parent, .. } => vec![Arc::clone(parent)],
            Self::Node { old, new, .. } => vec![Arc::clone(old), Arc::clone(new)],
            Self::RemoveFilter { filter } => {
                let below = filter.filtered_child().map(|edge| Arc::clone(edge.node()));
                [Arc::clone(filter)].into_iter().chain(below).collect()
            }
            Self::Root { backend, node } => {
                backend.node().into_iter().chain(node.clone()).collect()
            }
            Self::Insert { node, .. } => vec![Arc::clone(node)],
        }
    }

    /// The backend that gets or loses its root node.
    fn backend(&self) -> Option<&Backend> {
        match self {
            Self::Root { backend, .. } | Self::Insert { backend, .. } => Some(backend),
            _ => None,
        }
    }

    /// The change of the medium of a backend.
    fn medium(&self) -> Option<MediumChange> {
        let (backend, node, is_inserted) = match self {
            Self::Insert { backend, node } => (backend, Arc::clone(node), true),
            Self::Root { backend, node: None } => (backend, backend.node().ok()?, false),
            _ => return None,
        };
        Some(MediumChange { backend: backend.clone(), node, is_inserted })
    }

    /// The node that loses a user or a child.
    fn losing(&self) -> Option<Arc<Node>> {
        match self {
            Self::Insert { .. } => None,
            step => step.touched().into_iter().next(),
        }
    }

    /// The node whose users see other nodes after this step.
    fn changed(&self) -> Option<Arc<Node>> {
        match self {
            Self::Child { parent, .. }
            | Self::NewChild { parent, .. }
            | Self::Unlist { parent, .. } => Some(Arc::clone(parent)),
            Self::Node { new, .. } | Self::Insert { node: new, .. } => Some(Arc::clone(new)),
            Self::RemoveFilter { filter } => {
                filter.filtered_child().map(|edge| Arc::clone(edge.node()))
            }
            Self::Root { node, .. } => node.clone(),
        }
    }
}

/// A backend gets or loses its root node.
struct MediumChange {
    backend: Backend,
    node: Arc<Node>,
    is_inserted: bool,
}

impl MediumChange {
    /// The change is made, and requests are held back.
    fn made(&self) {
        if !self.is_inserted {
            // The requests must not continue with another medium.
            self.backend.fail_held();
        }
    }

    fn report(&self) {
        let (source, node_name) = (self.backend.event_source(), self.node.name().to_owned());
        self.backend.graph().events().raise(&match self.is_inserted {
            true => {
                let size = self.node.size();
                BlockEvent::MediumInserted { source, node_name, size }
            }
            false => BlockEvent::MediumRemoved { source, node_name },
        });
    }
}

/// Makes the change, after the work of the action. Returns the nodes that have lost a user.
async fn make(change: Change, action: Option<&mut (dyn Action + '_)>) -> Result<Vec<Arc<Node>>> {
    let Some(action) = action else { return change.commit() };
    mark_unflushed(action);
    let made = match action.prepare().await {
        Ok(()) => change.commit(),
        Err(error) => Err(error),
    };
    if made.is_err() {
        // Failed requests may leave host I/O in flight.
        oxblk_ring::settled().await;
        action.abort();
    }
    made
}

/// The change of the graph.
fn change(graph: &Graph, steps: Vec<Step>) -> Change {
    let mut change = Change::new(graph.change_lock());
    for step in steps {
        match step {
            Step::Child { parent, child, new } => {
                change.replace_child(&parent, child, new.as_ref());
            }
            Step::Unlist { parent, child } => change.replace_child(&parent, child, None),
            Step::NewChild { parent, child, name, roles, node } => {
                change.add_child(&parent, child, &name, roles, &node);
            }
            Step::Node { old, new, which } => change.replace_node(&old, &new, which),
            Step::Root { backend, node: Some(node) } => change.set_root(&backend, node),
            Step::RemoveFilter { filter } => change.remove_filter(&filter),
            Step::Insert { backend, node } => change.insert_root(&backend, node),
            Step::Root { backend, node: None } => change.remove_root(&backend),
        }
    }
    change
}

/// Updates the limits and sizes of the nodes `changed` and of all nodes above them, the children of a node before the node.
/// Returns these nodes. The caller holds back the requests.
pub(super) async fn refresh(changed: &[Arc<Node>]) -> Vec<Arc<Node>> {
    let mut above = Above::of(changed);
    above.backends.iter().for_each(Backend::update_root);
    let backends = std::mem::take(&mut above.backends);
    let nodes = above.bottom_up();
    for node in &nodes {
        node.driver().below_changed();
        node.refresh_limits();
        let size = match node.driver().refresh_size() {
            Some(size) => size.await,
            None => Ok(node.driver().size()),
        };
        match size {
            Ok(size) => node.set_size(size),
            Err(error) => {
                tracing::error!(node = node.name(), %error, "cannot get the size of a block node");
            }
        }
    }
    // The size of a disk also changes with its root node.
    backends.iter().for_each(Backend::report_size);
    nodes
}
