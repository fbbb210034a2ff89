//! Parsing option lists of the command line, with QEMU's warnings about deprecated forms.

use oxblk_core::{ListItem, Options, Result, split_list};
use serde_json::Value;

use crate::program::{err, warn};

/// Splits a list, and warns about each word without a value.
pub(crate) fn list(text: &str, implied: Option<&str>) -> Vec<ListItem> {
    let items = split_list(text, implied);
    for item in &items {
        // `help` and `?` request help and are not options.
        if let Some(word) = &item.short_form
            && !matches!(word.as_str(), "help" | "?")
        {
            warn(format_args!("short-form boolean option '{word}' deprecated"));
            err(format_args!("Please use {}={} instead\n", item.key, item.value));
        }
    }
    items
}

/// Parses a list with dotted keys into a tree.
///
/// # Errors
/// If a key is nested too deeply.
pub(crate) fn tree(text: &str, implied: Option<&str>) -> Result<Options> {
    let mut options = Options::new();
    for item in list(text, implied) {
        options.set(&item.key, item.value)?;
    }
    warn_of_empty_backing(&options.to_json());
    Ok(options)
}

/// Warns about each backing file with an empty name, at any depth.
pub(crate) fn warn_of_empty_backing(options: &Value) {
    let Some(map) = options.as_object() else { return };
    for (key, value) in map {
        if key == "backing" && value.as_str() == Some("") {
            warn("Use of \"backing\": \"\" is deprecated; use \"backing\": null instead");
        }
        warn_of_empty_backing(value);
    }
}

/// Refuses a list whose `id` is not an identifier.
///
/// # Errors
/// The error of QEMU's tools.
pub(crate) fn check_id(text: &str, implied: Option<&str>) -> Result<()> {
    let items = split_list(text, implied);
    match items.iter().find(|item| item.key == "id") {
        Some(item) => oxblk::check_identifier(&item.value),
        None => Ok(()),
    }
}
