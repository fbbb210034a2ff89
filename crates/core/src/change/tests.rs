//! Tests of changes with drivers that record their permissions.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use oxblk_ring::{IoBuf, IoBufMut};

use super::{Attachment, Change};
use crate::{
    Backend, BoxFuture, ChildIdx, ChildSpec, Driver, DriverFactory, DriverKind, Edge, Errno, Error,
    Gate, Graph, Node, NodeAccess, OpenContext, OpenFlags, Perm, Permissions, Result, Roles,
    WriteFlags,
};

/// What the driver of a node has received.
#[derive(Default)]
struct Record {
    held: Mutex<Option<Permissions>>,
    prepared: Mutex<Option<Permissions>>,
    /// The driver refuses to prepare.
    refuses: AtomicBool,
    calls: Mutex<Vec<&'static str>>,
}

impl Record {
    fn held(&self) -> Permissions {
        self.held.lock().unwrap().unwrap_or(Permissions::NONE)
    }

    fn take_calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

struct Recorder(Arc<Record>);

impl Driver for Recorder {
    fn read(&self, _offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { Ok(buf) })
    }

    fn write(&self, _: u64, _: IoBuf, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn size(&self) -> u64 {
        4096
    }

    fn prepare_permissions(&self, permissions: Permissions) -> Result<()> {
        self.0.calls.lock().unwrap().push("prepare");
        if self.0.refuses.load(SeqCst) {
            return Err(Error::from_errno(Errno::AGAIN));
        }
        let before = self.0.prepared.lock().unwrap().replace(permissions);
        assert_eq!(before, None, "prepared twice");
        Ok(())
    }

    fn commit_permissions(&self, permissions: Permissions) {
        self.0.calls.lock().unwrap().push("commit");
        let prepared = self.0.prepared.lock().unwrap().take();
        let before = self.0.held.lock().unwrap().replace(permissions);
        if prepared.is_none() {
            let before = before.unwrap_or(Permissions::NONE);
            assert!(before.taken.contains(permissions.taken), "locks are missing");
            assert!(permissions.shared.contains(before.shared), "locks are missing");
        }
    }

    fn abort_permissions(&self) {
        self.0.calls.lock().unwrap().push("abort");
        assert!(self.0.prepared.lock().unwrap().take().is_some(), "nothing was prepared");
    }
}

/// A format with a `file` child and a backing file.
struct Format;

impl DriverFactory for Format {
    fn name(&self) -> &'static str {
        "recorder"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn children(&self) -> &'static [ChildSpec] {
        &[ChildSpec::IMAGE, ChildSpec::BACKING]
    }

    fn open<'a>(&'a self, _: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async { Err(Error::from_errno(Errno::OPNOTSUPP)) })
    }
}

struct Nodes {
    graph: Graph,
    nodes: Vec<(Arc<Node>, Arc<Record>)>,
}

impl Nodes {
    fn new(count: usize) -> Self {
        let graph = Graph::new(&[], Gate::Anything);
        let nodes = (0..count)
            .map(|at| {
                let record = Arc::<Record>::default();
                let (name, driver) = (format!("n{at}"), Box::new(Recorder(Arc::clone(&record))));
                let node =
                    graph.add_node(Some(&name), &Format, driver, OpenFlags::default()).unwrap();
                (node, record)
            })
            .collect();
        Self { graph, nodes }
    }

    fn node(&self, at: usize) -> &Arc<Node> {
        &self.nodes[at].0
    }

    fn record(&self, at: usize) -> &Record {
        &self.nodes[at].1
    }

    fn link(&self, parent: usize, child: ChildIdx, below: usize) -> Result<()> {
        let mut change = Change::of(self.node(parent));
        change.replace_child(self.node(parent), child, Some(self.node(below)));
        change.commit().map(drop)
    }

    fn attach(&self, at: usize, taken: Perm, shared: Perm) -> Result<Attachment> {
        Attachment::new(
            self.node(at),
            format!("user of n{at}"),
            "root",
            Permissions { taken, shared },
        )
    }

