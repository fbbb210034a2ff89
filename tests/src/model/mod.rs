//! Random operations on a disk, checked against a model in memory.
//!
//! The model ([`oracle`]) is an array of bytes. The disk must return the bytes of the array. A seed chooses the operations
//! ([`ops`]) in groups, called *batches*. The operations of one batch run concurrently. Two operations of a batch use the same
//! byte only if neither of them changes the disk, so the outcome does not depend on their order. But the operations use the
//! same sectors, clusters, tables and refcount blocks, where most bugs appear.
//!
//! A failure prints its seed. If the run is deterministic, the harness first reduces the failing sequence to the operations
//! that are needed ([`shrink`]).

pub mod bitmaps;
pub mod cancel;
pub mod chain;
mod files;
pub mod graph;
pub mod mixed;
pub mod ops;
pub mod oracle;
pub(crate) mod pool;
pub mod run;
pub mod shrink;
pub mod sim;
pub mod threads;
