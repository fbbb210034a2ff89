//! Power cuts on a simulated disk.
//!
//! A workload of random operations runs against an image on a simulated disk, and the power is cut at
//! a write boundary. What a disk may then hold is anything between "only what was flushed" and "all
//! that was sent": several such disks are made for each cut. Each must open, pass the driver's check
//! (leaks are allowed, errors are not), hold every byte that a completed flush or FUA write made
//! durable, and be good to go on with; some are shown to `qemu-img check` as well.

pub mod faults;
pub mod oracle;
pub mod qemu;
pub mod run;
