//! Reading many tables concurrently, and counting the references of their entries. Checks, snapshots and compaction use
//! this module.
//!
//! | file | concern |
//! |---|---|
//! | `counts` | a sparse map from clusters to their number of references |
//! | `layers` | cutting overlapping ranges into disjoint ranges (without I/O) |
//! | `pieces` | parsing an L2 table into runs of clusters (without I/O) |
//! | `tables` | reading many tables, and processing each batch on a worker thread |
//!
//! Tables are parsed on several worker threads. The references are counted on one thread in the order of the tables, so
//! that the results have the same order on every run.

mod counts;
mod layers;
mod pieces;
mod tables;

pub(super) use counts::{Agreement, Claim, References, Referred};
pub(super) use layers::layers;
pub(super) use pieces::{Piece, pieces};
pub(super) use tables::read_tables;
