//! Simulation for tests: a disk that fails on demand and an executor that is the same in every run of a seed.
//!
//! [`run`] drives a future and its tasks with virtual time: which ready task goes next, and how long each operation on a
//! [`Disk`] takes, comes from seeds. When nothing can go on any more, it panics instead of hanging.
//!
//! A power cut is played by [`Disk::cut_after`] and looked at with [`Disk::after_power_loss`]: everything flushed is there,
//! and each sector by itself may have any version written later.

mod disk;
mod faults;
mod media;
mod moments;
mod rng;
mod scheduler;

use std::future::Future;
use std::rc::Rc;

pub use disk::Disk;
pub use faults::{FailRule, FaultOp, Faults};
pub(crate) use scheduler::{Event, Scheduler};

use crate::reactor::{Op, Payload, Pending, Reactor};
use crate::runtime::local::{self, Local};

/// Runs a future to its end, deterministically for a given seed.
///
/// # Panics
/// When nothing can wake the future any more (a deadlock), on an I/O thread, or when the future panics.
pub fn run<F: Future>(seed: u64, f: F) -> F::Output {
    local::simulate(Scheduler::new(seed), f)
}

/// Starts an operation on a simulated disk. Outside of [`run`] it is carried out at once.
pub(crate) fn start(local: &Rc<Local>, disk: &Disk, op: Op, payload: Payload) -> Pending {
    let (started, delay) = disk.begin(op, &payload);
    let pending = Reactor::start_simulated(local, op, payload);
    let event = Event { key: pending.key(), disk: disk.clone(), started };
    match &local.scheduler {
        Some(scheduler) => scheduler.schedule(delay, event),
        None => local.reactor.finish_simulated(&event),
    }
    pending
}
