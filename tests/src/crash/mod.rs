//! Power cuts on a simulated disk.
//!
//! A workload of random operations runs on a chain of images. The active image is on a simulated disk, and the harness keeps
//! the state of this disk at many write boundaries. A power cut there may leave anything between "only what was flushed" and
//! "all that was written", so the harness makes several disks for each cut. The image on each of them must open and pass the
//! driver's check (leaks are allowed, corruptions are not). It must hold every byte that a completed flush or FUA write made
//! durable, and accept requests. Some of the images also go through `qemu-img check`.
//!
//! The workload runs in two ways: on the simulated executor ([`run`]), where a seed reproduces the run exactly, and on four I/O
//! threads concurrently ([`threads`]), where the scheduler of the machine chooses the order. In [`changes`] the image also
//! changes as a whole: its size, its snapshots, its contents.

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
