//! Protocol drivers: where bytes really lie.
//!
//! - [`mod@file`]: files and block devices of the host (`file`, `host_device`).
//! - [`null`]: a disk of nothing, for measuring everything else (`null-co`, `null-aio`).
#![forbid(unsafe_code)]

pub mod file;
pub mod null;
