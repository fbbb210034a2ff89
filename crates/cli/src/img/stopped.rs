//! The target of a creation or a copy that a signal has stopped.

use oxblk_core::Graph;
use oxblk_core::create::{Created, Removal};

use super::{Context, Exit};

/// Removes the files of the target that this run has created, because an incomplete image looks like a complete image. The
/// caller has closed the files. Prints one error message that begins with `what` and says for each file whether it was
/// removed. A removal that fails has a message of its own.
pub(super) async fn report_stop(
    context: &Context,
    graph: &Graph,
    what: &str,
    target: &str,
    created: Option<Created>,
) -> Exit {
    let mut files = Vec::new();
    let removals = match created {
        Some(created) => created.remove(graph).await,
        None => Vec::new(),
    };
    for removal in removals {
        let file = removal.filename;
        let end = match removal.outcome {
            Ok(Removal::Removed) => "was removed",
            Ok(Removal::Kept) => "is incomplete",
            Ok(Removal::Replaced) => "was replaced by another program and is kept",
            Err(error) => {
                context.program.report_in(format_args!("Could not remove '{file}': "), &error);
                "is incomplete"
            }
        };
        files.push(format!("'{file}' {end}"));
    }
    if files.is_empty() {
        files.push(format!("'{target}' is incomplete"));
    }
    context.program.error(format_args!("{what}: {}", files.join(", ")));
    Exit::INTERRUPTED
}
