//! The graph: all nodes and backends of one embedding, and what happens to them as a whole.
//!
//! A [`Graph`] knows its table of drivers, finds nodes by name, opens ([`open`]) and creates images, drains, and
//! closes nodes that nobody uses any more. It is control plane: requests never come here. The one thing they share
//! through it is the epoch domain.

mod base;
mod bitmaps;
mod chain;
mod create;
mod data_file;
mod drain;
mod filename;
mod generic;
mod open;
mod probe;
mod reopen;

use std::collections::HashMap;
use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

pub use base::WritableBase;
pub use drain::Drained;
pub use filename::relative_to;
pub(crate) use filename::scheme;
pub use open::{BackingFile, OpenContext, OpenFlags};
pub use reopen::ReopenRequest;

use crate::backend::WeakBackend;
use crate::control::ControlLock;
use crate::driver::{BoxFuture, Driver, DriverFactory, DriverTable};
use crate::epoch::Epochs;
use crate::gate::Gate;
use crate::node::{NodeParts, Settings};
use crate::{Backend, Children, Error, ErrorKind, Node, Result, Secrets};

#[derive(Default)]
struct Registry {
    nodes: HashMap<String, Weak<Node>>,
    /// Nodes that live although nobody uses them (`blockdev-add`).
    owned: Vec<Arc<Node>>,
    /// Backends that are not closed. A backend keeps its graph, so the graph does not keep it.
    backends: Vec<WeakBackend>,
    /// Drains under way: what holds back the backends of each.
    drains: Vec<drain::Active>,
    next_drain: u64,
}

struct Inner {
    drivers: DriverTable,
    epochs: Arc<Epochs>,
    registry: Mutex<Registry>,
    next_name: AtomicU64,
    warner: fn(&str),
    secrets: Secrets,
    /// A node has been opened whose reads may write.
    copies_on_read: AtomicBool,
    /// Held by the reopen that is under way.
    reopening: ControlLock,
}

/// All nodes and backends of one embedding, and what images opened through this handle may pull in. Clones are the same
/// graph.
#[derive(Clone)]
pub struct Graph {
    inner: Arc<Inner>,
    gate: Gate,
}

fn warn_in_log(text: &str) {
    tracing::warn!("{text}");
}

impl Graph {
    /// An empty graph that knows `drivers`. `gate` says what its images may pull in.
    pub fn new(drivers: DriverTable, gate: Gate) -> Self {
        Self::with_parts(drivers, gate, warn_in_log, Secrets::default())
    }

    /// The same, with warnings told by `warner` (tools print them); the default is the log.
    pub fn with_warner(drivers: DriverTable, gate: Gate, warner: fn(&str)) -> Self {
        Self::with_parts(drivers, gate, warner, Secrets::default())
    }

    /// An empty graph whose images may use the secrets of `secrets`, also those that are added to it later.
    pub fn with_secrets(drivers: DriverTable, gate: Gate, secrets: Secrets) -> Self {
        Self::with_parts(drivers, gate, warn_in_log, secrets)
    }

    fn with_parts(drivers: DriverTable, gate: Gate, warner: fn(&str), secrets: Secrets) -> Self {
        let inner = Inner {
            drivers,
            epochs: Arc::default(),
            registry: Mutex::default(),
            next_name: AtomicU64::new(0),
            warner,
            secrets,
            copies_on_read: AtomicBool::new(false),
            reopening: ControlLock::default(),
        };
        Self { inner: Arc::new(inner), gate }
    }

    /// The same graph, for images that may pull in something else.
    #[must_use]
    pub fn with_gate(&self, gate: Gate) -> Self {
        Self { inner: Arc::clone(&self.inner), gate }
    }

    /// What images that are opened through this handle may pull in.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The drivers it knows.
    pub fn drivers(&self) -> DriverTable {
        self.inner.drivers
    }

