//! The random changes.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use oxblk_core::{Backend, ChildIdx, Graph, Node, OpenFlags, Options, Perm, Permissions, Result};
use oxblk_ring::IoBufMut;

use super::state::{assert_locks, describe};
use super::storage::{Storage, add_groups};
use super::{DISKS, SIZE, World};
use crate::random::Random;

/// The permissions of a guest's disk.
pub(super) fn writing() -> Permissions {
    let taken = Perm::CONSISTENT_READ | Perm::WRITE;
    Permissions { taken, shared: Perm::all() - Perm::WRITE }
}

/// The nodes that can be inserted above any node, which has the name `{}`.
const INSERTED: [&str; 10] = [
    "driver=throttle,throttle-group=free,file={}",
    "driver=throttle,throttle-group=limited,file={}",
    "driver=raw,file={}",
    "driver=refuser,file={}",
    "driver=blklogwrites,file={},log.driver=null-co,log.size=1T",
    "driver=quorum,vote-threshold=1,children.0={}",
    "driver=copy-before-write,file={},target.driver=null-co,target.size=1T",
    "driver=compress,file={}",
    "driver=preallocate,file={},prealloc-size=64k,prealloc-align=64k",
    "driver=blkdebug,image={},inject-error.0.event=none,inject-error.0.errno=0,inject-error.0.delay-ns=1000",
];

/// The nodes that can be inserted between compress and an image.
const PASS_COMPRESSED: [&str; 2] = [INSERTED[0], INSERTED[1]];

/// No chain has more nodes.
const MOST_NODES: usize = 24;

pub(super) struct Changer {
    pub(super) world: Arc<World>,
    pub(super) graph: Graph,
    pub(super) storage: Storage,
    pub(super) random: Random,
    made: u64,
    refused: u64,
}

impl Changer {
    pub(super) fn new(world: Arc<World>, storage: Storage, random: Random) -> Self {
        let graph = world.disks[0].backend.graph().clone();
        add_groups(&graph);
        Self { world, graph, storage, random, made: 0, refused: 0 }
    }