    /// Asserts that every driver holds what its users take and share, that no users conflict, and that the permissions of each
    /// child edge follow from those of the parent.
    fn assert_sound(&self) {
        for (node, record) in &self.nodes {
            let users = node.parents();
            let ours =
                users.iter().fold(Permissions::NONE, |all, edge| all.and(edge.permissions()));
            assert_eq!(record.held(), ours, "{}", node.name());
            assert_eq!(*record.prepared.lock().unwrap(), None, "{}", node.name());
            for taker in &users {
                for other in users.iter().filter(|other| !Arc::ptr_eq(other, taker)) {
                    assert!(other.permissions().shared.contains(taker.permissions().taken));
                }
            }
            for (child, edge) in node.children().iter() {
                let access = NodeAccess { writable: !node.is_read_only(), no_io: false };
                let wanted = Permissions::for_child(edge.roles(), ours, access);
                assert_eq!(edge.permissions(), wanted, "{child:?} of {}", node.name());
            }
        }
    }
}

const READ: Perm = Perm::CONSISTENT_READ;

#[test]
fn a_driver_that_refuses_leaves_the_locks_of_all_others_as_they_were() {
    let nodes = Nodes::new(2);
    let reader = |at| nodes.attach(at, READ, Perm::all()).unwrap();
    let (first, second) = (reader(0), reader(1));
    nodes.record(0).take_calls();
    nodes.record(1).take_calls();
    nodes.record(1).refuses.store(true, SeqCst);
    let mut change = Change::of(nodes.node(0));
    // The first node gives a permission up, and the second node takes one.
    change.set_permissions(first.edge(), Permissions::NONE);
    change.set_permissions(second.edge(), Permissions::sharing_all(Perm::WRITE));
    let error = change.commit().unwrap_err();
    assert_eq!(error.raw_errno(), Errno::AGAIN);
    assert!(!nodes.record(0).take_calls().contains(&"commit"));
    assert_eq!(nodes.record(0).held().taken, READ);
    assert_eq!(first.edge().permissions().taken, READ);
    nodes.assert_sound();
}

#[test]
fn all_drivers_prepare_before_the_first_one_commits() {
    let nodes = Nodes::new(2);
    nodes.link(0, ChildIdx::BACKING, 1).unwrap();
    nodes.record(0).take_calls();
    nodes.record(1).take_calls();
    let reader = nodes.attach(0, READ, Perm::all()).unwrap();
    for at in 0..2 {
        assert_eq!(nodes.record(at).take_calls(), ["prepare", "commit"]);
    }
    nodes.assert_sound();
    drop(reader);
    // Loosened permissions need no new locks.
    for at in 0..2 {
        assert_eq!(nodes.record(at).take_calls(), ["commit"]);
    }
    nodes.assert_sound();
}

#[test]
fn a_refused_change_of_children_changes_nothing() {
    let nodes = Nodes::new(4);
    nodes.link(0, ChildIdx::BACKING, 1).unwrap();
    nodes.link(1, ChildIdx::BACKING, 2).unwrap();
    let _reader = nodes.attach(0, READ, READ).unwrap();
    let refused = |parent, below| nodes.link(parent, ChildIdx::BACKING, below).unwrap_err();
    assert_eq!(
        refused(2, 0).to_string(),
        "Making 'n0' a backing child of 'n2' would create a cycle"
    );
    let writer = nodes.attach(3, Perm::WRITE, Perm::all()).unwrap();
    let text = refused(0, 3).to_string();
    assert!(text.starts_with("Permission conflict on node 'n3': permissions 'write'"), "{text}");
    drop(writer);
    let frozen = nodes.graph.freeze(nodes.node(0), Some(nodes.node(1))).unwrap();
    assert_eq!(refused(0, 3).to_string(), "Cannot change frozen 'backing' link from 'n0' to 'n1'");
    // Links below the frozen part can change.
    nodes.link(1, ChildIdx::BACKING, 3).unwrap();
    assert_eq!(nodes.node(0).child(ChildIdx::BACKING).unwrap().name(), "n1");
    assert!(!nodes.node(2).has_parents());
    drop(frozen);
    nodes.link(0, ChildIdx::BACKING, 3).unwrap();
    nodes.assert_sound();
}

