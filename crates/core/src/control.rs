//! Control operations: operations that need exclusive use of a node, such as a snapshot, a resize or a check.
//!
//! A control operation has exclusive use of its node: it holds the node's [`ControlLock`], and requests are held back.
//! Once begun, the operation runs to its end even if its future is dropped, because a driver that stops halfway could
//! leave inconsistent metadata.
//!
//! A reopen, and an operation that passes through several nodes, hold the locks of all nodes concerned. A close holds the locks
//! of all nodes below, which it flushes and may close. Such an operation takes these locks in the order of the nodes' addresses
//! ([`lock_all`]), so two such operations never wait for each other. It holds back requests only after it has all locks. An
//! operation that uses only one node never waits for the lock of another node.

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::LocalBoxFuture;
use oxblk_ring::{Mutex, MutexGuardArc, Task, UntilSettled};

use crate::backend::no_medium;
use crate::graph::{is_below, nodes_above, nodes_below, nodes_from};
use crate::{Backend, ChildIdx, Drained, Graph, Node, Result};

/// The lock that a control operation holds on its node.
#[derive(Debug, Default)]
pub(crate) struct ControlLock(Arc<Mutex<()>>);

impl ControlLock {
    /// Waits until no other control operation is in progress on the node. Other control operations wait until the guard
    /// is dropped.
    pub(crate) async fn acquire(&self) -> ControlGuard {
        ControlGuard { _guard: self.0.lock_arc().await }
    }
}

/// Guard of a [`ControlLock`]. Dropping the guard releases the lock.
pub(crate) struct ControlGuard {
    _guard: MutexGuardArc<()>,
}

/// The control locks of a node and of nodes below it: no other control operation is in progress there, and the edges between
/// these nodes do not change.
pub(crate) struct Controls {
    nodes: Vec<Arc<Node>>,
    _guards: Vec<ControlGuard>,
}

impl Controls {
    /// The nodes whose control locks are held.
    pub(crate) fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }
}

/// Exclusive use of a node: no request and no other control operation is in progress.
pub(crate) struct Exclusive {
    // Fields drop in this order: requests resume before the next control operation gets the lock.
    _drained: Drained,
    _controls: Vec<ControlGuard>,
}

impl Graph {
    /// Takes the control locks of `top` and of all nodes below it.
    pub(crate) async fn controls(&self, top: &Arc<Node>) -> Controls {
        lock_set(|| nodes_below(top)).await
    }

    /// Takes the control locks of `nodes`, of the nodes that a flush of `nodes` reaches, and of all nodes above `nodes`: a control
    /// operation above uses `nodes`.
    pub(crate) async fn controls_for_change(&self, nodes: &[Arc<Node>]) -> Controls {
        lock_set(|| {
            let mut all = nodes_from(nodes, |child| child != ChildIdx::BACKING);
            let below: HashSet<_> = all.iter().map(Arc::as_ptr).collect();
            let above = nodes_above(nodes).into_iter();
            all.extend(above.filter(|node| !below.contains(&Arc::as_ptr(node))));
            all
        })
        .await
    }

    /// Runs `work` with exclusive use of `node`. Once begun, `work` runs to its end even if the caller's future is
    /// dropped.
    pub(crate) async fn run_exclusive<T, W, F>(&self, node: &Arc<Node>, work: W) -> Result<T>
    where
        T: 'static,
        W: FnOnce(Arc<Node>) -> F + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        self.run_exclusive_below(Vec::new(), node, work).await
    }

    /// Like [`Self::run_exclusive`], for a caller that reaches `node` through the nodes `above`. The uppermost node is
    /// the first in `above`. No other control operation runs on these nodes at the same time.
    pub(crate) async fn run_exclusive_below<T, W, F>(
        &self,
        mut above: Vec<Arc<Node>>,
        node: &Arc<Node>,
        work: W,
    ) -> Result<T>
    where
        T: 'static,
        W: FnOnce(Arc<Node>) -> F + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        above.push(Arc::clone(node));
        let controls = lock_all(above.clone()).await;
        if above.iter().any(|node| node.users().is_closed()) {
            return Err(no_medium());
        }
        let exclusive = Exclusive { _drained: self.drain(node).await, _controls: controls };
        let node = Arc::clone(node);
        // When a write completes on the fast path, only the node where the write entered the graph is marked as
        // unflushed. But a driver flushes its children directly. The children are marked here, so that a flush of a
        // child covers the write.
        mark_unflushed_below(&node);
        // If the thread ends halfway, the node stays locked until the host has completed the operations that were
        // begun.
        let exclusive = UntilSettled::new(exclusive);
        run_to_completion(async move {
            let outcome = work(node).await;
            if outcome.is_err() {
                // A failed operation may leave host I/O in flight. Wait for it before requests resume.
                oxblk_ring::settled().await;
            }
            drop(exclusive.release());
            outcome
        })
        .await
    }
}

