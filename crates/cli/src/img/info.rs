//! `img info`.
//!
//! Nothing is opened but the image itself and, with `--backing-chain`, the files below it: what an image
//! names is only printed.

use std::sync::Arc;

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{ChildIdx, DriverKind, Graph, Node, Options, Purpose, relative_to};
use serde_json::{Map, Value, json};

use super::{Context, Step, graph, limits, objects};
use crate::cache::CacheMode;
use crate::getopt::{Found, Opt, both, long};
use crate::image::Image;
use crate::program::out;
use crate::text::number::in_sectors;
use crate::text::{json, size, snapshot};

const OPTIONS: &[Opt] = &[
    both('h', "help", false),
    both('f', "format", true),
    long('J', "output", true),
    both('b', "backing-chain", false),
    long('O', "object", true),
    long('I', "image-opts", false),
    both('U', "force-share", false),
    both('t', "cache", true).in_full(),
    long('L', "limits", false).in_full(),
];

struct Arguments {
    format: Option<String>,
    image_options: bool,
    chain: bool,
    cache: CacheMode,
    share: bool,
    limits: bool,
    json: bool,
    filename: String,
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    context.block_on(async {
        let graph = graph();
        let mut infos = Vec::new();
        let mut seen = Vec::new();
        let mut next = Some((arguments.filename.clone(), arguments.format.clone()));
        let mut is_options = arguments.image_options;
        while let Some((name, format)) = next.take() {
            // A name that is relative to the one before grows with each round of a loop.
            let file =
                std::path::Path::new(&name).canonicalize().unwrap_or_else(|_| name.clone().into());
            if seen.contains(&file) {
                let message = format_args!("Backing file '{name}' creates an infinite loop.");
                return Err(context.failed(message));
            }
            let info = collect(context, &graph, &arguments, &name, format, is_options).await?;
            is_options = false;
            if arguments.chain {
                next = below(&info);
            }
            if let Some((name, _)) = &mut next {
                let admitted = graph.gate().admit(Purpose::Backing, name);
                *name = admitted.map_err(|error| context.error(&error))?.name;
            }
            seen.push(file);
            infos.push(info);
        }
        print(&infos, &arguments);
        Ok(())
    })
}

fn read(context: &Context, arguments: Vec<String>) -> Step<Arguments> {
    let mut parser = context.parser(arguments, OPTIONS);
    let mut cache = None;
    let mut read = Arguments {
        format: None,
        image_options: false,
        chain: false,
        cache: CacheMode::WRITEBACK,
        share: false,
        limits: false,
        json: false,
        filename: String::new(),
    };
    while let Some(Found { id, value }) = context.next(&mut parser)? {
        match id {
            'f' => read.format = Some(value),
            'I' => read.image_options = true,
            'b' => read.chain = true,
            't' => cache = Some(value),
            'U' => read.share = true,
            'L' => read.limits = true,
            'J' => read.json = context.wants_json(&value)?,
            _ => objects::define(&value).map_err(|text| context.failed(text))?,
        }
    }
    if let Some(name) = cache {
        let unknown = || context.failed(format_args!("Invalid cache option: {name}"));
        read.cache = CacheMode::parse(&name).ok_or_else(unknown)?;
    }
    let operands = parser.operands();
    let [filename] = operands.as_slice() else {
        return Err(context.misused("Expecting one image file name"));
    };
    read.filename.clone_from(filename);
    Ok(read)
}

async fn collect(
    context: &Context,
    graph: &Graph,
    arguments: &Arguments,
    name: &str,
    format: Option<String>,
    is_options: bool,
) -> Step<Value> {
    let mut image =
        Image { options: Options::new(), ..Image::read_only(name) }.format(format.as_deref());
    image = image.options_if(is_options).share_if(arguments.share).cache(arguments.cache);
    image.flags.no_backing = true;
    image.flags.no_io = true;
    let backend = image.open_or_say(&context.program, graph).await?;
    let mut info = match backend.node() {
        Ok(node) => image_info(&node, arguments.limits),
        Err(error) => return Err(context.error(&error)),
    };
    // A format without snapshots has none to tell of.
    let list = backend.snapshots().await.unwrap_or_default();
    if !list.is_empty()
        && let Value::Object(info) = &mut info
    {
        info.insert("snapshots".to_owned(), list.iter().map(snapshot_info).collect());
    }
    backend.close().await.map_err(|error| context.error(&error))?;
    Ok(info)
}

/// The image below, as far as `info` tells.
fn below(info: &Value) -> Option<(String, Option<String>)> {
    let text = |key: &str| info.get(key).and_then(Value::as_str).map(str::to_owned);
    Some((text("full-backing-filename")?, text("backing-filename-format")))
}

