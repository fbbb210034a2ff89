//! Reopens nodes with new options: either all nodes of a reopen change or none of them.
//!
//! 1. Plan the changes: of the given nodes, and of the nodes below that a parent opened implicitly. An implicitly
//!    opened node follows the parent's cache mode and, unless the node is a backing file, the parent's writability.
//!    Parents come before their children.
//! 2. Take the control locks of all these nodes (see [`crate::control`]), and of the other nodes that a flush of these nodes
//!    reaches. Drain all backends that reach the planned nodes. Flush the nodes that become read-only or get another child.
//! 3. Every driver prepares.
//! 4. One [`Change`] of the graph: the children that the options replace, the nodes that become read-only or writable,
//!    and the permissions of the backend that reopens its root.
//! 5. Every driver commits, children first, so that a parent that writes during its commit finds its file writable. Then the
//!    limits of all nodes above are updated.
//!
//! After a failure up to and including step 4, the drivers abort. Step 5 cannot fail. Once all nodes are drained and
//! all locks are taken, the reopen runs to its end even if its future is dropped. Nodes that have lost their last user
//! are closed at the end.

use std::sync::Arc;

use oxblk_ring::RwLockWriteGuardArc;
use serde_json::Value;

use super::change::refresh;
use super::generic::take_generic;
use super::{Graph, OpenFlags};
use crate::backend::no_medium;
use crate::change::Change;
use crate::control::run_to_completion;
use crate::driver::DriverKind;
use crate::node::Settings;
use crate::perm::{Perm, Permissions};
use crate::{Backend, ChildIdx, Edge, Error, Node, Options, Result, request};

/// One node to reopen.
pub struct ReopenRequest {
    /// The node.
    pub node: Arc<Node>,
    /// The new options of the node, including generic ones.
    pub options: Options,
    /// With `keep`, missing options stay unchanged. Without `keep`, missing options return to their defaults. In this
    /// case, the options of a node that has a backing file, or whose image refers to one, must contain `backing`.
    pub keep: bool,
}

/// The complete set of changes of one reopen.
struct Plan<'a> {
    graph: &'a Graph,
    nodes: Vec<Planned>,
    replacements: Vec<Replacement>,
    /// Children of planned nodes that must be planned next.
    below: Vec<ToPlan>,
}

/// A child to replace.
struct Replacement {
    parent: Arc<Node>,
    child: ChildIdx,
    /// The new child. `None`: the parent has no backing file after the reopen.
    new: Option<Arc<Node>>,
}

/// A node to plan, and its flags for missing options.
struct ToPlan {
    request: ReopenRequest,
    base: OpenFlags,
}

struct Planned {
    node: Arc<Node>,
    settings: Settings,
}

impl Graph {
    /// Reopens several nodes: either all of them or none.
    ///
    /// # Errors
    /// When an option cannot change, when the driver, the host or another user refuses the new state, when a flush
    /// fails, or when a node is closed.
    pub async fn reopen(&self, requests: Vec<ReopenRequest>) -> Result<()> {
        let structure = self.lock_structure().await;
        self.reopen_planned(structure, requests, None).await
    }

    /// Reopens the root node of `backend`. If the node becomes read-only, the backend releases its write and resize
    /// permission. If the node becomes writable, the backend takes both permissions.
    pub(crate) async fn reopen_root(&self, backend: &Backend, options: Options) -> Result<()> {
        let structure = self.lock_structure().await;
        let root = backend.root()?;
        let request = ReopenRequest { node: Arc::clone(root.node()), options, keep: true };
        let user = RootUser { backend: backend.clone(), root };
        self.reopen_planned(structure, vec![request], Some(user)).await
    }

    async fn reopen_planned(
        &self,
        structure: RwLockWriteGuardArc<()>,
        requests: Vec<ReopenRequest>,
        user: Option<RootUser>,
    ) -> Result<()> {
        let mut plan =
            Plan { graph: self, nodes: Vec::new(), replacements: Vec::new(), below: Vec::new() };
        for request in requests {
            let base = if request.keep { request.node.flags() } else { defaults(&request.node) };
            plan.node(ToPlan { request, base })?;
            // The planning is iterative, because a backing chain may be long.
            while let Some(next) = plan.below.pop() {
                plan.node(next)?;
            }
        }
        let Plan { nodes, replacements, .. } = plan;
        let planned: Vec<_> = nodes.iter().map(|planned| Arc::clone(&planned.node)).collect();
        let controls = self.controls_for_change(&planned).await;
        let drained = self.drain_all(&planned, &[]).await?;
        let user = user.map(|user| user.plan(&nodes)).transpose()?;
        let graph = self.clone();
        run_to_completion(async move {
            let unused = change(nodes, &replacements, user).await?;
            graph.extend_drains();
            refresh(&planned).await;
            // Requests resume before the next control operation gets a lock.
            drop(drained);
            drop(controls);
            for node in unused {
                graph.close_released(node).await;
            }
            drop(structure);
            Ok(())
        })
        .await
    }
}

/// The backend that reopens its root node.
struct RootUser {
    backend: Backend,
    root: Arc<Edge>,
}