/// Takes the control locks of `nodes` in the order of their addresses.
async fn lock_all(mut nodes: Vec<Arc<Node>>) -> Vec<ControlGuard> {
    nodes.sort_by_key(|node| Arc::as_ptr(node).addr());
    let mut guards = Vec::new();
    for node in nodes {
        guards.push(node.control_lock().acquire().await);
    }
    guards
}

/// Takes the control locks of the nodes that `find` returns. If the edges between these nodes have changed during the wait,
/// releases the locks and tries again.
pub(crate) async fn lock_set(find: impl Fn() -> Vec<Arc<Node>>) -> Controls {
    let mut nodes = find();
    loop {
        let guards = lock_all(nodes.clone()).await;
        let now = find();
        if now.len() == nodes.len() && now.iter().zip(&nodes).all(|(a, b)| Arc::ptr_eq(a, b)) {
            return Controls { nodes, _guards: guards };
        }
        drop(guards);
        nodes = now;
    }
}

fn mark_unflushed_below(node: &Arc<Node>) {
    let below = nodes_from(std::slice::from_ref(node), |child| child != ChildIdx::BACKING);
    for node in below.iter().skip(1).filter(|node| !node.is_read_only()) {
        node.mark_unflushed();
    }
}

impl Backend {
    /// Wraps the work of a control operation that this backend requests. The operation fails if the backend was closed
    /// before the operation got exclusive use of the node, or if the node is no longer below the backend.
    pub(crate) fn while_open<T, W, F>(
        &self,
        work: W,
    ) -> impl FnOnce(Arc<Node>) -> LocalBoxFuture<'static, Result<T>> + use<T, W, F>
    where
        T: 'static,
        W: FnOnce(Arc<Node>) -> F + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        let backend = self.clone();
        move |node| {
            Box::pin(async move {
                if !is_below(&backend.node()?, &node) {
                    return Err(no_medium());
                }
                work(node).await
            })
        }
    }

    /// Like [`Self::while_open`], for an operation that changes the image. The operation also fails if the backend has no write
    /// permission when the operation gets exclusive use of the node, for example during a commit of the image.
    pub(crate) fn while_writer<T, W, F>(
        &self,
        work: W,
    ) -> impl FnOnce(Arc<Node>) -> LocalBoxFuture<'static, Result<T>> + use<T, W, F>
    where
        T: 'static,
        W: FnOnce(Arc<Node>) -> F + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        let backend = self.clone();
        self.while_open(move |node| async move {
            backend.root()?.may_write()?;
            work(node).await
        })
    }
}

/// Starts `work` immediately as a task. The task runs to its end even if the returned future is dropped.
pub(crate) fn run_to_completion<T: 'static>(
    work: impl Future<Output = T> + 'static,
) -> impl Future<Output = T> {
    GoesOn(Some(oxblk_ring::spawn(work)))
}

/// Starts `work` as a task whose end is not awaited, for destructors. Outside of an I/O thread, `work` is not run, and
/// the log reports this.
pub(crate) fn in_background(work: impl Future<Output = ()> + 'static) {
    if oxblk_ring::try_thread_index().is_none() {
        tracing::error!("a block node was dropped outside of an I/O thread and stays open");
        return;
    }
    oxblk_ring::spawn(work).detach();
}

/// A task whose result the caller awaits. Dropping this value detaches the task, and the task runs to its end.
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
