//! `--object`: objects that images may refer to. The process has one set of secrets for all its images.

use std::sync::OnceLock;

use oxblk_core::Secrets;

/// The secrets defined on the command line.
pub(crate) fn secrets() -> &'static Secrets {
    static SECRETS: OnceLock<Secrets> = OnceLock::new();
    SECRETS.get_or_init(Secrets::default)
}

/// Processes one object definition.
///
/// # Errors
/// The message to print.
pub(crate) fn define(definition: &str) -> Result<(), String> {
    oxblk::define_object(secrets(), definition).map_err(|error| match error.hint() {
        Some(hint) => format!("{error}\n{hint}"),
        None => error.to_string(),
    })
}