/// QAPI's `ImageInfo` of a node.
fn image_info(node: &Arc<Node>, with_limits: bool) -> Value {
    let driver = node.driver().info();
    let filename = name_of(node);
    let mut map = Map::new();
    map.insert("filename".to_owned(), json!(filename));
    map.insert("format".to_owned(), json!(node.factory().name()));
    map.insert("virtual-size".to_owned(), json!(in_sectors(node.size())));
    if let Some(bytes) = node.allocated_size() {
        map.insert("actual-size".to_owned(), json!(bytes));
    }
    if tells_of_itself(node) {
        let (cluster_size, is_dirty) = clusters_of(node);
        if cluster_size != 0 {
            map.insert("cluster-size".to_owned(), json!(cluster_size));
        }
        map.insert("dirty-flag".to_owned(), json!(is_dirty));
    }
    if driver.is_encrypted {
        map.insert("encrypted".to_owned(), json!(true));
    }
    if let Some(specific) = driver.specific {
        map.insert("format-specific".to_owned(), specific);
    }
    if let Some(backing) = driver.backing_filename {
        map.insert("full-backing-filename".to_owned(), json!(relative_to(&filename, &backing)));
        map.insert("backing-filename".to_owned(), json!(backing));
        if let Some(format) = driver.backing_format {
            map.insert("backing-filename-format".to_owned(), json!(format));
        }
    }
    if with_limits {
        map.insert("limits".to_owned(), limits::to_json(&node.limits()));
    }
    let children: Vec<_> = node
        .children()
        .iter()
        .map(|(child, edge)| json!({"name": child.name(), "info": image_info(edge.node(), with_limits)}))
        .collect();
    map.insert("children".to_owned(), Value::Array(children));
    Value::Object(map)
}

/// QAPI's `SnapshotInfo`.
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

/// What [`snapshot_info`] tells, read back.
fn snapshot_of(info: &Value) -> SnapshotInfo {
    let number = |key: &str| info.get(key).and_then(Value::as_u64);
    let text = |key: &str| info.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let small = |key: &str| number(key).and_then(|value| u32::try_from(value).ok()).unwrap_or(0);
    let seconds = number("vm-clock-sec").unwrap_or(0).saturating_mul(1_000_000_000);
    SnapshotInfo {
        id: text("id"),
        name: text("name"),
        date: (small("date-sec"), small("date-nsec")),
        vm_clock: seconds.saturating_add(number("vm-clock-nsec").unwrap_or(0)),
        vm_state_size: number("vm-state-size").unwrap_or(0),
        icount: number("icount"),
        size: None,
    }
}

/// Cluster size and whether the image is dirty: the node's own, or those of what it passes on to.
fn clusters_of(node: &Node) -> (u64, bool) {
    let info = node.driver().info();
    match node.child(ChildIdx::FILE) {
        Some(file) if node.factory().passes_permissions() => clusters_of(&file),
        _ => (info.cluster_size, info.is_dirty),
    }
}

/// Options that change what an image holds: with one of them, its file name alone does not open it.
const STRONG: &[&str] = &["offset", "size", "read-zeroes", "latency-ns"];

/// The file name that opens the node, or its options as a `json:` name where there is none.
fn name_of(node: &Node) -> String {
    let is_changed =
        node.options().keys().any(|key| STRONG.contains(&key)) || key_secret_of(node).is_some();
    // A format on another format is not what opening the file by its name would find.
    let stacked =
        node.child(ChildIdx::FILE).is_some_and(|f| f.factory().kind() != DriverKind::Protocol);
    match node.filename() {
        Some(name) if !is_changed && !stacked => name,
        _ => format!("json:{}", json::compact(&options_of(node))),
    }
}

/// The secret that the node was opened with: without it the file name does not open it either.
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

/// Whether the driver, or what it passes on to, knows more of its image than the size.
pub(crate) fn tells_of_itself(node: &Node) -> bool {
    let knows = node.driver().info() != oxblk_core::ImageInfo::default();
    knows
        || node.factory().passes_permissions()
            && node.children().iter().any(|(_, edge)| tells_of_itself(edge.node()))
}

fn print(infos: &[Value], arguments: &Arguments) {
    if arguments.json {
        let value = match infos {
            [info] if !arguments.chain => info.clone(),
            infos => Value::Array(infos.to_vec()),
        };
        out(format_args!("{}\n", json::pretty(&value)));
        return;
    }
    let texts: Vec<_> = infos.iter().map(human).collect();
    out(format_args!("{}", texts.join("\n")));
}

fn human(info: &Value) -> String {
    let mut text = String::new();
    node_text(&mut text, info, 0, false);
    children_text(&mut text, info, 0, "");
    text
}

fn children_text(text: &mut String, info: &Value, level: usize, path: &str) {
    let indent = "    ".repeat(level);
    for child in info.get("children").and_then(Value::as_array).into_iter().flatten() {
        let (Some(name), Some(info)) =
            (child.get("name").and_then(Value::as_str), child.get("info"))
        else {
            continue;
        };
        let path = format!("{path}/{name}");
        text.push_str(&format!("{indent}Child node '{path}':\n"));
        let is_leaf = info.get("children").and_then(Value::as_array).is_none_or(Vec::is_empty);
        node_text(text, info, level + 1, is_leaf);
        children_text(text, info, level + 1, &path);
    }
}