impl RootUser {
    /// Plans the permissions of the backend. The caller has exclusive use of the nodes.
    ///
    /// # Errors
    /// When the backend was closed while the reopen waited for the nodes.
    fn plan(self, nodes: &[Planned]) -> Result<NewPermissions> {
        let root = self.backend.root()?;
        if !Arc::ptr_eq(&root, &self.root) {
            return Err(no_medium());
        }
        let (mut taken, mut dropped) = (Perm::empty(), Perm::empty());
        for planned in nodes.iter().filter(|planned| Arc::ptr_eq(&planned.node, root.node())) {
            match (planned.node.is_read_only(), planned.settings.flags.read_only) {
                (_, true) => dropped = Perm::WRITE | Perm::RESIZE,
                (true, false) => taken = Perm::WRITE | Perm::RESIZE,
                (false, false) => {}
            }
        }
        Ok(NewPermissions { backend: self.backend, taken, dropped })
    }
}

/// A backend, and the permissions that it takes or drops in the reopen.
struct NewPermissions {
    backend: Backend,
    taken: Perm,
    dropped: Perm,
}

/// Carries out a plan. The caller holds back the requests. Returns the nodes that have lost a user.
async fn change(
    nodes: Vec<Planned>,
    replacements: &[Replacement],
    user: Option<NewPermissions>,
) -> Result<Vec<Arc<Node>>> {
    for planned in nodes.iter().filter(|planned| !planned.node.is_read_only()) {
        // A later flush no longer reaches a child that is replaced, unless the child is a backing file.
        let loses_child = replacements.iter().any(|replaced| {
            replaced.child != ChildIdx::BACKING && Arc::ptr_eq(&replaced.parent, &planned.node)
        });
        if planned.settings.flags.read_only || loses_child {
            let flushed = request::flush(&planned.node).await;
            flushed.map_err(|error| error.prefix("Error flushing drive"))?;
        }
    }
    for (at, planned) in nodes.iter().enumerate() {
        if let Err(error) = prepare(planned).await {
            abort(nodes.get(..at).unwrap_or_default()).await;
            return Err(error);
        }
    }
    let replaced = match change_graph(&nodes, replacements, user) {
        Ok(replaced) => replaced,
        Err(error) => {
            abort(&nodes).await;
            return Err(error);
        }
    };
    for planned in nodes.into_iter().rev() {
        if let Some(driver) = planned.node.driver().reopen() {
            driver.commit().await;
        }
        planned.node.apply(planned.settings);
    }
    Ok(replaced)
}

/// Changes backing files, the read-only state and permissions. Returns the nodes that are no longer backing files.
fn change_graph(
    nodes: &[Planned],
    replacements: &[Replacement],
    user: Option<NewPermissions>,
) -> Result<Vec<Arc<Node>>> {
    let Some(first) = nodes.first() else { return Ok(Vec::new()) };
    let mut change = Change::of(&first.node);
    for Replacement { parent, child, new } in replacements {
        change.replace_child(parent, *child, new.as_ref());
    }
    for planned in nodes {
        change.set_read_only(&planned.node, planned.settings.flags.read_only);
    }
    if let Some(NewPermissions { backend, taken, dropped }) = user {
        change.set_backend_permissions(&backend, move |now| Permissions {
            taken: (now.taken | taken) - dropped,
            ..now
        });
    }
    change.commit()
}

/// The flags of a reopened node for missing options: the defaults, except for the flags that no option sets.
fn defaults(node: &Node) -> OpenFlags {
    let now = node.flags();
    OpenFlags {
        no_backing: now.no_backing,
        check: now.check,
        probed: now.probed,
        no_io: now.no_io,
        no_symlinks: now.no_symlinks,
        ..OpenFlags::default()
    }
}