#[test]
fn children_without_a_slot_are_added_and_removed() {
    let nodes = Nodes::new(5);
    let reader = nodes.attach(0, READ, Perm::all()).unwrap();
    let mut change = Change::of(nodes.node(0));
    let [first, second, third] = [(); 3].map(|()| nodes.node(0).children().new_further());
    change.add_child(nodes.node(0), first, "children.0", Roles::DATA, nodes.node(1));
    change.add_child(nodes.node(0), second, "children.1", Roles::DATA, nodes.node(2));
    change.commit().unwrap();
    nodes.assert_sound();
    let names = || -> Vec<_> {
        let children = nodes.node(0).children().iter();
        children.map(|(_, edge)| edge.node().name().to_owned()).collect()
    };
    assert_eq!(names(), ["n1", "n2"]);
    assert_eq!(nodes.record(2).held().taken, READ);
    let mut change = Change::of(nodes.node(0));
    change.replace_child(nodes.node(0), first, None);
    change.replace_child(nodes.node(0), second, Some(nodes.node(3)));
    change.add_child(nodes.node(0), third, "children.2", Roles::DATA, nodes.node(4));
    change.commit().unwrap();
    assert_eq!(names(), ["n3", "n4"]);
    assert_eq!(nodes.node(0).child(third).unwrap().name(), "n4");
    assert!(!nodes.node(1).has_parents() && !nodes.node(2).has_parents());
    nodes.assert_sound();
    drop(reader);
    nodes.assert_sound();
}

/// If the time of a change were quadratic in the number of users, this test would take minutes.
#[test]
fn twenty_thousand_users_move_to_another_node() {
    const COUNT: usize = 10_000;
    let nodes = Nodes::new(COUNT + 2);
    let (old, new) = (nodes.node(COUNT), nodes.node(COUNT + 1));
    let empty = |_| Backend::empty(&nodes.graph, "", Permissions::sharing_all(READ));
    let backends: Vec<_> = (0..COUNT).map(empty).collect();
    let mut change = Change::of(old);
    for (at, backend) in backends.iter().enumerate() {
        change.replace_child(nodes.node(at), ChildIdx::BACKING, Some(old));
        change.insert_root(backend, Arc::clone(old));
    }
    change.commit().unwrap();
    assert_eq!(old.parents().len(), 2 * COUNT);
    let mut change = Change::of(old);
    change.replace_node(old, new, |_| true);
    let released = change.commit().unwrap();
    assert!(released.len() == 1 && Arc::ptr_eq(&released[0], old));
    assert!(!old.has_parents());
    assert_eq!(new.parents().len(), 2 * COUNT);
    assert!(backends.iter().all(|backend| Arc::ptr_eq(&backend.node().unwrap(), new)));
    assert_eq!(nodes.record(COUNT + 1).held().taken, READ);
    let mut change = Change::of(old);
    backends.iter().for_each(|backend| change.remove_root(backend));
    change.commit().unwrap();
    assert_eq!(new.parents().len(), COUNT);
}

#[test]
fn a_graph_with_many_paths_is_computed_quickly() {
    // Each node has the next node as two children, so there are 2^60 paths.
    let nodes = Nodes::new(61);
    for at in (0..60).rev() {
        let mut change = Change::of(nodes.node(at));
        change.set_read_only(nodes.node(at), true);
        change.replace_child(nodes.node(at), ChildIdx::FILE, Some(nodes.node(at + 1)));
        change.replace_child(nodes.node(at), ChildIdx::BACKING, Some(nodes.node(at + 1)));
        change.commit().unwrap();
    }
    let reader = nodes.attach(0, READ, Perm::all()).unwrap();
    assert!(nodes.record(60).held().taken.contains(READ));
    let refused = nodes.link(60, ChildIdx::BACKING, 0).unwrap_err();
    assert!(refused.to_string().ends_with("would create a cycle"));
    nodes.assert_sound();
    drop(reader);
    nodes.assert_sound();
}

