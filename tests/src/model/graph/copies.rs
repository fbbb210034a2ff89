//! Changes that add nodes with the same data: the raw copy of blkverify, and further children of quorum.

use std::sync::Arc;

use oxblk_core::{Backend, ChildIdx, Node, OpenFlags, Options, Perm, Permissions, Result};
use oxblk_ring::IoBufMut;

use super::steps::{Changer, must_compress};

/// Larger nodes are not copied: the logs of blklogwrites.
const MOST_BYTES: u64 = 64 << 20;

/// No quorum gets more children.
const MOST_CHILDREN: usize = 4;

impl Changer {
    /// Opens a new node with the data of `node`. The caller has stopped the requests.
    async fn copy_of(&mut self, node: &Arc<Node>) -> Result<Arc<Node>> {
        let reading = Permissions::sharing_all(Perm::CONSISTENT_READ);
        let reader = Backend::new(&self.graph, "reader", Arc::clone(node), reading)?;
        let len = usize::try_from(reader.size()).expect("a small disk");
        let read = reader.read(0, IoBufMut::new(len)).await;
        reader.close().await.expect("it closes");
        self.storage.copy(&self.graph, &read?).await
    }

    /// Inserts blkverify above a node, with a copy of the node.
    pub(super) async fn verify(&mut self, backend: &Backend, nodes: &[Arc<Node>]) -> Result<()> {
        let world = Arc::clone(&self.world);
        let _gates = world.close_gates().await;
        // The data of the nodes below the image must be complete.
        backend.flush().await?;
        let below = Arc::clone(self.random.pick(nodes));
        let is_compressor = must_compress(nodes).iter().any(|node| Arc::ptr_eq(node, &below));
        if is_compressor || below.size() > MOST_BYTES {
            return Ok(());
        }
        let copy = self.copy_of(&below).await?;
        let names = [self.storage.name(), below.name().to_owned(), copy.name().to_owned()];
        let [name, test, raw] = &names;
        let options = format!("driver=blkverify,node-name={name},test={test},raw={raw}");
        let flags =
            OpenFlags { read_only: below.is_read_only(), unmap: true, ..OpenFlags::default() };
        let opened = self.graph.open(Options::from_dotted(&options, None)?, flags).await;
        let filter = self.or_close(opened, &copy).await?;
        let mut change = self.graph.change();
        change.replace_node(&below, &filter, |_| true);
        self.or_release(change.run().await, filter).await
    }

    /// Adds a child to a random quorum, or removes one.
    pub(super) async fn change_quorum(
        &mut self,
        backend: &Backend,
        nodes: &[Arc<Node>],
    ) -> Result<()> {
        let quorums: Vec<_> = nodes.iter().filter(|n| n.factory().name() == "quorum").collect();
        if quorums.is_empty() {
            return Ok(());
        }
        let quorum = Arc::clone(*self.random.pick(&quorums));
        let children: Vec<String> =
            quorum.children().iter().map(|(_, edge)| edge.name().to_owned()).collect();
        if children.len() > 1 && (children.len() >= MOST_CHILDREN || self.random.one_in(2)) {
            let child = self.random.pick(&children).clone();
            return self.graph.change_children(quorum.name(), Some(&child), None).await;
        }
        let world = Arc::clone(&self.world);
        let _gates = world.close_gates().await;
        backend.flush().await?;
        if quorum.size() > MOST_BYTES {
            return Ok(());
        }
        let copy = self.copy_of(&quorum).await?;
        let added = self.graph.change_children(quorum.name(), None, Some(copy.name())).await;
        self.or_close(added, &copy).await
    }

    /// Closes a new node that has no user if the step that was to use it has failed.
    async fn or_close<T>(&self, outcome: Result<T>, node: &Arc<Node>) -> Result<T> {
        if outcome.is_err() && !node.has_parents() && self.graph.node(node.name()).is_some() {
            self.graph.release(Arc::clone(node)).await.expect("it closes");
        }
        outcome
    }

    /// A random child of an inserted node with the data of the node.
    pub(super) fn child_with_data(&mut self, filter: &Node) -> Arc<Node> {
        let has_copies = ["quorum", "blkverify"].contains(&filter.factory().name());
        let children = filter.children();
        let same = children.iter().filter(|(child, _)| has_copies || *child == ChildIdx::FILE);
        let same: Vec<Arc<Node>> = same.map(|(_, edge)| Arc::clone(edge.node())).collect();
        Arc::clone(self.random.pick(&same))
    }
}
