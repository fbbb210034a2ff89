//! Image formats: the layout of disks in files.
//!
//! - [`raw`]: the file contains the disk without metadata.
//! - [`qcow2`]: clusters, with backing files, compression, snapshots and more.
//! - [`parallels`]: the format of Parallels, with clusters.
//! - [`qed`]: QEMU Enhanced Disk, a former format of QEMU, with backing files.
//! - [`vdi`]: the format of VirtualBox, with blocks of 1 MiB.
//! - [`vpc`]: the VHD format, fixed and dynamic.
//! - [`absent`]: formats that are recognised but not supported.
#![forbid(unsafe_code)]

pub mod absent;
mod blocks;
mod file_len;
mod header_mark;
mod not_writable;
pub mod parallels;
pub mod qcow2;
pub mod qed;
pub mod raw;
mod slice_cache;
pub mod vdi;
pub mod vpc;
mod write_barrier;
