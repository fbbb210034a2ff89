//! Image formats: how disks are laid out in files.
//!
//! - [`raw`]: as they are.
#![forbid(unsafe_code)]

pub mod raw;
