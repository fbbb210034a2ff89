//! Protocol drivers: the lowest nodes of the graph, which access the storage of the host.
//!
//! - [`mod@file`]: files and block devices of the host (`file`, `host_device`).
//! - [`null`]: a disk without storage, for benchmarks of the nodes above it (`null-co`, `null-aio`).
#![forbid(unsafe_code)]

pub mod file;
pub mod null;
