//! Control operations: what changes or replaces an image as a whole, such as a snapshot or another size.
//!
//! Each has its node to itself: it holds the node's [`ControlLock`], and requests are held back. Once begun it runs to its
//! end, also when its future is dropped: a driver that stopped halfway would be left with metadata that does not fit
//! together. A reopen, and an operation that passes through several nodes, hold the locks of all nodes that they concern; there is
//! one of these at a time in a graph, so that two never wait for each other. A holder of the lock of one node never waits for
//! another node's lock.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use oxblk_ring::{Mutex, MutexGuardArc, Task, UntilSettled};

use crate::backend::no_medium;
use crate::{Drained, Graph, Node, Result};

/// Held by the control operation that is under way on a node.
#[derive(Debug, Default)]
pub(crate) struct ControlLock(Arc<Mutex<()>>);

impl ControlLock {
    /// Waits until no other control operation is under way. Others wait until the guard is dropped.
    pub(crate) async fn acquire(&self) -> ControlGuard {
        ControlGuard { _guard: self.0.lock_arc().await }
    }
}

/// Keeps other control operations away.
pub(crate) struct ControlGuard {
    _guard: MutexGuardArc<()>,
}

/// Has a node to itself: no request and no other control operation is under way.
pub(crate) struct Exclusive {
    // In this order: requests go on before the next operation has its turn.
    _drained: Drained,
    _control: ControlGuard,
    _controls_above: Vec<ControlGuard>,
}

impl Graph {
    /// Waits until nothing else is under way on `node`, and keeps it so.
    pub(crate) async fn exclusive(&self, node: &Arc<Node>) -> Exclusive {
        let control = node.control_lock().acquire().await;
        Exclusive {
            _drained: self.drain(node).await,
            _control: control,
            _controls_above: Vec::new(),
        }
    }

    /// Carries out `work` on `node` while nothing else is under way there, to its end even if the caller's future is
    /// dropped before.
    pub(crate) async fn run_exclusive<T, W, F>(&self, node: &Arc<Node>, work: W) -> Result<T>
    where
        T: 'static,
        W: FnOnce(Arc<Node>) -> F + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        let exclusive = self.exclusive(node).await;
        Self::carry_out(exclusive, node, work).await
    }

    /// As [`Self::run_exclusive`] for a caller that reaches `node` through the nodes `above` it, of which the first is the
    /// uppermost: no control operation is under way on those either.
    pub(crate) async fn alone_with_below<T, W, F>(
        &self,
        above: Vec<Arc<Node>>,
        node: &Arc<Node>,
        work: W,
    ) -> Result<T>
    where
        T: 'static,
        W: FnOnce(Arc<Node>) -> F + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        if above.is_empty() {
            return self.run_exclusive(node, work).await;
        }
        let mut turns = vec![self.reopening().acquire().await];
        for parent in &above {
            turns.push(parent.control_lock().acquire().await);
        }
        if above.iter().any(|parent| parent.users().is_closed()) {
            return Err(no_medium());
        }
        let exclusive = Exclusive { _controls_above: turns, ..self.exclusive(node).await };
        Self::carry_out(exclusive, node, work).await
    }

    async fn carry_out<T, W, F>(exclusive: Exclusive, node: &Arc<Node>, work: W) -> Result<T>
    where
        T: 'static,
        W: FnOnce(Arc<Node>) -> F + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        if node.users().is_closed() {
            return Err(no_medium());
        }
        let node = Arc::clone(node);
        // Where the thread ends halfway, the node is held until the host has ended what was begun.
        let exclusive = UntilSettled::new(exclusive);
        run_to_completion(async move {
            let outcome = work(node).await;
            if outcome.is_err() {
                // Of what failed, operations may be left that the host is still carrying out.
                oxblk_ring::settled().await;
            }
            drop(exclusive.release());
            outcome
        })
        .await
    }
}

/// Begins `work`, which goes on to its end even if what this returns is dropped before.
pub(crate) fn run_to_completion<T: 'static>(
    work: impl Future<Output = T> + 'static,
) -> impl Future<Output = T> {
    GoesOn(Some(oxblk_ring::spawn(work)))
}

/// A task whose result is wanted, and that goes on by itself when it no longer is.
struct GoesOn<T>(Option<Task<T>>);

impl<T> Future for GoesOn<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        match &mut self.0 {
            Some(task) => Pin::new(task).poll(context),
            None => Poll::Pending,
        }
    }
}

impl<T> Drop for GoesOn<T> {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.detach();
        }
    }
}
