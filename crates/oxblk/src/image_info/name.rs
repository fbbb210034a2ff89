//! The name with which a node can be opened again: its file name, or a `json:` name if the file name is not sufficient.

use oxblk_core::{ChildIdx, DriverKind, Node, relative_to};
use serde_json::{Map, Value, json};

use crate::qemu_json;

/// Options that change the contents of a disk. If one is set, the file name alone would open a different disk.
const STRONG: &[&str] = &[
    "offset",
    "size",
    "read-zeroes",
    "force_size_calc",
    "throttle-group",
    "inject-error",
    "set-state",
    "align",
    "max-transfer",
    "opt-write-zero",
    "max-write-zero",
    "opt-discard",
    "max-discard",
    "vote-threshold",
    "blkverify",
    "rewrite-corrupted",
    "read-pattern",
    "log-append",
    "log-sector-size",
    "mode",
    "top-id",
];

/// Options that are parts of a file name. A `json:` name contains these options instead.
const IN_FILE_NAMES: &[&str] = &["filename", "config"];

/// The file name of the node if this is sufficient to open the node again; otherwise the options as a `json:` name.
pub fn of_node(node: &Node) -> String {
    match node.filename() {
        Some(name) if is_plain(node) || shows_child_name(node) => name,
        _ => format!("json:{}", qemu_json::compact(&options_of(node))),
    }
}

/// Whether the driver reports the file name of its child as its own, although this name is not sufficient.
fn shows_child_name(node: &Node) -> bool {
    !node.factory().is_protocol() && node.driver().filename().is_some()
}

/// Whether the file name of a node, if there is one, is sufficient to open the node again.
fn is_plain(node: &Node) -> bool {
    // A format on top of another format. If the file were opened by its name, probing would find only the lower format.
    let stacked = node.child(ChildIdx::FILE).is_some_and(|file| !file.factory().is_protocol())
        && !node.factory().is_protocol();
    let is_filter = node.factory().kind() == DriverKind::Filter && !node.factory().is_protocol();
    !is_changed(node) && !stacked && !is_filter
}

/// Whether the node, or a protocol below it, was opened with options that are not in the file name.
fn is_changed(node: &Node) -> bool {
    node.options().keys().any(|key| STRONG.contains(&key))
        || key_secret_of(node).is_some()
        || leaves_backing_out(node)
        || leaves_children_out(node)
        || node.children().iter().any(|(child, edge)| {
            let is_named = match child {
                ChildIdx::BACKING => false,
                ChildIdx::DATA => node.factory().is_protocol(),
                _ => true,
            };
            // The name of `blkdebug` contains the name of its image.
            let contains_name = node.factory().is_protocol();
            is_named && if contains_name { !is_plain(edge.node()) } else { is_changed(edge.node()) }
        })
}

/// The ID of the secret that the node was opened with. If there is such a secret, the file name is not sufficient.
fn key_secret_of(node: &Node) -> Option<String> {
    node.options().take_options("encrypt")?.get_str("key-secret").map(str::to_owned)
}

/// Whether the image refers to its open backing file by name. Then the image can be opened again without the option `backing`.
fn is_named_in_image(node: &Node, backing: &Node) -> bool {
    let Some(named) = node.driver().info().backing_filename else { return false };
    let image = node.filename().unwrap_or_default();
    backing.filename().is_some_and(|name| name == relative_to(&image, &named))
}

/// Whether the image refers to a backing file, but was opened without it (`backing=null`).
fn leaves_backing_out(node: &Node) -> bool {
    !node.children().has(ChildIdx::BACKING)
        && !node.flags().no_backing
        && node.driver().info().backing_filename.is_some()
}

/// Whether the node has children that a file name cannot describe, for example a log.
fn leaves_children_out(node: &Node) -> bool {
    let slots = [ChildIdx::FILE, ChildIdx::BACKING, ChildIdx::DATA];
    let has_further = node.children().iter().any(|(child, _)| !slots.contains(&child));
    has_further && node.driver().filename().is_none()
}

fn options_of(node: &Node) -> Value {
    let mut map = Map::new();
    for (key, value) in node.options().iter() {
        if IN_FILE_NAMES.contains(&key) || STRONG.contains(&key) {
            flatten(&mut map, key, value);
        }
    }
    if let Some(secret) = key_secret_of(node) {
        map.insert("encrypt.key-secret".to_owned(), json!(secret));
    }
    map.insert("driver".to_owned(), json!(node.factory().name()));
    if leaves_backing_out(node) {
        map.insert(ChildIdx::BACKING.name().to_owned(), Value::Null);
    }
    for (child, edge) in node.children().iter() {
        if child == ChildIdx::BACKING && is_named_in_image(node, edge.node()) {
            continue;
        }
        let options = options_of(edge.node());
        // The names of the elements of a list are `children.0`, `children.1`, and so on.
        match edge.name().split_once('.') {
            None => drop(map.insert(edge.name().to_owned(), options)),
            Some((list, _)) => {
                let list = map.entry(list).or_insert_with(|| Value::Array(Vec::new()));
                if let Value::Array(list) = list {
                    list.push(options);
                }
            }
        }
    }
    Value::Object(map)
}

/// Inserts a value; a nested value under dotted keys.
fn flatten(map: &mut Map<String, Value>, key: &str, value: &Value) {
    match value {
        Value::Object(inner) => {
            for (part, value) in inner {
                flatten(map, &format!("{key}.{part}"), value);
            }
        }
        value => drop(map.insert(key.to_owned(), value.clone())),
    }
}
