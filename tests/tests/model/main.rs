//! Random operations, checked against an array of bytes, and cancelled or concurrent operations.

mod cancelled_requests;
mod concurrent_control;
mod copy_on_read;
mod damage;
mod filters;
mod graph_changes;
mod random;
mod replication;
