//! `--object`: objects that images may refer to. The process has one set of objects for all its images.

use std::sync::OnceLock;

use oxblk_core::Objects;

use crate::program::out;

/// The objects defined on the command line.
pub(crate) fn all() -> &'static Objects {
    static OBJECTS: OnceLock<Objects> = OnceLock::new();
    OBJECTS.get_or_init(Objects::default)
}

/// Prints the list that a definition requests (`help`). Returns `false` if the definition requests no list.
///
/// # Errors
/// The message to print, if the definition is malformed.
pub(crate) fn print_help(definition: &str) -> Result<bool, String> {
    let list = oxblk::object_help(definition).map_err(|error| error.to_string())?;
    if let Some(list) = &list {
        out(format_args!("{list}"));
    }
    Ok(list.is_some())
}

/// Processes one object definition.
///
/// # Errors
/// The message to print.
pub(crate) fn define(definition: &str) -> Result<(), String> {
    oxblk::define_object(all(), definition).map_err(|error| match error.hint() {
        Some(hint) => format!("{error}\n{hint}"),
        None => error.to_string(),
    })
}
