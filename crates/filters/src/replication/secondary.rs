//! Start, checkpoint and stop of a secondary. All changes of the graph are made by [`GraphChange`](oxblk_core::GraphChange).

use std::sync::Arc;

use oxblk_core::{
    Backend, ChildIdx, Error, ErrorKind, Graph, Node, OpenFlags, Options, Perm, Permissions,
    ReopenRequest, Result,
};

use super::stage::{Stage, StageCell};
use super::steps::{CopyDown, Empty, SetStage};

/// The nodes of a secondary that runs.
#[derive(Clone)]
pub(super) struct Running {
    graph: Graph,
    active: Arc<Node>,
    hidden: Arc<Node>,
    secondary: Arc<Node>,
    /// The copy-before-write node above the secondary disk.
    copier: Arc<Node>,
    /// The snapshot-access node below the active disk.
    view: Arc<Node>,
    /// The nodes that were read-only before.
    made_writable: Vec<Arc<Node>>,
}

impl Running {
    /// Inserts the nodes, and empties the active and the hidden disk.
    pub(super) async fn start(
        graph: &Graph,
        node: &Arc<Node>,
        active: &Arc<Node>,
        top: Option<&str>,
        stage: &Arc<StageCell>,
    ) -> Result<Self> {
        let (hidden, secondary) = check(graph, node, active, top)?;
        let mut made_writable = Vec::new();
        for disk in [&hidden, &secondary] {
            if !disk.is_read_only() {
                continue;
            }
            if let Err(error) = set_read_only(graph, disk, false).await {
                restore(graph, &made_writable).await;
                return Err(error);
            }
            made_writable.push(Arc::clone(disk));
        }
        let disks = (active, &hidden, &secondary);
        match insert(graph, disks, stage).await {
            Ok((copier, view)) => Ok(Self {
                graph: graph.clone(),
                active: Arc::clone(active),
                hidden,
                secondary,
                copier,
                view,
                made_writable,
            }),
            Err(error) => {
                restore(graph, &made_writable).await;
                Err(error)
            }
        }
    }

    /// Begins a new point in time.
    pub(super) async fn checkpoint(&self, graph: &Graph, stage: &Arc<StageCell>) -> Result<()> {
        if stage.get() == Stage::FailoverFailed {
            return Err(Error::invalid("Block replication has begun a failover"));
        }
        let mut change = graph.change();
        change.set_action(Empty {
            disks: vec![Arc::clone(&self.active), Arc::clone(&self.hidden)],
            copier: Some(Arc::clone(&self.copier)),
            others: vec![Arc::clone(&self.secondary)],
            stage: Arc::clone(stage),
            next: Stage::Running,
            failed: Stage::Unusable,
        });
        change.run().await
    }

    /// Copies the data of the guest to the secondary disk. Afterwards, the filter `node` uses the secondary disk.
    pub(super) async fn fail_over(
        &self,
        graph: &Graph,
        node: &Arc<Node>,
        stage: &Arc<StageCell>,
    ) -> Result<()> {
        if stage.get() == Stage::Unusable {
            let text = "The data of the guest was lost at a checkpoint";
            return Err(Error::new(ErrorKind::Io, text).errno(oxblk_core::Errno::IO));
        }
        // The edge of the copy-before-write node needs the permission to write, also if no server uses the secondary disk any more.
        let permissions = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE);
        let writer = Backend::new(graph, "", Arc::clone(&self.copier), permissions)?;
        let mut change = graph.change();
        change.replace_child(node, ChildIdx::FILE, Some(&self.secondary));
        self.remove_from(&mut change);
        change.set_action(CopyDown {
            filter: Arc::clone(node),
            active: Arc::clone(&self.active),
            hidden: Arc::clone(&self.hidden),
            copier: Arc::clone(&self.copier),
            secondary: Arc::clone(&self.secondary),
            stage: Arc::clone(stage),
        });
        let changed = change.run().await;
        let closed = writer.close().await;
        changed?;
        if let Err(error) = closed {
            tracing::error!(%error, "cannot flush the secondary disk after a failover");
        }
        Ok(())
    }

    /// Discards the changes of the guest, and removes the nodes that the start has inserted.
    pub(super) async fn stop(&self, graph: &Graph, stage: &Arc<StageCell>) -> Result<()> {
        if stage.get() == Stage::FailoverFailed {
            return Err(Error::invalid("Block replication has begun a failover"));
        }
        let mut change = graph.change();
        self.remove_from(&mut change);
        change.set_action(Empty {
            disks: vec![Arc::clone(&self.active), Arc::clone(&self.hidden)],
            copier: None,
            others: vec![Arc::clone(&self.secondary)],
            stage: Arc::clone(stage),
            next: Stage::Stopped,
            failed: Stage::Unusable,
        });
        change.run().await?;
        restore(graph, &self.made_writable).await;
        Ok(())
    }

    /// Adds the steps that remove the inserted nodes.
    fn remove_from(&self, change: &mut oxblk_core::GraphChange) {
        change.replace_child(&self.active, ChildIdx::BACKING, Some(&self.hidden));
        // The node has no user afterwards and is closed. Until then, it must not use the copy-before-write node, which would
        // refuse writers of the secondary disk.
        change.replace_child(&self.view, ChildIdx::FILE, Some(&self.secondary));
        change.replace_node(&self.copier, &self.secondary, |_| true);
    }

    /// Removes the copy-before-write node in the background, after the filter was closed.
    pub(super) fn dissolve_later(self) {
        oxblk_ring::spawn(async move {
            let open = self.graph.node(self.copier.name());
            if !open.is_some_and(|open| Arc::ptr_eq(&open, &self.copier)) {
                return;
            }
            let mut change = self.graph.change();
            change.replace_node(&self.copier, &self.secondary, |_| true);
            if let Err(error) = change.run().await {
                tracing::error!(%error, "cannot end a replication");
            }
        })
        .detach();
    }
}

