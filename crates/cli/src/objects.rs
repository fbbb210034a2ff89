//! `--object`: objects that images may refer to. The process has one set of objects for all its images.

use std::sync::OnceLock;

use oxblk_core::Objects;

/// The objects defined on the command line.
pub(crate) fn all() -> &'static Objects {
    static OBJECTS: OnceLock<Objects> = OnceLock::new();
    OBJECTS.get_or_init(Objects::default)
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
