//! [`Users`]: the users of a node, and whether the node is closed.
//!
//! The users of a node are the edges of its parents, and a graph that owns the node. A node without users can be closed
//! once. A closed node accepts no new user. One lock covers both the check for users and the decision to close. So no
//! user can be added between the check and the decision.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::{Edge, Error, ErrorKind, Result};

#[derive(Default)]
struct State {
    edges: Vec<Weak<Edge>>,
    kept_open: bool,
    closed: bool,
}

impl State {
    fn must_be_open(&self) -> Result<()> {
        if self.closed {
            return Err(Error::new(ErrorKind::Busy, "The block node is being closed"));
        }
        Ok(())
    }

    fn is_used(&self) -> bool {
        self.kept_open || self.edges.iter().any(|edge| edge.strong_count() > 0)
    }
}

/// The users of one node.
#[derive(Default)]
pub(crate) struct Users(Mutex<State>);

impl Users {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a parent's edge.
    ///
    /// # Errors
    /// When the node is closed.
    pub(crate) fn add(&self, edge: &Arc<Edge>) -> Result<()> {
        let mut state = self.lock();
        state.must_be_open()?;
        state.edges.push(Arc::downgrade(edge));
        Ok(())
    }

    /// Removes a parent's edge.
    pub(crate) fn remove(&self, edge: &Edge) {
        self.lock().edges.retain(|other| {
            other.strong_count() > 0 && !std::ptr::eq(other.as_ptr(), std::ptr::from_ref(edge))
        });
    }

    /// Whether `edge` is the edge of a parent.
    pub(crate) fn has(&self, edge: &Arc<Edge>) -> bool {
        self.lock().edges.iter().any(|other| std::ptr::eq(other.as_ptr(), Arc::as_ptr(edge)))
    }

    /// Removes the edges that `keep` refuses.
    pub(crate) fn retain(&self, keep: impl Fn(&Edge) -> bool) {
        let kept = |edge: &Weak<Edge>| edge.upgrade().is_some_and(|edge| keep(&edge));
        self.lock().edges.retain(kept);
    }

    /// The edges of the parents.
    pub(crate) fn edges(&self) -> Vec<Arc<Edge>> {
        self.lock().edges.iter().filter_map(Weak::upgrade).collect()
    }

    /// Whether a parent uses the node.
    pub(crate) fn has_edges(&self) -> bool {
        self.lock().edges.iter().any(|edge| edge.strong_count() > 0)
    }

    /// Makes a graph a user of the node.
    ///
    /// # Errors
    /// When the node is closed.
    pub(crate) fn keep_open(&self) -> Result<()> {
        let mut state = self.lock();
        state.must_be_open()?;
        state.kept_open = true;
        Ok(())
    }

    /// Records that the graph no longer owns the node.
    pub(crate) fn allow_close(&self) {
        self.lock().kept_open = false;
    }

    /// Marks the node as closed if it has no user. Returns true to only one caller, which then closes the driver.
    pub(crate) fn close(&self) -> bool {
        let mut state = self.lock();
        if state.closed || state.is_used() {
            return false;
        }
        state.closed = true;
        true
    }

    /// Whether the node has a user.
    pub(crate) fn is_used(&self) -> bool {
        self.lock().is_used()
    }

    /// Whether the node is closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }
}
