//! Tests of the protocol drivers in a graph: on files, devices and a simulated disk, and file locks between these
//! drivers and the installed QEMU tools.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
mod devices;
mod failed_foreign_reads;
mod file;
mod foreign_memory;
mod locking;
mod null;
mod shared_blocks;
mod simulated;
