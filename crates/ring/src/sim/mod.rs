//! Simulation for tests: a disk with injected faults, and an executor with virtual time whose runs are determined by
//! the seeds.
//!
//! [`run`] executes a future and its tasks with virtual time. Seeds decide which ready task runs next and how long
//! each operation on a [`Disk`] takes. In a deadlock, `run` panics.
//!
//! [`Disk::cut_after`] cuts the power, and [`Disk::after_power_loss`] returns a possible state of the disk after the
//! cut. Each sector, and the size, independently has its durable version (flushed or written with FUA) or any later
//! version. A later version may come from an operation that is in flight at the cut.

mod change;
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

/// Runs a future to completion, deterministically for a given seed.
///
/// # Panics
/// If nothing can wake the future any more (a deadlock), if called on an I/O thread, or if the future panics.
pub fn run<F: Future>(seed: u64, f: F) -> F::Output {
    local::simulate(Scheduler::new(seed), f)
}

/// Starts an operation on a simulated disk. Outside [`run`] the operation is executed immediately.
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