impl Plan<'_> {
    fn node(&mut self, next: ToPlan) -> Result<()> {
        let ToPlan { request: ReopenRequest { node, options, keep }, base } = next;
        let node = &node;
        if self.nodes.iter().any(|other| Arc::ptr_eq(&other.node, node)) {
            return Err(Error::invalid(format!("Node '{}' is to be reopened twice", node.name())));
        }
        let now = node.settings();
        let mut all = Options::new();
        if keep {
            all.overlay(&now.given);
            all.overlay(&now.options);
        }
        all.overlay(&options);
        let children: Vec<_> = ChildIdx::SLOTS
            .into_iter()
            .map(|child| (child, take_child(&mut all, node, child)))
            .collect();
        let generic = take_generic(&mut all, &base)?;
        must_be(generic.driver, node.factory().name(), "driver")?;
        must_be(generic.node_name, node.name(), "node-name")?;
        let mut flags = generic.flags;
        if flags.force_share != now.flags.force_share {
            return Err(Error::invalid("Cannot change the option 'force-share'"));
        }
        flags.probed = now.flags.probed;
        flags.copy_on_read = now.flags.copy_on_read;
        if flags.copy_on_read && flags.read_only {
            return Err(Error::invalid(format!(
                "Can't set node '{}' to r/o with copy-on-read enabled",
                node.name()
            )));
        }
        let settings = Settings {
            flags,
            detect_zeroes: generic.detect_zeroes,
            options: all,
            given: generic.given,
        };
        let flags = settings.flags.clone();
        self.nodes.push(Planned { node: Arc::clone(node), settings });
        // `below` is used as a stack, so the first child is pushed last.
        for (child, option) in children.into_iter().rev() {
            if option.is_none() && child == ChildIdx::BACKING && !keep && may_have_backing(node) {
                let text = format!("backing is missing for '{}'", node.name());
                return Err(Error::invalid(text));
            }
            self.child(node, child, option.as_ref(), &flags, keep)?;
        }
        Ok(())
    }

    fn plan_below(&mut self, node: &Arc<Node>, options: Options, base: OpenFlags, keep: bool) {
        let request = ReopenRequest { node: Arc::clone(node), options, keep };
        self.below.push(ToPlan { request, base });
    }

    fn child(
        &mut self,
        parent: &Arc<Node>,
        child: ChildIdx,
        option: Option<&Value>,
        parent_flags: &OpenFlags,
        keep: bool,
    ) -> Result<()> {
        let current = parent.child(child);
        let named = match (option, &current) {
            (None | Some(Value::Null), None) => return Ok(()),
            (None, Some(node)) => {
                let inherited = inherit(&node.flags(), child, parent_flags);
                // As in QEMU, a filter that cannot be reopened prevents the reopen, even if its flags stay the same.
                let is_fixed =
                    node.factory().kind() == DriverKind::Filter && node.driver().reopen().is_none();
                if node.follows_parent() && (is_fixed || inherited != node.flags()) {
                    self.plan_below(node, Options::new(), inherited, true);
                }
                return Ok(());
            }
            (Some(Value::Object(map)), Some(node)) => {
                let inherited = inherit(&node.flags(), child, parent_flags);
                self.plan_below(node, Options::from_map(map.clone())?, inherited, keep);
                return Ok(());
            }
            (Some(Value::String(name)), Some(node)) if name == node.name() => return Ok(()),
            (Some(Value::Null), Some(_)) => None,
            (Some(Value::String(name)), _) => Some(name),
            (Some(_), _) => return Err(cannot_replace(child)),
        };
        let find = |name: &String| {
            self.graph.node(name).ok_or_else(|| {
                Error::invalid(format!("Cannot find device='' nor node-name='{name}'"))
            })
        };
        let new = named.map(find).transpose()?;
        // Only a backing file can be removed.
        if child != ChildIdx::BACKING && new.is_none() {
            return Err(cannot_replace(child));
        }
        self.replacements.push(Replacement { parent: Arc::clone(parent), child, new });
        Ok(())
    }
}

/// Takes out the option that describes a child. If the driver does not support backing files, `backing` stays among the
/// driver's options.
fn take_child(options: &mut Options, node: &Node, child: ChildIdx) -> Option<Value> {
    if child == ChildIdx::BACKING && !node.factory().supports_backing() {
        return None;
    }
    options.take(node.child_name(child))
}

/// Whether a node has a backing file, or its image refers to a backing file.
fn may_have_backing(node: &Node) -> bool {
    node.factory().supports_backing()
        && (node.children().has(ChildIdx::BACKING)
            || node.driver().info().backing_filename.is_some())
}

fn cannot_replace(child: ChildIdx) -> Error {
    Error::unsupported(format!(
        "Replacing the '{}' child by a reopen is not supported",
        child.name()
    ))
}

/// The flags of a child for missing options, after its parent has been reopened with the flags `parent`.
fn inherit(child_flags: &OpenFlags, child: ChildIdx, parent: &OpenFlags) -> OpenFlags {
    let mut flags = child_flags.clone();
    flags.direct = parent.direct;
    flags.no_flush = parent.no_flush;
    flags.force_share = parent.force_share;
    if child != ChildIdx::BACKING {
        flags.read_only = parent.read_only;
        flags.auto_read_only = parent.auto_read_only;
    }
    flags
}

fn must_be(given: Option<String>, is: &str, option: &str) -> Result<()> {
    match given {
        Some(other) if other != is => {
            Err(Error::invalid(format!("Cannot change the option '{option}'")))
        }
        _ => Ok(()),
    }
}

async fn prepare(planned: &Planned) -> Result<()> {
    let node = &planned.node;
    let Some(driver) = node.driver().reopen() else {
        let what = match node.factory().kind() {
            DriverKind::Protocol => "protocol",
            DriverKind::Format | DriverKind::Filter => "format",
        };
        return Err(Error::unsupported(format!(
            "Block {what} '{}' used by node '{}' does not support reopening files",
            node.factory().name(),
            node.name()
        )));
    };
    let settings = &planned.settings;
    let prepared = driver.prepare(settings.flags.clone(), &settings.options).await;
    prepared.map_err(|error| error.on_node(node.name()))
}

async fn abort(plan: &[Planned]) {
    for planned in plan.iter().rev() {
        if let Some(driver) = planned.node.driver().reopen() {
            driver.abort().await;
        }
    }
}
