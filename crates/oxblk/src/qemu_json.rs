//! Formatting of JSON in the same way as QEMU's tools.
//!
//! The output has the same bytes as the output of QEMU, so that people and tests can compare outputs. It differs from the
//! output of other JSON libraries in three ways:
//!
//! - Layout: the indentation is four spaces per level, and an empty list or object takes two lines.
//! - Strings: every character outside printable ASCII is escaped, as `\u` with four digits or as `\n`, `\t`, `\b`, `\f`, `\r`.
//! - Order of keys: QEMU stores an object in a hash table with 512 chains. It prints one chain after the other, and the newest
//!   key of a chain first. So the order looks arbitrary, but it is the same on every run.

use serde_json::{Map, Value};

/// Number of chains of the hash table.
const BUCKETS: u32 = 512;

/// Formats `value` on several lines, without a newline at the end.
pub fn pretty(value: &Value) -> String {
    let mut out = String::new();
    print(&mut out, value, Some(0));
    out
}

/// Formats `value` on one line, as in `json:{…}` file names.
pub fn compact(value: &Value) -> String {
    let mut out = String::new();
    print(&mut out, value, None);
    out
}

/// The entries of an object in the order in which QEMU prints them.
pub fn ordered(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut entries: Vec<_> = map.iter().collect();
    entries.reverse();
    entries.sort_by_key(|(key, _)| bucket(key));
    entries
}

/// The chain that contains a key. QEMU uses the hash function of the TDB database.
fn bucket(key: &str) -> u32 {
    let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
    let mut value = 0x238f_13af_u32.wrapping_mul(length);
    for (index, byte) in key.bytes().enumerate() {
        let shift = u32::try_from(index * 5 % 24).unwrap_or_default();
        value = value.wrapping_add(u32::from(byte) << shift);
    }
    value.wrapping_mul(1_103_515_243).wrapping_add(12345) % BUCKETS
}

fn print(out: &mut String, value: &Value, level: Option<usize>) {
    match value {
        Value::String(text) => string(out, text),
        Value::Array(list) => {
            enclosed(out, '[', ']', level, list.iter(), print);
        }
        Value::Object(map) => {
            enclosed(out, '{', '}', level, ordered(map).into_iter(), |out, (key, item), level| {
                string(out, key);
                out.push_str(": ");
                print(out, item, level);
            });
        }
        plain => out.push_str(&plain.to_string()),
    }
}

fn enclosed<T>(
    out: &mut String,
    open: char,
    close: char,
    level: Option<usize>,
    items: impl Iterator<Item = T>,
    each: impl Fn(&mut String, T, Option<usize>),
) {
    out.push(open);
    let inner = level.map(|level| level + 1);
    for (index, item) in items.enumerate() {
        if index > 0 {
            out.push_str(if inner.is_some() { "," } else { ", " });
        }
        break_line(out, inner);
        each(out, item, inner);
    }
    break_line(out, level);
    out.push(close);
}

fn break_line(out: &mut String, level: Option<usize>) {
    if let Some(level) = level {
        out.push('\n');
        out.extend(std::iter::repeat_n("    ", level));
    }
}

fn string(out: &mut String, text: &str) {
    use std::fmt::Write as _;
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04X}");
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn empty_lists_and_objects_take_two_lines() {
        let expected = "{\n    \"children\": [\n    ],\n    \"data\": {\n    }\n}";
        assert_eq!(pretty(&json!({"data": {}, "children": []})), expected);
    }

    #[test]
    fn keys_come_in_the_order_of_their_hash_chains() {
        let info = json!({
            "virtual-size": 1, "filename": "f", "format": "raw", "actual-size": 1,
            "format-specific": {}, "backing-filename": "b", "full-backing-filename": "b",
            "backing-filename-format": "raw", "dirty-flag": false, "cluster-size": 1,
            "children": [],
        });
        let keys: Vec<_> = ordered(info.as_object().unwrap()).iter().map(|(k, _)| *k).collect();
        let expected = [
            "children",
            "backing-filename-format",
            "virtual-size",
            "filename",
            "cluster-size",
            "format",
            "actual-size",
            "format-specific",
            "full-backing-filename",
            "backing-filename",
            "dirty-flag",
        ];
        assert_eq!(keys, expected);
    }

    #[test]
    fn compact_output_has_a_space_after_each_comma() {
        let value =
            json!({"file": {"driver": "file", "filename": "a"}, "driver": "raw", "offset": "512"});
        assert_eq!(
            compact(&value),
            r#"{"offset": "512", "driver": "raw", "file": {"driver": "file", "filename": "a"}}"#
        );
    }

    #[test]
    fn text_outside_printable_ascii_is_escaped() {
        assert_eq!(
            compact(&json!("a\"\\\n\u{1}\u{7f}é😀")),
            r#""a\"\\\n\u0001\u007F\u00E9\uD83D\uDE00""#
        );
    }
}
