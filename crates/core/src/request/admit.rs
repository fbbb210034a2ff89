//! Admission of requests by the drivers that have the capability [`Admission`](crate::Admission).
//!
//! Each request asks each node on its way once. [`super::fast`] asks on the way down; a request that has to wait, that is
//! split, or that takes the slow path continues at a node that has admitted it ([`Entry::Admitted`]). Requests that do not
//! begin with the fast path (zero writes, discards, compressed writes) call [`admit`] when they reach a node. So the driver
//! of a node never sees a request that the node has not admitted.

use crate::node::SlowPathFlags;
use crate::{IncomingRequest, MapOp, Node, RequestKind};

/// How a request enters the walk at its first node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// The request reaches the node: the node has not admitted it yet.
    New,
    /// The node has admitted the request, which continues at the node.
    Admitted,
}

/// The request that looks up a range with `op`.
pub(super) fn incoming(op: MapOp, offset: u64, len: u64) -> IncomingRequest {
    let kind = match op {
        MapOp::Read => RequestKind::Read,
        MapOp::Write => RequestKind::Write,
    };
    IncomingRequest { kind, offset, len }
}

/// Lets a request pass the node now. Returns `false` if the request must wait ([`admit`]).
pub(super) fn try_admit(node: &Node, request: &IncomingRequest) -> bool {
    !node.has_gate(SlowPathFlags::ADMITS)
        || node.driver().admission().is_none_or(|driver| driver.try_admit(request))
}

/// Waits until a request that looks up a range with `op`, and that [`try_admit`] has not let pass, may pass the node.
pub(super) async fn wait(node: &Node, op: MapOp, offset: u64, len: u64) {
    wait_for(node, incoming(op, offset, len)).await;
}

async fn wait_for(node: &Node, request: IncomingRequest) {
    if let Some(driver) = node.driver().admission() {
        driver.admit(request).await;
    }
}

/// Lets a request pass the node, now or later.
pub(super) async fn admit(node: &Node, kind: RequestKind, offset: u64, len: u64) {
    let request = IncomingRequest { kind, offset, len };
    if !try_admit(node, &request) {
        wait_for(node, request).await;
    }
}