/// A generator of numbers for [`random_changes`].
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(self.0 >> 33).unwrap() % end
    }

    fn perm(&mut self) -> Perm {
        Perm::from_bits_truncate(u8::try_from(self.below(16)).unwrap())
    }
}

#[test]
fn random_changes_keep_locks_and_permissions_in_step() {
    let (mut made, mut refused) = (0, 0);
    for seed in 0..20 {
        let (nodes, mut random) = (Nodes::new(6), Random(seed));
        let mut users: Vec<Attachment> = Vec::new();
        for _ in 0..200 {
            let failing = random.below(12);
            if failing < 6 {
                nodes.record(failing).refuses.store(true, SeqCst);
            }
            let outcome = step(&nodes, &mut users, &mut random);
            if failing < 6 {
                nodes.record(failing).refuses.store(false, SeqCst);
            }
            if outcome.is_ok() {
                made += 1;
            } else {
                refused += 1;
            }
            nodes.assert_sound();
        }
        drop(users);
        nodes.assert_sound();
    }
    assert!(made > 400 && refused > 400, "{made} made, {refused} refused");
}

/// Makes one random change with up to three steps.
fn step(nodes: &Nodes, users: &mut Vec<Attachment>, random: &mut Random) -> Result<()> {
    if random.below(4) == 0 {
        let shared = Perm::all() - random.perm() - random.perm();
        users.push(nodes.attach(random.below(6), random.perm(), shared)?);
        return Ok(());
    }
    if random.below(4) == 0 && !users.is_empty() {
        users.swap_remove(random.below(users.len()));
        return Ok(());
    }
    let mut change = Change::of(nodes.node(0));
    for _ in 0..=random.below(3) {
        let node = nodes.node(random.below(6));
        match random.below(3) {
            0 => {
                let child = [ChildIdx::FILE, ChildIdx::BACKING][random.below(2)];
                let new = (random.below(3) > 0).then(|| nodes.node(random.below(6)));
                change.replace_child(node, child, new);
            }
            1 => change.set_read_only(node, random.below(2) == 0),
            _ if !users.is_empty() => {
                let edge: &Arc<Edge> = users[random.below(users.len())].edge();
                let taken = random.perm();
                change.set_permissions(edge, Permissions { taken, shared: Perm::all() });
            }
            _ => {}
        }
    }
    change.commit().map(drop)
}

#[test]
fn a_replaced_edge_of_the_same_change_never_becomes_a_user() {
    let nodes = Nodes::new(3);
    let mut change = Change::of(nodes.node(0));
    change.replace_child(nodes.node(0), ChildIdx::BACKING, Some(nodes.node(1)));
    change.replace_child(nodes.node(0), ChildIdx::BACKING, Some(nodes.node(2)));
    assert!(change.commit().unwrap().is_empty());
    assert_eq!(nodes.node(0).child(ChildIdx::BACKING).unwrap().name(), "n2");
    assert!(!nodes.node(1).has_parents());
    nodes.assert_sound();
}

#[test]
fn a_writer_is_refused_above_a_read_only_node() {
    let nodes = Nodes::new(2);
    let mut change = Change::of(nodes.node(1));
    change.set_read_only(nodes.node(1), true);
    change.commit().unwrap();
    let refused = nodes.link(0, ChildIdx::FILE, 1).unwrap_err();
    assert_eq!(refused.to_string(), "Block node is read-only");
    nodes.link(0, ChildIdx::BACKING, 1).unwrap();
    nodes.assert_sound();
}

#[test]
fn permissions_of_a_former_user_do_not_change() {
    let nodes = Nodes::new(1);
    let user = nodes.attach(0, READ, Perm::all()).unwrap();
    let edge = Arc::clone(user.edge());
    drop(user);
    let mut change = Change::of(nodes.node(0));
    change.set_permissions(&edge, Permissions::sharing_all(Perm::WRITE));
    assert_eq!(change.commit().unwrap_err().raw_errno(), Errno::NOMEDIUM);
    let mut change = Change::of(nodes.node(0));
    change.set_permissions(&edge, Permissions::sharing_all(Perm::WRITE));
    change.release();
    nodes.assert_sound();
    assert_eq!(nodes.record(0).held().taken, Perm::empty());
}
