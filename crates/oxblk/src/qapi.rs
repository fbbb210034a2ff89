//! Results as JSON objects of QEMU's interface (QAPI).
//!
//! Keys that share a hash chain must be inserted in the same order as in QEMU, because this order determines the order of
//! printing ([`crate::qemu_json`]). The order of other keys does not matter.

use oxblk_core::check::CheckReport;
use oxblk_core::create::Measure;
use oxblk_core::snapshot::SnapshotInfo;
use serde_json::{Map, Value, json};

use crate::image_info::{ImageInfo, limits};

/// QAPI's `BlockGraphInfo`, with the key `limits` if `with_limits` is set.
pub fn image_info(info: &ImageInfo, with_limits: bool) -> Value {
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
    let child = |(name, info): &(String, ImageInfo)| json!({"name": name, "info": image_info(info, with_limits)});
    insert("children", info.children.iter().map(child).collect());
    if !info.snapshots.is_empty() {
        insert("snapshots", info.snapshots.iter().map(snapshot_info).collect());
    }
    Value::Object(map)
}

/// QAPI's `SnapshotInfo`.
pub fn snapshot_info(snapshot: &SnapshotInfo) -> Value {
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

/// QAPI's `ImageCheck` of the image with this file name and format. Numbers that are zero are not included, except
/// `check-errors`.
pub fn image_check(report: &CheckReport, filename: &str, format: &str) -> Value {
    let numbers = [
        ("image-end-offset", report.image_end_offset),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ];
    let nonzero = numbers.into_iter().filter(|(_, number)| *number != 0);
    let mut map: Map<_, _> = nonzero.map(|(key, number)| (key.to_owned(), json!(number))).collect();
    map.insert("filename".to_owned(), json!(filename));
    map.insert("format".to_owned(), json!(format));
    map.insert("check-errors".to_owned(), json!(report.check_errors));
    Value::Object(map)
}

/// QAPI's `BlockMeasureInfo`.
pub fn measure(measure: &Measure) -> Value {
    let mut map = Map::new();
    map.insert("required".to_owned(), json!(measure.required));
    map.insert("fully-allocated".to_owned(), json!(measure.fully_allocated));
    if let Some(bitmaps) = measure.bitmaps {
        map.insert("bitmaps".to_owned(), json!(bitmaps));
    }
    Value::Object(map)
}
