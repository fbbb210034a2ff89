//! Random operations on a disk, checked against a model of it in memory.
//!
//! The model ([`oracle`]) is a plain array of bytes; what the disk returns must be what the array has.
//! Operations come from a seed ([`ops`]) in *batches*: those of one batch run at once, and no two of
//! them touch the same byte unless both read, so that the outcome is the same in whatever order they
//! happen. They do share sectors, clusters, tables and refcount blocks, which is where the bugs are.
//!
//! A failure prints its seed. Where the run is deterministic the failing batches are first cut down to
//! the few that are needed ([`shrink`]).

pub mod bitmaps;
pub mod cancel;
pub mod chain;
mod files;
pub mod mixed;
pub mod ops;
pub mod oracle;
pub(crate) mod pool;
pub mod run;
pub mod shrink;
pub mod sim;
pub mod threads;
