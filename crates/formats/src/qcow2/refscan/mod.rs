//! Reading many tables concurrently, and counting the references of their entries. Checks, snapshots and compaction use
//! this module.
//!
//! | file | concern |
//! |---|---|
//! | `counts` | a sparse map from clusters to their number of references |
//! | `disjoint_ranges` | cutting overlapping ranges into disjoint ranges (without I/O) |
//! | `entry_groups` | parsing an L2 table into runs of clusters (without I/O) |
//! | `tables` | reading many tables, and processing each batch on a worker thread |
//!
//! Tables are parsed on several worker threads. The references are counted on one thread in the order of the tables, so
//! that the results have the same order on every run.

mod counts;
mod disjoint_ranges;
mod entry_groups;
mod tables;

pub(super) use counts::{ClusterReferences, CopiedFlag, MatchingBlock, References};
pub(super) use disjoint_ranges::disjoint_ranges;
pub(super) use entry_groups::{EntryGroup, group_entries};
pub(super) use tables::read_tables;