    /// The number of changes that were made, and of those that were refused.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.made, self.refused)
    }

    /// Makes one change. A change that is refused must not change the graph.
    pub(super) async fn step(&mut self) {
        let before = describe(&self.graph);
        let disk = usize::try_from(self.random.below(DISKS as u64)).expect("a small number");
        let backend = self.world.disks[disk].backend.clone();
        let nodes = nodes_of(&backend);
        let outcome = match self.random.below(15) {
            0..4 if nodes.len() < MOST_NODES => self.insert(&nodes).await,
            0..6 => self.remove(&nodes).await,
            6 if nodes.len() < MOST_NODES => self.overlay(&backend).await,
            6 | 7 => self.flatten(disk).await,
            8 => self.exchange().await,
            9 => self.reopen(disk).await,
            10 => self.permissions(disk).await,
            11 if nodes.len() < MOST_NODES => self.verify(&backend, &nodes).await,
            12 | 13 if nodes.len() < MOST_NODES => self.change_quorum(&backend, &nodes).await,
            _ => self.replace_backing(&nodes).await,
        };
        match outcome {
            Ok(()) => self.made += 1,
            Err(error) => {
                self.refused += 1;
                let after = describe(&self.graph);
                assert_eq!(after, before, "a refused change has changed the graph: {error}");
            }
        }
        if self.storage.is_on_files() && self.random.one_in(4) {
            assert_locks(&self.graph);
        }
    }

    /// Opens a filter above a random node and inserts it there.
    async fn insert(&mut self, nodes: &[Arc<Node>]) -> Result<()> {
        let below = Arc::clone(self.random.pick(nodes));
        let kind = match must_compress(nodes).iter().any(|node| Arc::ptr_eq(node, &below)) {
            true => self.random.pick(&PASS_COMPRESSED),
            false => self.random.pick(&INSERTED),
        };
        let kind = kind.replace("{}", below.name());
        let options = format!("{kind},node-name={}", self.storage.name());
        let flags =
            OpenFlags { read_only: below.is_read_only(), unmap: true, ..OpenFlags::default() };
        let filter = self.graph.open(Options::from_dotted(&options, None)?, flags).await?;
        let mut change = self.graph.change();
        change.replace_node(&below, &filter, |_| true);
        self.or_release(change.run().await, filter).await
    }

    /// Closes a new node if the change that was to use it was refused.
    pub(super) async fn or_release(&self, outcome: Result<()>, node: Arc<Node>) -> Result<()> {
        if outcome.is_err() {
            self.graph.release(node).await.expect("it closes");
        }
        outcome
    }

    /// Removes a random node that was inserted.
    async fn remove(&mut self, nodes: &[Arc<Node>]) -> Result<()> {
        let inserted: Vec<_> = nodes.iter().filter(|node| is_inserted(node)).collect();
        if inserted.is_empty() {
            return Ok(());
        }
        let filter = *self.random.pick(&inserted);
        let below = self.child_with_data(filter);
        let mut change = self.graph.change();
        change.replace_node(filter, &below, |_| true);
        change.run().await
    }

    /// Puts an empty image above the root node: an external snapshot.
    async fn overlay(&mut self, backend: &Backend) -> Result<()> {
        let below = backend.node()?;
        let is_linked = self.random.one_in(2);
        let backing = if is_linked { format!(",backing={}", below.name()) } else { String::new() };
        let overlay = self.storage.image(&self.graph, &backing).await?;
        let mut change = self.graph.change();
        if !is_linked {
            change.replace_child(&overlay, ChildIdx::BACKING, Some(&below));
        }
        change.replace_node(&below, &overlay, |_| true);
        self.or_release(change.run().await, overlay).await
    }

    /// Replaces the chain of a disk by one image with the same content.
    async fn flatten(&mut self, disk: usize) -> Result<()> {
        let world = Arc::clone(&self.world);
        let _gates = world.close_gates().await;
        let backend = &world.disks[disk].backend;
        let image = self.storage.image(&self.graph, "").await?;
        let copy = Backend::new(&self.graph, "copy", Arc::clone(&image), writing())?;
        let data = backend.read(0, IoBufMut::new(SIZE)).await?;
        copy.write(0, data.freeze(), oxblk_core::WriteFlags::empty()).await.expect("it is written");
        self.graph.keep_open(Arc::clone(&image))?;
        copy.close().await.expect("it closes");
        let mut change = self.graph.change();
        change.set_root(backend, &image);
        let outcome = change.run().await;
        self.graph.allow_close(image).await.expect("it closes, unless it is used");
        outcome
    }

    /// Exchanges the media of two disks in one change.
    async fn exchange(&mut self) -> Result<()> {
        let world = Arc::clone(&self.world);
        let _gates = world.close_gates().await;
        let [one, two] = &world.disks[..] else { return Ok(()) };
        let (first, second) = (one.backend.node()?, two.backend.node()?);
        let mut change = self.graph.change();
        change.set_root(&one.backend, &second);
        change.set_root(&two.backend, &first);
        change.run().await?;
        let other = two.medium.swap(one.medium.load(SeqCst), SeqCst);
        one.medium.store(other, SeqCst);
        for disk in [one, two] {
            disk.may_refuse.store(true, SeqCst);
        }
        Ok(())
    }

    async fn reopen(&mut self, disk: usize) -> Result<()> {
        let disk = &self.world.disks[disk];
        disk.may_refuse.store(true, SeqCst);
        let read_only = self.random.one_in(3);
        let mut options = Options::new();
        options.insert("read-only", read_only);
        disk.backend.reopen(options).await
    }

    async fn permissions(&mut self, disk: usize) -> Result<()> {
        let disk = &self.world.disks[disk];
        disk.may_refuse.store(true, SeqCst);
        let reading = Permissions::sharing_all(Perm::CONSISTENT_READ);
        let permissions = if self.random.one_in(3) { reading } else { writing() };
        disk.backend.set_permissions(permissions).await
    }

    /// Replaces a backing file by a filter above it, through the parent.
    async fn replace_backing(&mut self, nodes: &[Arc<Node>]) -> Result<()> {
        let overlays: Vec<_> =
            nodes.iter().filter(|node| node.children().has(ChildIdx::BACKING)).collect();
        if overlays.is_empty() {
            return Ok(());
        }
        let overlay = *self.random.pick(&overlays);
        let below = overlay.child(ChildIdx::BACKING).expect("a backing file");
        let options =
            format!("driver=refuser,node-name={},file={}", self.storage.name(), below.name());
        let flags = OpenFlags { read_only: below.is_read_only(), ..OpenFlags::default() };
        let filter = self.graph.open(Options::from_dotted(&options, None)?, flags).await?;
        let mut change = self.graph.change();
        change.replace_child(overlay, ChildIdx::BACKING, Some(&filter));
        self.or_release(change.run().await, filter).await
    }

    /// Compares the content of all disks with the model.
    pub(super) async fn compare_all(&self) {
        for disk in &self.world.disks {
            let read = disk.backend.read(0, IoBufMut::new(SIZE)).await.expect("it is read");
            let medium = usize::try_from(disk.medium.load(SeqCst)).expect("a small number");
            let content = self.world.media[medium].lock().expect("no task runs");
            assert!(*content == *read, "the content differs from the model");
        }
    }
}

/// Drivers of inserted nodes.
const FILTERS: [&str; 10] = [
    "throttle",
    "raw",
    "refuser",
    "blklogwrites",
    "quorum",
    "compress",
    "preallocate",
    "blkdebug",
    "blkverify",
    "copy-before-write",
];

/// The nodes to which a compress filter sends compressed writes.
pub(super) fn must_compress(nodes: &[Arc<Node>]) -> Vec<Arc<Node>> {
    let named = |name| nodes.iter().filter(move |node| node.factory().name() == name);
    let mut found: Vec<Arc<Node>> = Vec::new();
    let mut next: Vec<Arc<Node>> = named("compress").cloned().collect();
    while let Some(node) = next.pop() {
        if let Some(below) = node.child(ChildIdx::FILE) {
            if below.factory().name() == "throttle" {
                next.push(Arc::clone(&below));
            }
            found.push(below);
        }
    }
    found
}

fn is_inserted(node: &Node) -> bool {
    FILTERS.contains(&node.factory().name())
}

/// The nodes of a disk, each once.
fn nodes_of(backend: &Backend) -> Vec<Arc<Node>> {
    let mut found: Vec<Arc<Node>> = Vec::new();
    let mut next: Vec<_> = backend.node().into_iter().collect();
    while let Some(node) = next.pop() {
        if found.iter().all(|other| !Arc::ptr_eq(other, &node)) {
            next.extend(node.children().iter().map(|(_, edge)| Arc::clone(edge.node())));
            found.push(node);
        }
    }
    found
}