fn node_text(text: &mut String, info: &Value, level: usize, is_leaf: bool) {
    let indent = "    ".repeat(level);
    let mut line = |content: String| {
        text.push_str(&indent);
        text.push_str(&content);
        text.push('\n');
    };
    let word = |key: &str| info.get(key).and_then(Value::as_str);
    let number = |key: &str| info.get(key).and_then(Value::as_u64);
    let names = if is_leaf {
        ["filename", "protocol type", "file length"]
    } else {
        ["image", "file format", "virtual size"]
    };
    let [name, format, length] = names;
    line(format!("{name}: {}", word("filename").unwrap_or_default()));
    line(format!("{format}: {}", word("format").unwrap_or_default()));
    line(format!("{length}: {}", size::both(number("virtual-size").unwrap_or(0))));
    let disk = number("actual-size").map_or_else(|| "unavailable".to_owned(), size::short);
    line(format!("disk size: {disk}"));
    if info.get("encrypted") == Some(&Value::Bool(true)) {
        line("encrypted: yes".to_owned());
    }
    if let Some(cluster) = number("cluster-size") {
        line(format!("cluster_size: {cluster}"));
    }
    if info.get("dirty-flag") == Some(&Value::Bool(true)) {
        line("cleanly shut down: no".to_owned());
    }
    if let Some(backing) = word("backing-filename") {
        line(match word("full-backing-filename") {
            Some(full) if full != backing => {
                format!("backing file: {backing} (actual path: {full})")
            }
            Some(_) => format!("backing file: {backing}"),
            None => format!("backing file: {backing} (cannot determine actual path)"),
        });
        if let Some(format) = word("backing-filename-format") {
            line(format!("backing file format: {format}"));
        }
    }
    if let Some(list) = info.get("snapshots").and_then(Value::as_array) {
        let list: Vec<_> = list.iter().map(snapshot_of).collect();
        text.push_str(&snapshot::list(&list));
    }
    let mut line = |content: String| {
        text.push_str(&indent);
        text.push_str(&content);
        text.push('\n');
    };
    if let Some(Value::Object(limits)) = info.get("limits") {
        line("Block limits:".to_owned());
        text.push_str(&specific_text(limits, level + 1));
    }
    let mut line = |content: String| {
        text.push_str(&indent);
        text.push_str(&content);
        text.push('\n');
    };
    if let Some(Value::Object(data)) = info.get("format-specific").and_then(|s| s.get("data"))
        && !data.is_empty()
    {
        line("Format specific information:".to_owned());
        text.push_str(&specific_text(data, level + 1));
    }
}

/// The driver's own part of the information, one `name: value` a line.
pub(crate) fn specific_text(data: &Map<String, Value>, level: usize) -> String {
    let indent = "    ".repeat(level);
    let entry = |(key, value): (&String, &Value)| {
        let key = key.replace('-', " ");
        format!("{indent}{key}:{}", value_text(value, level + 1))
    };
    json::ordered(data).into_iter().map(entry).collect()
}

fn value_text(value: &Value, level: usize) -> String {
    let indent = "    ".repeat(level);
    match value {
        Value::Object(map) => format!("\n{}", specific_text(map, level)),
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
    use super::*;

    #[test]
    fn nested_driver_information_is_indented_by_level() {
        let data =
            json!({"compat": "1.1", "encrypt": {"format": "luks", "slots": [{"active": true}]}});
        let expected = "    compat: 1.1\n    encrypt:\n        slots:\n            [0]:\n                active: true\n        format: luks\n";
        let mut lines: Vec<_> =
            specific_text(data.as_object().unwrap(), 1).lines().map(str::to_owned).collect();
        let mut wanted: Vec<_> = expected.lines().map(str::to_owned).collect();
        lines.sort();
        wanted.sort();
        assert_eq!(lines, wanted);
    }

    #[test]
    fn a_human_summary_names_the_backing_file_and_where_it_is() {
        let info = json!({
            "filename": "sub/top.q", "format": "qcow2", "virtual-size": 1_048_576, "actual-size": 200_704,
            "cluster-size": 65536, "dirty-flag": false, "backing-filename": "base.raw",
            "full-backing-filename": "sub/base.raw", "backing-filename-format": "raw",
            "children": [{"name": "file", "info": {
                "filename": "sub/top.q", "format": "file", "virtual-size": 197_120,
                "actual-size": 200_704, "format-specific": {"type": "file", "data": {}}, "children": [],
            }}],
        });
        let expected = "image: sub/top.q\nfile format: qcow2\nvirtual size: 1 MiB (1048576 bytes)\ndisk size: 196 KiB\ncluster_size: 65536\nbacking file: base.raw (actual path: sub/base.raw)\nbacking file format: raw\nChild node '/file':\n    filename: sub/top.q\n    protocol type: file\n    file length: 192 KiB (197120 bytes)\n    disk size: 196 KiB\n";
        assert_eq!(human(&info), expected);
    }
}
