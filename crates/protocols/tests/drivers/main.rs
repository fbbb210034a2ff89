//! The protocol drivers through the graph: on files, devices, a simulated disk, and against the installed tools.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
mod devices;
mod file;
mod locking;
mod shared_blocks;
mod simulated;
