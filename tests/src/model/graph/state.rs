//! The state of a graph as text, and the comparison of file locks with permissions.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use oxblk_core::{Graph, Perm, Permissions};

/// Describes all nodes, their children and their users.
pub(super) fn describe(graph: &Graph) -> String {
    let mut lines: Vec<String> = graph
        .nodes()
        .iter()
        .map(|node| {
            let children: Vec<_> = node
                .children()
                .iter()
                .map(|(_, edge)| format!("{} -> {}", edge.name(), edge.node().name()))
                .collect();
            let mut users: Vec<_> = node
                .parents()
                .iter()
                .map(|edge| format!("{} as {}: {:?}", edge.user(), edge.name(), edge.permissions()))
                .collect();
            users.sort();
            let read_only = node.is_read_only();
            format!("{} (read-only: {read_only}) {children:?} used by {users:?}", node.name())
        })
        .collect();
    lines.sort();
    lines.join("\n")
}

/// Asserts that this process holds exactly the file locks of the permissions.
pub(super) fn assert_locks(graph: &Graph) {
    let mut expected: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for node in graph.nodes().iter().filter(|node| node.factory().name() == "file") {
        let path = node.filename().expect("a file has a name");
        let inode = std::fs::metadata(&path).expect("the file exists").ino();
        let users = node.parents();
        let all = users.iter().fold(Permissions::NONE, |all, edge| Permissions {
            taken: all.taken | edge.permissions().taken,
            shared: all.shared & edge.permissions().shared,
        });
        let bytes = |perm: Perm, first: u64| {
            (0..4).filter(move |bit| perm.bits() & (1 << bit) != 0).map(move |bit| first + bit)
        };
        let locks = bytes(all.taken, 100).chain(bytes(Perm::all() - all.shared, 200));
        expected.entry(inode).or_default().extend(locks);
    }
    for bytes in expected.values_mut() {
        bytes.sort_unstable();
    }
    // The kernel lists the locks in several parts. If another process changes its locks between two parts, an entry may be
    // listed twice or be missing.
    let found = (0..50).map(|_| held(&expected)).find(|found| *found == expected);
    if found.is_none() {
        assert_eq!(held(&expected), expected, "file locks by inode:\n{}", describe(graph));
    }
}

/// The lock bytes of this machine's processes on the files of `expected`.
fn held(expected: &BTreeMap<u64, Vec<u64>>) -> BTreeMap<u64, Vec<u64>> {
    let text = std::fs::read_to_string("/proc/locks").expect("the table of locks");
    let mut held: BTreeMap<u64, Vec<u64>> =
        expected.keys().map(|inode| (*inode, Vec::new())).collect();
    for line in text.lines().filter(|line| line.contains("OFDLCK")) {
        let fields: Vec<_> = line.split_whitespace().filter(|field| *field != "->").collect();
        let [.., place, first, last] = fields[..] else { continue };
        let inode = place.rsplit(':').next().and_then(|inode| inode.parse().ok());
        let (Some(inode), Ok(first), Ok(last)) = (inode, first.parse(), last.parse::<u64>()) else {
            continue;
        };
        if let Some(bytes) = held.get_mut(&inode) {
            bytes.extend(first..=last);
        }
    }
    held.values_mut().for_each(|bytes| bytes.sort_unstable());
    held
}
