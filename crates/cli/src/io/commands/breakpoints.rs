//! Commands that suspend requests at debug events: `break`, `remove_break`, `resume`, `wait_break`. They need a node with the
//! driver `blkdebug`.

use std::sync::Arc;

use oxblk_core::{Breakpoints, ChildIdx, DebugEvent, Errno, Node, strerror};

use super::Call;
use crate::io::Outcome;
use crate::io::session::Session;
use crate::program::out;

/// The first node with breakpoints, from the image down.
fn find(session: &Session) -> Option<Arc<Node>> {
    let mut node = session.current()?.backend.node().ok()?;
    while node.driver().breakpoints().is_none() {
        node = node.child(ChildIdx::FILE)?;
    }
    Some(node)
}

/// Carries out a command on the breakpoints. `failed` begins the message of an error.
fn with(
    session: &Session,
    failed: &str,
    command: impl FnOnce(&dyn Breakpoints) -> bool,
) -> Outcome {
    let node = find(session);
    let errno = match node.as_ref().and_then(|node| node.driver().breakpoints()) {
        None => Errno::OPNOTSUPP,
        Some(breakpoints) if command(breakpoints) => return Outcome::Done,
        Some(_) => Errno::NOENT,
    };
    out(format_args!("{failed}: {}\n", strerror(errno)));
    Outcome::Failed
}

fn report(line: &str) {
    out(format_args!("{line}\n"));
}

/// The tag of a command whose only argument is the tag.
fn tag<'a>(call: &Call<'a>) -> &'a str {
    call.arguments.first().copied().unwrap_or_default()
}

/// `break`.
pub(in crate::io) async fn set(session: &Session, call: Call<'_>) -> Outcome {
    let [event, tag] = call.arguments else { return call.misused() };
    with(session, "Could not set breakpoint", |breakpoints| match DebugEvent::parse(event) {
        Some(event) => {
            breakpoints.set(event, tag, report);
            true
        }
        None => false,
    })
}

/// `remove_break`.
pub(in crate::io) async fn remove(session: &Session, call: Call<'_>) -> Outcome {
    let tag = tag(&call);
    with(session, &format!("Could not remove breakpoint {tag}"), |breakpoints| {
        breakpoints.remove(tag)
    })
}

/// `resume`.
pub(in crate::io) async fn resume(session: &Session, call: Call<'_>) -> Outcome {
    let tag = tag(&call);
    let outcome = with(session, "Could not resume request", |breakpoints| breakpoints.resume(tag));
    // Let the request continue before the next command starts.
    oxblk_ring::yield_now().await;
    outcome
}

/// `wait_break`.
pub(in crate::io) async fn wait(session: &Session, call: Call<'_>) -> Outcome {
    let node = find(session);
    let Some(breakpoints) = node.as_ref().and_then(|node| node.driver().breakpoints()) else {
        out(format_args!("Could not wait for a request: {}\n", strerror(Errno::OPNOTSUPP)));
        return Outcome::Failed;
    };
    breakpoints.wait(tag(&call)).await;
    Outcome::Done
}