    /// The driver of a name.
    ///
    /// # Errors
    /// When there is none.
    pub fn driver(&self, name: &str) -> Result<&'static dyn DriverFactory> {
        self.inner
            .drivers
            .iter()
            .find(|driver| driver.name() == name)
            .copied()
            .ok_or_else(|| filename::no_driver(name))
    }

    /// The secrets that images may name.
    pub fn secrets(&self) -> &Secrets {
        &self.inner.secrets
    }

    /// The epoch domain.
    pub fn epochs(&self) -> &Arc<Epochs> {
        &self.inner.epochs
    }

    pub(crate) fn reopening(&self) -> &ControlLock {
        &self.inner.reopening
    }

    /// Tells the user of something that is dangerous but not wrong.
    pub fn warn(&self, text: &str) {
        (self.inner.warner)(text);
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.inner.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node of a name.
    pub fn node(&self, name: &str) -> Option<Arc<Node>> {
        self.registry().nodes.get(name).and_then(Weak::upgrade)
    }

    /// All nodes.
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        self.registry().nodes.values().filter_map(Weak::upgrade).collect()
    }

    /// All backends.
    pub fn backends(&self) -> Vec<Backend> {
        self.registry().backends.iter().filter_map(WeakBackend::upgrade).collect()
    }

    /// Keeps `node` alive although nobody uses it, until [`Self::disown`].
    ///
    /// # Errors
    /// When the node is being closed.
    pub fn own(&self, node: Arc<Node>) -> Result<()> {
        node.users().own().map_err(|error| error.on_node(node.name()))?;
        self.registry().owned.push(node);
        Ok(())
    }

    /// Undoes [`Self::own`] and closes the node if nobody uses it.
    ///
    /// # Errors
    /// As [`Self::release`].
    pub async fn disown(&self, node: Arc<Node>) -> Result<()> {
        node.users().disown();
        self.registry().owned.retain(|other| !Arc::ptr_eq(other, &node));
        self.release(node).await
    }

    /// Makes `backend` known; drains under way that concern it hold it back from its first request on.
    pub(crate) fn register_backend(&self, backend: &Backend) {
        let mut registry = self.registry();
        registry.backends.retain(WeakBackend::exists);
        registry.backends.push(backend.downgrade());
        let looked_at = registry.extend_drains();
        drop(registry);
        drop(looked_at);
    }

    pub(crate) fn unregister_backend(&self, backend: &Backend) {
        self.registry().backends.retain(|other| !other.is(backend));
    }

    /// A name that no node has.
    fn generate_name(&self) -> String {
        format!("#block{:03}", self.inner.next_name.fetch_add(1, Relaxed))
    }

    /// Adds a node around a driver made by hand (tests, embedders with storage of their own).
    ///
    /// # Errors
    /// When the name is taken.
    pub fn add_node(
        &self,
        name: Option<&str>,
        factory: &'static dyn DriverFactory,
        driver: Box<dyn Driver>,
        flags: OpenFlags,
    ) -> Result<Arc<Node>> {
        let name = self.claim_name(name)?;
        Ok(self.insert(NodeParts {
            name,
            factory,
            driver,
            children: Arc::new(Children::default()),
            epochs: Arc::clone(self.epochs()),
            settings: Settings { flags, ..Settings::default() },
            filename: None,
        }))
    }

    fn claim_name(&self, name: Option<&str>) -> Result<String> {
        let Some(name) = name else { return Ok(self.generate_name()) };
        let well_formed = name.chars().next().is_some_and(|c| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        if !well_formed || name.len() > 31 {
            return Err(Error::invalid(format!("Invalid node-name: '{name}'")));
        }
        if self.node(name).is_some() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("Duplicate nodes with node-name='{name}'"),
            ));
        }
        Ok(name.to_owned())
    }

    /// Whether there has been a node whose reads may write.
    pub(crate) fn copies_on_read(&self) -> bool {
        self.inner.copies_on_read.load(Acquire)
    }

    fn insert(&self, parts: NodeParts) -> Arc<Node> {
        if parts.settings.flags.copy_on_read {
            self.inner.copies_on_read.store(true, Release);
        }
        let node = Node::new(parts);
        let mut registry = self.registry();
        registry.nodes.retain(|_, other| other.strong_count() > 0);
        registry.nodes.insert(node.name().to_owned(), Arc::downgrade(&node));
        node
    }

    /// The same after a failure, which is what is reported.
    pub(crate) async fn release_after_failure(&self, node: Arc<Node>) {
        let name = node.name().to_owned();
        if let Err(error) = self.release(node).await {
            tracing::warn!(node = name, %error, "closing what is not needed after a failure");
        }
    }

    /// Closes `node` and then its children, as far as nobody uses them.
    ///
    /// # Errors
    /// The first failure; everything is closed all the same.
    pub fn release(&self, node: Arc<Node>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let mut outcome = Ok(());
            // No recursion: a chain of backing files may be long.
            let mut released = vec![node];
            while let Some(node) = released.pop() {
                if !node.users().close() {
                    continue;
                }
                let closed = match node.driver().close() {
                    Some(request) => request.await.map_err(|error| error.on_node(node.name())),
                    None => Ok(()),
                };
                outcome = outcome.and(closed);
                self.registry().nodes.remove(node.name());
                let children: Vec<_> = node.children().iter().collect();
                for (child, edge) in children.into_iter().rev() {
                    node.children().set(child, None);
                    edge.detach();
                    released.push(Arc::clone(edge.node()));
                }
            }
            outcome
        })
    }
}
