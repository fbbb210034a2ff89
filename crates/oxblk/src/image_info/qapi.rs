//! QAPI's `ImageInfo` and `SnapshotInfo`. The keys are inserted in the same order as in QEMU. If two keys share a hash
//! chain, this order determines the order of printing ([`crate::qemu_json`]).

use oxblk_core::snapshot::SnapshotInfo;
use serde_json::{Map, Value, json};

use super::{ImageInfo, limits};

/// `ImageInfo`.
pub(super) fn image_info(info: &ImageInfo, with_limits: bool) -> Value {
    let mut map = Map::new();
    let mut insert = |key: &str, value: Value| map.insert(key.to_owned(), value);
    insert("filename", json!(info.name));
    insert("format", json!(info.format));
    insert("virtual-size", json!(info.virtual_size));
    if let Some(bytes) = info.actual_size {
        insert("actual-size", json!(bytes));
    }
    if let Some(bytes) = info.cluster_size {
        insert("cluster-size", json!(bytes));
    }
    if let Some(is_dirty) = info.is_dirty {
        insert("dirty-flag", json!(is_dirty));
    }
    if info.is_encrypted {
        insert("encrypted", json!(true));
    }
    if let Some(specific) = &info.specific {
        insert("format-specific", specific.clone());
    }
    if let Some(backing) = &info.backing {
        insert("full-backing-filename", json!(backing.full_name));
        insert("backing-filename", json!(backing.name));
        if let Some(format) = &backing.format {
            insert("backing-filename-format", json!(format));
        }
    }
    if with_limits {
        insert("limits", limits::to_json(&info.limits));
    }
    let child = |(name, info): &(&str, ImageInfo)| json!({"name": name, "info": image_info(info, with_limits)});
    insert("children", info.children.iter().map(child).collect());
    if !info.snapshots.is_empty() {
        insert("snapshots", info.snapshots.iter().map(snapshot_info).collect());
    }
    Value::Object(map)
}

/// `SnapshotInfo`.
fn snapshot_info(snapshot: &SnapshotInfo) -> Value {
    let mut info = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date.0,
        "date-nsec": snapshot.date.1,
        "vm-clock-sec": snapshot.vm_clock / 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock % 1_000_000_000,
    });
    if let Some(icount) = snapshot.icount.filter(|count| *count != u64::MAX) {
        info["icount"] = icount.into();
    }
    info
}
