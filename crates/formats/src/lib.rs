//! Image formats: how disks are laid out in files.
//!
//! - [`raw`]: as they are.
//! - [`qcow2`]: QEMU's copy-on-write format.
#![forbid(unsafe_code)]

pub mod qcow2;
pub mod raw;
