//! What tables refer to, found out in bulk: for a check, and for snapshots, which count whole images.
//!
//! | file | concern |
//! |---|---|
//! | `counts` | a sparse, compact map from clusters to how often they are referred to |
//! | `pieces` | the entries of an L2 table, joined to runs of clusters (pure) |
//! | `tables` | reading many tables, each batch looked at on a worker thread |
//!
//! Tables are read and taken apart on all cores; what they say is counted on one thread, in the order of the tables, so
//! that findings come in the same order whatever the machine does.

mod counts;
mod pieces;
mod tables;

pub(super) use counts::{Agreement, Claim, References, Referred};
pub(super) use pieces::{Piece, pieces};
pub(super) use tables::read_tables;
