//! [`Admission`]: drivers that see each request before it passes the node, but not the data of the request.

use crate::driver::BoxFuture;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// A read.
    Read,
    /// A write, also a compressed write, and the target of a copy between host files.
    Write,
    /// A zero write.
    WriteZeroes,
    /// A discard.
    Discard,
}

/// A request that reaches a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IncomingRequest {
    /// What the request does.
    pub kind: RequestKind,
    /// Byte offset in the node.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The capability to see each request before it passes the node, and to let it wait: for a rate limit or a counter.
///
/// The request path calls this capability once for each request that reaches the node, before it splits or aligns the request.
/// The request then continues at the node. It may be split below the node, but it does not reach the node again. Flushes, status
/// queries and resizes are not passed to this capability.
///
/// A request that waits counts as in flight. So a driver in which requests wait implements [`Drain`](crate::driver::Drain).
pub trait Admission: Send + Sync {
    /// Lets a request pass now. Returns whether the request may pass. If not, [`Self::admit`] follows for the same request. An
    /// implementation allocates no memory and waits for nothing.
    fn try_admit(&self, request: &IncomingRequest) -> bool;

    /// Waits until the request may pass. If the future is dropped earlier, the request has not passed.
    fn admit(&self, request: IncomingRequest) -> BoxFuture<'_, ()>;
}
