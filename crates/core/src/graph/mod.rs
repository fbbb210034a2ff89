//! The graph: all nodes and backends of one program, and operations on them.
//!
//! A [`Graph`] has a table of drivers, finds nodes by name, opens ([`open`]) and creates images, drains nodes, and
//! closes nodes that have no user. Requests do not pass through the [`Graph`].

mod action;
mod backing;
mod base;
mod bitmaps;
mod chain;
mod change;
mod child;
mod create;
mod data_file;
mod drain;
mod filename;
mod generic;
mod live_children;
mod open;
mod opening;
mod probe;
mod removal;
mod reopen;
mod walk;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

pub use action::Action;
pub use base::WritableBase;
pub use change::GraphChange;
pub use drain::Drained;
pub use filename::relative_to;
pub(crate) use filename::scheme;
pub use open::{BackingFile, OpenContext, OpenFlags};
pub use reopen::ReopenRequest;
pub(crate) use walk::{epochs_above, is_below, nodes_above, nodes_below, nodes_from, observer};

use oxblk_ring::{RwLock, RwLockReadGuardArc, RwLockWriteGuardArc};

use crate::backend::WeakBackend;
use crate::change::ChangeLock;
use crate::control::{Controls, in_background, run_to_completion};
use crate::driver::{BoxFuture, Driver, DriverFactory, DriverTable};
use crate::gate::Gate;
use crate::node::{NodeParts, Settings};
use crate::{
    Backend, Children, Error, ErrorKind, Events, Node, Objects, Operations, Result, Secrets,
};

#[derive(Default)]
struct Registry {
    nodes: HashMap<String, Weak<Node>>,
    /// The entries of nodes that no longer exist are removed when `nodes` has this length.
    nodes_are_pruned_at: usize,
    /// Names of nodes that are being opened.
    claimed: HashSet<String>,
    /// Nodes that stay alive without users (`blockdev-add`).
    kept_open: Vec<Arc<Node>>,
    /// Backends that are not closed. A backend has a reference to its graph, so the graph has only weak references to
    /// backends.
    backends: Vec<WeakBackend>,
    /// Drains in progress. Each drain holds back the requests of all backends that can reach the drained node.
    drains: Vec<drain::Active>,
    next_drain: u64,
}

impl Registry {
    /// Removes the entries of nodes that no longer exist, once their number may have doubled.
    fn prune_nodes(&mut self) {
        if self.nodes.len() >= self.nodes_are_pruned_at {
            self.nodes.retain(|_, node| node.strong_count() > 0);
            self.nodes_are_pruned_at = self.nodes.len().saturating_mul(2).max(64);
        }
    }
}

struct Inner {
    drivers: DriverTable,
    registry: Mutex<Registry>,
    next_name: AtomicU64,
    warner: fn(&str),
    objects: Objects,
    events: Events,
    /// Held by changes to several nodes ([`GraphChange`], reopen), one at a time, and shared by opens that refer to nodes.
    structure_lock: Arc<RwLock<()>>,
    change_lock: ChangeLock,
}

/// A reserved node-name: no other node can get the name until this value is dropped.
struct ClaimedName {
    graph: Graph,
    name: String,
}

impl Drop for ClaimedName {
    fn drop(&mut self) {
        self.graph.registry().claimed.remove(&self.name);
    }
}

/// All nodes and backends of one program, together with the gate for images that are opened through this handle. Clones
/// refer to the same graph.
#[derive(Clone)]
pub struct Graph {
    inner: Arc<Inner>,
    gate: Gate,
}

fn warn_in_log(text: &str) {
    tracing::warn!("{text}");
}

impl Graph {
    /// An empty graph with a table of drivers. `gate` decides which other files may be opened for images that are
    /// opened through the returned handle.
    pub fn new(drivers: DriverTable, gate: Gate) -> Self {
        Self::with_parts(drivers, gate, warn_in_log, Objects::default())
    }

    /// Like [`Self::new`], with a function that reports warnings. Tools print warnings; a graph made by [`Self::new`]
    /// writes warnings to the log.
    pub fn with_warner(drivers: DriverTable, gate: Gate, warner: fn(&str)) -> Self {
        Self::with_parts(drivers, gate, warner, Objects::default())
    }

    /// An empty graph whose images may use `secrets`, including secrets that are added to the set later.
    pub fn with_secrets(drivers: DriverTable, gate: Gate, secrets: Secrets) -> Self {
        Self::with_objects(drivers, gate, secrets.into())
    }

