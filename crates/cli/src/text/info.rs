//! Information on an image in readable form.

use oxblk::{ImageInfo, qemu_json};
use serde_json::{Map, Value};

use super::{size, snapshot};

/// The complete output of `img info` for one image.
pub(crate) fn whole(info: &ImageInfo, with_limits: bool) -> String {
    let mut text = String::new();
    node_text(&mut text, info, 0, false, with_limits);
    children_text(&mut text, info, 0, "", with_limits);
    text
}

fn children_text(text: &mut String, info: &ImageInfo, level: usize, path: &str, with_limits: bool) {
    let indent = "    ".repeat(level);
    for (name, info) in &info.children {
        let path = format!("{path}/{name}");
        text.push_str(&format!("{indent}Child node '{path}':\n"));
        node_text(text, info, level + 1, info.children.is_empty(), with_limits);
        children_text(text, info, level + 1, &path, with_limits);
    }
}

fn node_text(text: &mut String, info: &ImageInfo, level: usize, is_leaf: bool, with_limits: bool) {
    let indent = "    ".repeat(level);
    let line = |text: &mut String, content: &str| {
        text.push_str(&indent);
        text.push_str(content);
        text.push('\n');
    };
    let [name, format, length] = match is_leaf {
        true => ["filename", "protocol type", "file length"],
        false => ["image", "file format", "virtual size"],
    };
    line(text, &format!("{name}: {}", info.name));
    line(text, &format!("{format}: {}", info.format));
    line(text, &format!("{length}: {}", size::both(info.virtual_size)));
    let disk = info.actual_size.map_or_else(|| "unavailable".to_owned(), size::short);
    line(text, &format!("disk size: {disk}"));
    if info.is_encrypted {
        line(text, "encrypted: yes");
    }
    if let Some(cluster) = info.cluster_size {
        line(text, &format!("cluster_size: {cluster}"));
    }
    if info.is_dirty == Some(true) {
        line(text, "cleanly shut down: no");
    }
    if let Some(backing) = &info.backing {
        let (name, full) = (&backing.name, &backing.full_name);
        match name == full {
            true => line(text, &format!("backing file: {name}")),
            false => line(text, &format!("backing file: {name} (actual path: {full})")),
        }
        if let Some(format) = &backing.format {
            line(text, &format!("backing file format: {format}"));
        }
    }
    if !info.snapshots.is_empty() {
        snapshot::list(&info.snapshots).lines().for_each(|one| line(text, one));
    }
    let json = info.to_json(with_limits);
    if let Some(Value::Object(limits)) = json.get("limits") {
        line(text, "Block limits:");
        text.push_str(&specific(limits, level + 1));
    }
    if let Some(Value::Object(data)) = info.specific.as_ref().and_then(|s| s.get("data"))
        && !data.is_empty()
    {
        line(text, "Format specific information:");
        text.push_str(&specific(data, level + 1));
    }
}

/// The driver-specific part of the information, one `name: value` per line.
pub(crate) fn specific(data: &Map<String, Value>, level: usize) -> String {
    let indent = "    ".repeat(level);
    let entry = |(key, value): (&String, &Value)| {
        let key = key.replace('-', " ");
        format!("{indent}{key}:{}", value_text(value, level + 1))
    };
    qemu_json::ordered(data).into_iter().map(entry).collect()
}

fn value_text(value: &Value, level: usize) -> String {
    let indent = "    ".repeat(level);
    match value {
        Value::Object(map) => format!("\n{}", specific(map, level)),
        Value::Array(list) => {
            let items = list.iter().enumerate();
            let items =
                items.map(|(i, item)| format!("{indent}[{i}]:{}", value_text(item, level + 1)));
            format!("\n{}", items.collect::<String>())
        }
        Value::String(text) => format!(" {text}\n"),
        plain => format!(" {plain}\n"),
    }
}

#[cfg(test)]
mod tests {
    use oxblk::BackingName;
    use oxblk_core::Limits;
    use serde_json::json;

    use super::*;

    fn info(name: &str, format: &str, virtual_size: u64) -> ImageInfo {
        ImageInfo {
            name: name.to_owned(),
            format: format.to_owned(),
            virtual_size,
            actual_size: Some(200_704),
            cluster_size: None,
            is_dirty: None,
            is_encrypted: false,
            backing: None,
            snapshots: Vec::new(),
            specific: None,
            limits: Limits::default().into(),
            children: Vec::new(),
        }
    }

    #[test]
    fn nested_driver_information_is_indented_by_level() {
        let data =
            json!({"compat": "1.1", "encrypt": {"format": "luks", "slots": [{"active": true}]}});
        let expected = "    compat: 1.1\n    encrypt:\n        slots:\n            [0]:\n                active: true\n        format: luks\n";
        let mut lines: Vec<_> =
            specific(data.as_object().unwrap(), 1).lines().map(str::to_owned).collect();
        let mut wanted: Vec<_> = expected.lines().map(str::to_owned).collect();
        lines.sort();
        wanted.sort();
        assert_eq!(lines, wanted);
    }

    #[test]
    fn a_human_summary_names_the_backing_file_and_where_it_is() {
        let backing = BackingName {
            name: "base.raw".to_owned(),
            full_name: "sub/base.raw".to_owned(),
            format: Some("raw".to_owned()),
        };
        let file = info("sub/top.q", "file", 197_120);
        let info = ImageInfo {
            cluster_size: Some(65536),
            is_dirty: Some(false),
            backing: Some(backing),
            children: vec![("file".to_owned(), file)],
            ..info("sub/top.q", "qcow2", 1 << 20)
        };
        let expected = "image: sub/top.q\nfile format: qcow2\nvirtual size: 1 MiB (1048576 bytes)\ndisk size: 196 KiB\ncluster_size: 65536\nbacking file: base.raw (actual path: sub/base.raw)\nbacking file format: raw\nChild node '/file':\n    filename: sub/top.q\n    protocol type: file\n    file length: 192 KiB (197120 bytes)\n    disk size: 196 KiB\n";
        assert_eq!(whole(&info, false), expected);
    }
}
