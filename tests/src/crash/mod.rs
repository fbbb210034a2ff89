//! Power cuts on a simulated disk.
//!
//! A workload of random operations runs against a chain of images whose active one is on a simulated
//! disk, and the disk is kept as it is at many write boundaries. What a power cut there leaves is
//! anything between "only what was flushed" and "all that was sent": several such disks are made for
//! each cut. Each must open, pass the driver's check (leaks are allowed, errors are not), hold every
//! byte that a completed flush or FUA write made durable, and be good to go on with; some are shown to
//! `qemu-img check` as well.
//!
//! The workload runs in two ways: on the simulated executor ([`run`]), where a seed brings back the
//! whole run, and on four I/O threads at once ([`threads`]), where the machine chooses the schedule. In [`changes`] the
//! image also changes as a whole: its size, its snapshots, all that it holds.

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
