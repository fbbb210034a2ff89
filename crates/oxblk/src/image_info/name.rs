//! The name that opens a node again.

use oxblk_core::{ChildIdx, DriverKind, Node};
use serde_json::{Map, Value, json};

use crate::qemu_json;

/// Options that change what an image holds: with one of them, its file name alone does not open it.
const STRONG: &[&str] = &["offset", "size", "read-zeroes", "latency-ns"];

/// The file name that opens the node, or its options as a `json:` name if there is none.
pub(super) fn of_node(node: &Node) -> String {
    let is_changed =
        node.options().keys().any(|key| STRONG.contains(&key)) || key_secret_of(node).is_some();
    // Opening the file by its name would not find a format on another format.
    let stacked =
        node.child(ChildIdx::FILE).is_some_and(|f| f.factory().kind() != DriverKind::Protocol);
    match node.filename() {
        Some(name) if !is_changed && !stacked => name,
        _ => format!("json:{}", qemu_json::compact(&options_of(node))),
    }
}

/// The secret that the node was opened with: without it the file name does not open the image either.
fn key_secret_of(node: &Node) -> Option<String> {
    node.options().take_options("encrypt")?.get_str("key-secret").map(str::to_owned)
}

fn options_of(node: &Node) -> Value {
    let mut map = Map::new();
    for (key, value) in node.options().iter() {
        if key == "filename" || STRONG.contains(&key) {
            map.insert(key.to_owned(), value.clone());
        }
    }
    if let Some(secret) = key_secret_of(node) {
        map.insert("encrypt.key-secret".to_owned(), json!(secret));
    }
    map.insert("driver".to_owned(), json!(node.factory().name()));
    for (child, edge) in node.children().iter() {
        map.insert(child.name().to_owned(), options_of(edge.node()));
    }
    Value::Object(map)
}