    /// An empty graph whose images may refer to `objects`, including objects that are added to the set later.
    pub fn with_objects(drivers: DriverTable, gate: Gate, objects: Objects) -> Self {
        Self::with_parts(drivers, gate, warn_in_log, objects)
    }

    fn with_parts(drivers: DriverTable, gate: Gate, warner: fn(&str), objects: Objects) -> Self {
        let inner = Inner {
            drivers,
            registry: Mutex::default(),
            next_name: AtomicU64::new(0),
            warner,
            objects,
            events: Events::default(),
            structure_lock: Arc::default(),
            change_lock: ChangeLock::default(),
        };
        Self { inner: Arc::new(inner), gate }
    }

    /// A handle to the same graph, with another gate for the images that are opened through the new handle.
    #[must_use]
    pub fn with_gate(&self, gate: Gate) -> Self {
        Self { inner: Arc::clone(&self.inner), gate }
    }

    /// The gate for images that are opened through this handle.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The table of drivers.
    pub fn drivers(&self) -> DriverTable {
        self.inner.drivers
    }

    /// The driver with this name.
    ///
    /// # Errors
    /// When there is no such driver.
    pub fn driver(&self, name: &str) -> Result<&'static dyn DriverFactory> {
        self.inner
            .drivers
            .iter()
            .find(|driver| driver.name() == name)
            .copied()
            .ok_or_else(|| filename::no_driver(name))
    }

    /// The secrets that images may refer to.
    pub fn secrets(&self) -> &Secrets {
        self.inner.objects.secrets()
    }

    /// The objects to which options may refer.
    pub fn objects(&self) -> &Objects {
        &self.inner.objects
    }

    /// The events that the nodes of this graph report.
    pub fn events(&self) -> &Events {
        &self.inner.events
    }

    /// Waits until no other change to several nodes is in progress, and no image is being opened that refers to a node.
    async fn lock_structure(&self) -> RwLockWriteGuardArc<()> {
        self.inner.structure_lock.write_arc().await
    }

    /// Waits until no change to several nodes is in progress.
    async fn share_structure(&self) -> RwLockReadGuardArc<()> {
        self.inner.structure_lock.read_arc().await
    }

    /// Warns the user about something that is dangerous but not an error.
    pub fn warn(&self, text: &str) {
        (self.inner.warner)(text);
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.inner.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node with this name.
    pub fn node(&self, name: &str) -> Option<Arc<Node>> {
        self.registry().nodes.get(name).and_then(Weak::upgrade)
    }

    /// All nodes of the graph.
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        self.registry().nodes.values().filter_map(Weak::upgrade).collect()
    }

    /// All backends of the graph that are not closed.
    pub fn backends(&self) -> Vec<Backend> {
        self.registry().backends.iter().filter_map(WeakBackend::upgrade).collect()
    }

    /// Keeps `node` alive without users, until [`Self::allow_close`].
    ///
    /// # Errors
    /// When the node is being closed.
    pub fn keep_open(&self, node: Arc<Node>) -> Result<()> {
        node.users().keep_open().map_err(|error| error.on_node(node.name()))?;
        self.registry().kept_open.push(node);
        Ok(())
    }

    /// Undoes [`Self::keep_open`], and closes the node if it has no user.
    ///
    /// # Errors
    /// `EBUSY` if a job or an export blocks [`Operations::DELETE`]; the errors of [`Self::release`].
    pub async fn allow_close(&self, node: Arc<Node>) -> Result<()> {
        node.check_operation(Operations::DELETE)?;
        node.users().allow_close();
        self.registry().kept_open.retain(|other| !Arc::ptr_eq(other, &node));
        self.release(node).await
    }

    /// Adds `backend` to the graph. If the backend can reach a drained node, the backend is held back before its first
    /// request.
    pub(crate) fn register_backend(&self, backend: &Backend) {
        let mut registry = self.registry();
        registry.backends.retain(WeakBackend::exists);
        registry.backends.push(backend.downgrade());
        let rest = registry.extend_drains();
        drop(registry);
        rest.finish();
    }

    pub(crate) fn unregister_backend(&self, backend: &Backend) {
        self.registry().backends.retain(|other| !other.is(backend));
    }

    /// Generates a node-name. The name is not valid as a user's node-name, and no other node has the same name.
    fn generate_name(&self) -> String {
        format!("#block{:03}", self.inner.next_name.fetch_add(1, Relaxed))
    }

    /// Adds a node for a driver that the caller has made (tests, embedders with their own storage).
    ///
    /// # Errors
    /// When the name is in use or not valid.
    pub fn add_node(
        &self,
        name: Option<&str>,
        factory: &'static dyn DriverFactory,
        driver: Box<dyn Driver>,
        flags: OpenFlags,
    ) -> Result<Arc<Node>> {
        let claimed = self.claim_name(name)?;
        let parts = NodeParts {
            name: claimed.name.clone(),
            factory,
            driver,
            children: Arc::new(Children::default()),
            epochs: Arc::default(),
            settings: Settings { flags, ..Settings::default() },
            filename: None,
            change_lock: Arc::clone(self.change_lock()),
            events: self.events().clone(),
        };
        Ok(self.insert(claimed, parts))
    }

    pub(crate) fn change_lock(&self) -> &ChangeLock {
        &self.inner.change_lock
    }

    /// Reserves a name for a node that is being opened. Without `name`, a name is generated.
    fn claim_name(&self, name: Option<&str>) -> Result<ClaimedName> {
        let generated = name.is_none().then(|| self.generate_name());
        if let Some(name) = name {
            check_name(name)?;
        }
        let name = generated.as_deref().or(name).unwrap_or_default();
        let mut registry = self.registry();
        let exists = registry.nodes.get(name).is_some_and(|node| node.strong_count() > 0);
        if exists || !registry.claimed.insert(name.to_owned()) {
            let text = format!("Duplicate nodes with node-name='{name}'");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        drop(registry);
        Ok(ClaimedName { graph: self.clone(), name: name.to_owned() })
    }

    /// Adds a node whose name is claimed.
    fn insert(&self, claimed: ClaimedName, parts: NodeParts) -> Arc<Node> {
        let node = Node::new(parts);
        let mut registry = self.registry();
        registry.prune_nodes();
        registry.nodes.insert(node.name().to_owned(), Arc::downgrade(&node));
        drop(registry);
        // The node is in the registry now, so its name stays reserved.
        drop(claimed);
        node
    }

    /// Like [`Self::release`], after another failure. The log reports an error of the release, because the caller
    /// reports the first failure.
    pub(crate) async fn release_after_failure(&self, node: Arc<Node>) {
        let name = node.name().to_owned();
        if let Err(error) = self.release(node).await {
            tracing::warn!(node = name, %error, "cannot close a node after another failure");
        }
    }

    /// Like [`Self::release`], for a node that has lost a user by a change. The change is made already, so the log reports an
    /// error.
    async fn close_released(&self, node: Arc<Node>) {
        let name = node.name().to_owned();
        if let Err(error) = self.release(node).await {
            tracing::error!("cannot close '{name}', which has no user any more: {error}");
        }
    }

    /// Closes `node` if it has no user. Then closes every child that has no user any more, and so on down the graph. Waits for
    /// control operations on `node` and on the nodes below it. Once begun, the release runs to its end even if the returned
    /// future is dropped.
    ///
    /// # Errors
    /// The first failure. After a failure, the remaining nodes are closed too.
    pub fn release(&self, node: Arc<Node>) -> BoxFuture<'_, Result<()>> {
        let graph = self.clone();
        Box::pin(run_to_completion(async move {
            if !node.is_unused() {
                return Ok(());
            }
            let controls = graph.controls(&node).await;
            graph.release_unused(node, &controls).await
        }))
    }

    /// Like [`Self::release`]. The caller holds the control locks of `node` and of the nodes below it.
    pub(crate) async fn release_unused(&self, node: Arc<Node>, _: &Controls) -> Result<()> {
        let mut outcome = Ok(());
        // This function is iterative, because a backing chain may be long.
        let mut released = vec![node];
        while let Some(node) = released.pop() {
            if !node.close_if_unused() {
                continue;
            }
            let closed = match node.driver().close() {
                Some(request) => request.await.map_err(|error| error.on_node(node.name())),
                None => Ok(()),
            };
            outcome = outcome.and(closed);
            self.registry().nodes.remove(node.name());
            released.extend(node.children().detach());
        }
        outcome
    }
}

/// A node that has just been opened and has no user. Dropping this value closes the node in the background.
struct Opened {
    graph: Graph,
    node: Option<Arc<Node>>,
}

impl Opened {
    /// Returns the node, which is then no longer closed automatically.
    fn keep(mut self) -> Option<Arc<Node>> {
        self.node.take()
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            let graph = self.graph.clone();
            in_background(async move { graph.release_after_failure(node).await });
        }
    }
}

fn check_name(name: &str) -> Result<()> {
    let well_formed = name.chars().next().is_some_and(|c| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    if !well_formed || name.len() > 31 {
        return Err(Error::invalid(format!("Invalid node-name: '{name}'")));
    }
    Ok(())
}
