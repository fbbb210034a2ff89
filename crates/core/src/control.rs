//! Control operations: what changes or replaces an image as a whole, such as a snapshot or another size.
//!
//! Each has its node to itself. The others of the node wait for their turn, and requests are held back. Once begun it
//! goes on to its end, also when its future is dropped: a driver that stopped halfway would be left with metadata that
//! does not fit together. A reopen takes the turns of all nodes that it concerns, and so does an operation on a node below
//! others that pass everything on to it. Both take the graph's reopen turn before: it keeps two that take several turns
//! from waiting for each other. Nothing else that has a turn waits for another.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use oxblk_ring::{Mutex, MutexGuardArc, Task, UntilSettled};

use crate::backend::no_medium;
use crate::{Drained, Graph, Node, Result};

/// Who of those that change a node is next.
#[derive(Debug, Default)]
pub(crate) struct Turns(Arc<Mutex<()>>);

impl Turns {
    /// Waits until no other control operation is under way. The node is the caller's until this is dropped.
    pub(crate) async fn take(&self) -> Turn {
        Turn { _guard: self.0.lock_arc().await }
    }
}

/// Keeps other control operations away.
pub(crate) struct Turn {
    _guard: MutexGuardArc<()>,
}

/// Has a node to itself: no request and no other control operation is under way.
pub(crate) struct Alone {
    // In this order: requests go on before the next operation has its turn.
    _drained: Drained,
    _turn: Turn,
    _turns_above: Vec<Turn>,
}

impl Graph {
    /// Waits until nothing else is under way on `node`, and keeps it so.
    pub(crate) async fn alone(&self, node: &Arc<Node>) -> Alone {
        let turn = node.turns().take().await;
        Alone { _drained: self.drain(node).await, _turn: turn, _turns_above: Vec::new() }
    }

    /// Carries out `work` on `node` while nothing else is under way there, to its end even if the caller's future is
    /// dropped before.
    pub(crate) async fn alone_with<T, W, F>(&self, node: &Arc<Node>, work: W) -> Result<T>
    where
        T: 'static,
        W: FnOnce(Arc<Node>) -> F + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        let alone = self.alone(node).await;
        Self::carry_out(alone, node, work).await
    }

    /// As [`Self::alone_with`] for a caller that reaches `node` through the nodes `above` it, of which the first is the
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
            return self.alone_with(node, work).await;
        }
        let mut turns = vec![self.reopening().take().await];
        for parent in &above {
            turns.push(parent.turns().take().await);
        }
        if above.iter().any(|parent| parent.users().is_closed()) {
            return Err(no_medium());
        }
        let alone = Alone { _turns_above: turns, ..self.alone(node).await };
        Self::carry_out(alone, node, work).await
    }

    async fn carry_out<T, W, F>(alone: Alone, node: &Arc<Node>, work: W) -> Result<T>
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
        let alone = UntilSettled::new(alone);
        carry_through(async move {
            let outcome = work(node).await;
            if outcome.is_err() {
                // Of what failed, operations may be left that the host is still carrying out.
                oxblk_ring::settled().await;
            }
            drop(alone.release());
            outcome
        })
        .await
    }
}

/// Begins `work`, which goes on to its end even if what this returns is dropped before.
pub(crate) fn carry_through<T: 'static>(
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
