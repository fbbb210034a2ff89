//! Image formats: how disks are laid out in files.
//!
//! - [`raw`]: as they are.
//! - [`qcow2`]: in clusters, with backing files, compression and more.
//! - [`parallels`]: in clusters, as Parallels has them.
//! - [`vdi`]: in blocks of 1 MiB, as VirtualBox has them.
//! - [`absent`]: those that are known by sight only.
#![forbid(unsafe_code)]

pub mod absent;
mod blocks;
pub mod parallels;
pub mod qcow2;
pub mod raw;
pub mod vdi;
mod write_barrier;
