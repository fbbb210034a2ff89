//! Power cuts on a simulated disk.
//!
//! A workload of random operations runs on a chain of images. The active image is on a simulated disk, and the harness keeps
//! the state of this disk at many write boundaries. A power cut at a boundary may lose all, some or none of the writes that
//! were not flushed, so the harness makes several disks for each cut. The image on each of them must open and pass the driver's
//! check (leaks are allowed, corruptions are not). The image must contain every byte of a completed FUA write and every byte
//! that was flushed, and accept requests. `qemu-img check` runs on some of the images.
//!
//! The workload runs in two ways: on the simulated executor ([`run`]), so that a seed reproduces the run exactly, and on four
//! I/O threads concurrently ([`threads`]), so that the scheduler of the machine chooses the order. The runs of [`changes`] also
//! contain image-wide changes: of the size, the snapshots and all contents.

pub mod change;
pub mod changes;
pub mod each_fault;
pub mod faults;
pub mod history;
mod look;
pub mod oracle;
pub mod qemu;
pub mod run;
pub mod threads;
mod workload;
