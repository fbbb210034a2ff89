//! `length`, `info`, `map` and `alloc`: information on the image and on its allocated ranges.

use serde_json::Value;

use oxblk::in_sectors;
use oxblk_core::{Backend, ChildIdx, Error, ImageInfo, Node, StatusFlags, Want, strerror};

use super::Call;
use crate::io::Outcome;
use crate::io::numbers::bytes;
use crate::io::session::Session;
use crate::program::out;
use crate::text::info::specific;
use crate::text::size::long_bytes;

/// Longest range of one status query, in bytes.
const STEP: u64 = 1 << 30;

/// `length`.
pub(in crate::io) async fn length(session: &Session, _call: Call<'_>) -> Outcome {
    let Some(open) = session.current() else { return Outcome::Failed };
    out(format_args!("{}\n", long_bytes(in_sectors(open.backend.size()))));
    Outcome::Done
}

/// `info`.
pub(in crate::io) async fn info(session: &Session, _call: Call<'_>) -> Outcome {
    let Some(Ok(node)) = session.current().map(|open| open.backend.node()) else {
        return Outcome::Failed;
    };
    let driver = node.factory();
    out(format_args!("format name: {}\n", driver.name()));
    if driver.is_protocol() {
        // The name of the protocol, which has the same title in QEMU.
        out(format_args!("format name: {}\n", driver.name()));
    }
    if !oxblk::has_own_info(&node) {
        return Outcome::Failed;
    }
    let info = node.driver().info();
    let layout = layout_of(&node);
    out(format_args!("cluster size: {}\n", long_bytes(layout.cluster_size)));
    out(format_args!("vm state offset: {}\n", long_bytes(layout.vm_state_offset)));
    if let Some(Value::Object(data)) = info.specific.as_ref().and_then(|s| s.get("data"))
        && !data.is_empty()
    {
        out(format_args!("Format specific information:\n{}", specific(data, 1)));
    }
    Outcome::Done
}

/// The layout of the image: the layout of the node or, if the node is a filter, the layout of its child.
fn layout_of(node: &Node) -> ImageInfo {
    match node.child(ChildIdx::FILE) {
        Some(file) if node.factory().passes_permissions() => layout_of(&file),
        _ => node.driver().info(),
    }
}

/// The length of the range from `offset` on with one allocation status, and whether this range is allocated. Data of
/// backing files does not count as allocated. A range that contains neither data nor zeroes does not count either (`null-co`
/// returns undefined bytes).
async fn allocation(backend: &Backend, offset: u64, len: u64) -> Result<(u64, bool), Error> {
    let len = len.min(backend.size().saturating_sub(offset)).min(STEP);
    if len == 0 {
        return Ok((0, false));
    }
    let top = backend.node()?.skip_filters();
    let below: Option<std::sync::Arc<Node>> = top.child(ChildIdx::BACKING);
    let found = backend.status_above(below.as_ref(), offset, len, Want::Allocation).await?;
    let has_contents = found.status.flags.intersects(StatusFlags::DATA | StatusFlags::ZERO);
    Ok((found.status.len, found.status.is_allocated() && has_contents))
}

/// `map`.
pub(in crate::io) async fn map(session: &Session, _call: Call<'_>) -> Outcome {
    let Some(open) = session.current() else { return Outcome::Failed };
    let size = open.backend.size();
    let mut at = 0;
    while at < size {
        let (mut len, allocated) = match allocation(&open.backend, at, size - at).await {
            Ok(found) => found,
            Err(error) => return failed(session, &error),
        };
        while at.saturating_add(len) < size {
            let next = at.saturating_add(len);
            match allocation(&open.backend, next, size - next).await {
                Ok((more, same)) if same == allocated && more > 0 => len = len.saturating_add(more),
                Ok(_) => break,
                Err(error) => return failed(session, &error),
            }
        }
        if at.saturating_add(len) >= size {
            // QEMU's tools print whole sectors, also for the last range.
            len = in_sectors(size).saturating_sub(at);
        }
        let what = if allocated { "    allocated" } else { "not allocated" };
        out(format_args!(
            "{} ({len:#x}) bytes {what} at offset {} ({at:#x})\n",
            long_bytes(len),
            long_bytes(at)
        ));
        at = at.saturating_add(len.max(1));
    }
    Outcome::Done
}

/// `alloc`.
pub(in crate::io) async fn alloc(session: &Session, call: Call<'_>) -> Outcome {
    let Some(open) = session.current() else { return Outcome::Failed };
    let (offset, count) = match call.arguments {
        [offset] => (offset, None),
        [offset, count] => (offset, Some(count)),
        _ => return call.misused(),
    };
    let Some(offset) = bytes(offset) else { return Outcome::Failed };
    let Some(mut count) = count.map_or(Some(512), |count| bytes(count)) else {
        return Outcome::Failed;
    };
    let (mut at, mut left, mut sum) = (offset, count, 0_u64);
    while left > 0 {
        match allocation(&open.backend, at, left).await {
            Ok((0, _)) => {
                count -= left;
                left = 0;
            }
            Ok((len, allocated)) => {
                let len = len.min(left);
                sum = sum.saturating_add(if allocated { len } else { 0 });
                at = at.saturating_add(len);
                left -= len;
            }
            Err(error) => {
                out(format_args!("is_allocated failed: {}\n", strerror(error.raw_errno())));
                return Outcome::Failed;
            }
        }
    }
    out(format_args!("{sum}/{count} bytes allocated at offset {}\n", long_bytes(offset)));
    Outcome::Done
}

fn failed(session: &Session, error: &Error) -> Outcome {
    let reason = strerror(error.raw_errno());
    session.program.error(format_args!("Failed to get allocation status: {reason}"));
    Outcome::Failed
}