/// Finds the hidden and the secondary disk, and checks whether the replication can start.
fn check(
    graph: &Graph,
    node: &Arc<Node>,
    active: &Arc<Node>,
    top: Option<&str>,
) -> Result<(Arc<Node>, Arc<Node>)> {
    let backing = |node: &Arc<Node>, what| {
        let found = node.child(ChildIdx::BACKING);
        found.ok_or_else(|| Error::invalid(format!("{what} disk doesn't have backing file")))
    };
    let hidden = backing(active, "Active")?;
    let secondary = backing(&hidden, "Hidden")?;
    let is_root =
        |backend: &Backend| backend.node().is_ok_and(|root| Arc::ptr_eq(&root, &secondary));
    if !graph.backends().iter().any(is_root) {
        return Err(Error::invalid("The secondary disk doesn't have block backend"));
    }
    if active.size() != hidden.size() || hidden.size() != secondary.size() {
        let text = "Active disk, hidden disk, secondary disk's length are not the same";
        return Err(Error::invalid(text));
    }
    for disk in [active, &hidden] {
        if disk.driver().backing().is_none() {
            let driver = disk.factory().name();
            let text = format!("The driver '{driver}' cannot empty an image");
            return Err(Error::unsupported(text).on_node(disk.name()));
        }
    }
    let named = top.and_then(|top| {
        let backends = graph.backends();
        let backend = backends.iter().find(|backend| backend.name() == top && !top.is_empty());
        backend.and_then(|backend| backend.node().ok()).or_else(|| graph.node(top))
    });
    if !named.is_some_and(|top| is_below(&top, node)) {
        return Err(Error::invalid("No top_bs or it is invalid"));
    }
    if active.is_read_only() || node.is_read_only() {
        return Err(Error::new(ErrorKind::Denied, "Block node is read-only").on_node(node.name()));
    }
    Ok((hidden, secondary))
}

/// Whether `node` is `top` or is below it.
fn is_below(top: &Arc<Node>, node: &Arc<Node>) -> bool {
    let mut seen = std::collections::HashSet::new();
    let mut next = vec![Arc::clone(top)];
    while let Some(at) = next.pop() {
        if Arc::ptr_eq(&at, node) {
            return true;
        }
        if seen.insert(Arc::as_ptr(&at)) {
            next.extend(at.children().iter().map(|(_, edge)| Arc::clone(edge.node())));
        }
    }
    false
}

/// Inserts the copy-before-write node above the secondary disk, and then the snapshot-access node below the active disk. The
/// second node can be opened only when the first one is above all writers.
async fn insert(
    graph: &Graph,
    (active, hidden, secondary): (&Arc<Node>, &Arc<Node>, &Arc<Node>),
    stage: &Arc<StageCell>,
) -> Result<(Arc<Node>, Arc<Node>)> {
    let copier = open(
        graph,
        [("driver", "copy-before-write"), ("file", secondary.name()), ("target", hidden.name())],
    )
    .await?;
    let mut change = graph.change();
    change.replace_node(secondary, &copier, |_| true);
    // The copies must not be in the hidden disk when it is emptied.
    change.set_action(Empty {
        disks: vec![Arc::clone(active), Arc::clone(hidden)],
        copier: Some(Arc::clone(&copier)),
        others: vec![Arc::clone(secondary)],
        stage: Arc::clone(stage),
        next: Stage::NotStarted,
        failed: Stage::NotStarted,
    });
    if let Err(error) = change.run().await {
        close(graph, copier).await;
        return Err(error);
    }
    match insert_view(graph, active, &copier, stage).await {
        Ok(view) => Ok((copier, view)),
        Err(error) => {
            let mut change = graph.change();
            change.replace_node(&copier, secondary, |_| true);
            if let Err(error) = change.run().await {
                tracing::error!(%error, "cannot remove the filter of a replication");
            }
            Err(error)
        }
    }
}

async fn insert_view(
    graph: &Graph,
    active: &Arc<Node>,
    copier: &Arc<Node>,
    stage: &Arc<StageCell>,
) -> Result<Arc<Node>> {
    let view = open(graph, [("driver", "snapshot-access"), ("file", copier.name())]).await?;
    let mut change = graph.change();
    change.replace_child(active, ChildIdx::BACKING, Some(&view));
    change.set_action(SetStage { stage: Arc::clone(stage), next: Stage::Running });
    match change.run().await {
        Ok(()) => Ok(view),
        Err(error) => {
            close(graph, view).await;
            Err(error)
        }
    }
}

async fn open<const N: usize>(graph: &Graph, given: [(&str, &str); N]) -> Result<Arc<Node>> {
    let mut options = Options::new();
    for (key, value) in given {
        options.insert(key, value);
    }
    graph.open(options, OpenFlags { unmap: true, ..OpenFlags::default() }).await
}

/// Closes a node that was not inserted.
async fn close(graph: &Graph, node: Arc<Node>) {
    if let Err(error) = graph.release(node).await {
        tracing::error!(%error, "cannot close a node of a replication");
    }
}

async fn set_read_only(graph: &Graph, node: &Arc<Node>, read_only: bool) -> Result<()> {
    let mut options = Options::new();
    options.insert("read-only", read_only);
    graph.reopen(vec![ReopenRequest { node: Arc::clone(node), options, keep: true }]).await
}

/// Makes nodes read-only again.
async fn restore(graph: &Graph, nodes: &[Arc<Node>]) {
    for node in nodes {
        if let Err(error) = set_read_only(graph, node, true).await {
            tracing::warn!(node = node.name(), %error, "cannot make a node read-only again");
        }
    }
}
