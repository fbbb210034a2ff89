//! Random operations, checked against an array of bytes, and cancelled or concurrent operations.

mod cancelled_requests;
mod concurrent_control;
mod graph_changes;
mod random;
