//! The block graph: nodes, edges, backends, and the path that requests take through them.
//!
//! - [`Graph`] opens, creates, finds, drains and closes nodes.
//! - [`Backend`] is the handle through which a device, export, job or tool sends requests.
//! - [`Node`] is one driver instance; [`Edge`] connects a parent to a child node.
//! - [`driver`] contains the traits that formats, protocols and filters implement.
//!
//! All I/O threads of [`oxblk_ring`] may make requests concurrently; a node belongs to no thread.
#![forbid(unsafe_code)]

mod admission;
pub mod amend;
mod backend;
mod background;
mod backing;
pub mod bitmap;
mod blocked;
mod change;
pub mod check;
mod child_list;
mod children;
pub mod compact;
mod compressed;
mod control;
mod counted;
pub mod create;
mod debug_event;
pub mod driver;
mod edge;
mod epoch;
mod errno;
mod error;
mod events;
mod flags;
mod gate;
mod graph;
mod keeper;
mod limits;
pub mod names;
mod node;
mod objects;
mod options;
mod perm;
mod replication;
mod request;
mod secret;
pub mod snapshot;
mod snapshot_access;
mod status;
#[cfg(test)]
mod under_loom;
mod unflushed;
mod users;
pub mod vm_state;
mod writes_in_flight;

/// The atomics of the lock-free code. The loom models replace this module by a module with loom's types.
mod atomics {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
}

pub use admission::{Admission, IncomingRequest, RequestKind};
pub use backend::{
    AccountingOptions, Backend, Boundaries, Counts, Device, DeviceOptions, DeviceState,
    IntervalStatistics, IoStatus, IoType, Latencies, LatencyHistogram, OnError, PerIoType,
    SoleWriter, Statistics,
};
pub use background::Background;
pub use blocked::{OperationBlock, Operations};
pub use change::{Attachment, FrozenChain};
pub use child_list::ChildList;
pub use children::{ChildIdx, ChildSpec, Children};
pub use compressed::CompressedCluster;
pub use debug_event::{Breakpoints, DebugEvent, DebugEvents};
pub use driver::{
    BoxFuture, ChildrenRef, Driver, DriverFactory, DriverKind, DriverTable, HostFile, ImageInfo,
    MapOp, Preallocation, Step, Want,
};
pub use edge::Edge;
pub use epoch::{EpochGuard, Epochs};
pub use errno::Errno;
pub use error::{Error, ErrorKind, Result, strerror};
pub use events::{
    BlockEvent, EventSource, Events, IoErrorAction, IoOperation, Listening, Notice,
    QuorumOperation, Subscription,
};
pub use flags::{ReadFlags, WriteFlags, ZeroFlags};
pub use gate::{Admitted, Directory, Gate, Purpose, RefusedName};
pub use graph::{
    Action, BackingFile, Drained, Graph, GraphChange, OpenContext, OpenFlags, ReopenRequest,
    WritableBase, relative_to,
};
pub use limits::{Limits, MAX_LENGTH, check_length};
pub use node::{DetectZeroes, Node, RequestTracking};
pub use objects::Objects;
pub use options::{
    ListItem, Options, SizeError, number_fault, parse_bool, parse_json, parse_number, parse_size,
    size_fault, split_list,
};
pub use perm::{NodeAccess, Perm, Permissions, Roles};
pub use replication::{Replication, ReplicationMode};
pub use request::{ChainStatus, CopyOnRead, run_all};
pub use secret::Secrets;
pub use snapshot_access::SnapshotAccess;
pub use status::{Status, StatusFlags};
