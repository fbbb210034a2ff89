//! The target of a copy that a signal has stopped.

use oxblk_core::create::{Created, Removal};

use super::Context;

/// Removes the target if this run has created it, because an incomplete image looks like a complete image. Returns the end of
/// a sentence about the target: removed, incomplete, or replaced by another program.
pub(super) fn remove_target(
    context: &Context,
    target: &str,
    created: Option<Created>,
) -> &'static str {
    match created.map_or(Ok(Removal::Kept), Created::remove) {
        Ok(Removal::Removed) => "was removed",
        Ok(Removal::Kept) => "is incomplete",
        Ok(Removal::Replaced) => "was replaced by another program and is kept",
        Err(error) => {
            context.program.report_in(format_args!("Could not remove '{target}': "), &error);
            "is incomplete"
        }
    }
}
