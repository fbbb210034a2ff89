//! Simulation for tests: a disk with injected faults, and an executor with virtual time whose runs are determined by
//! the seeds.
//!
//! [`run`] executes a future and its tasks with virtual time. Seeds decide which ready task runs next and how long
//! each operation on a [`Disk`] takes. In a deadlock, `run` panics.
//!
//! # Fault model
//!
//! What can happen to a [`Disk`]. Without [`Faults`], only power cuts happen.
//!
//! | fault | effect | cause |
//! |---|---|---|
//! | delay | operations complete out of order | [`Faults::delay`] |
//! | short transfer | a read or write transfers fewer bytes, at least one | [`Faults::short_reads`], [`Faults::short_writes`] |
//! | failure | an operation reports an error, and has no effect | [`Faults::fail`], [`Faults::fail_rate`] |
//! | late failure | an operation reports an error, and has its effect | [`Faults::fail_late`] |
//! | power cut | each sector, and the size, independently has its durable version (flushed or written with FUA) or any later version, also of an operation in flight | [`Disk::cut_after`], [`Disk::after_power_loss`] |
//! | silent corruption | a sector has other content than was written; reads succeed and return this content | [`Damage::Corruption`], [`Disk::corrupt`] |
//! | misdirected write | a write changes the bytes at another offset, and not those at its own | [`Damage::MisdirectedWrite`] |
//! | misdirected read | a read returns the bytes at another offset | [`Damage::MisdirectedRead`] |
//! | latent error | a sector that was written without an error cannot be read: reads fail with `EIO` | [`Damage::LatentError`], [`Disk::make_unreadable`] |
//!
//! Silent corruption and latent errors end when the sector is written completely, zeroed or cut off. A request that
//! changes a part of an unreadable sector fails with `EIO` and has no effect, because the disk cannot read the other
//! part. The damage of a write belongs to the version of the sector: a power cut that loses the write loses its damage
//! too.
//!
//! What never happens:
//!
//! - A sector of 512 bytes is not torn by a power cut.
//! - A flush that succeeds does not lose a write that had completed before the flush began.
//! - A power cut does not damage data that was durable.
//! - A misdirected operation does not leave the disk, and does not change its size. An operation that is not completely
//!   inside the disk is not misdirected.
//! - An operation has at most one kind of damage. An operation that fails has none, and neither has an operation that is
//!   in flight at a power cut.
//! - The size of the disk, and the report of which ranges have data, are never wrong.

mod change;
mod damage;
mod disk;
mod faults;
mod media;
mod moments;
mod rng;
mod scheduler;

use std::future::Future;
use std::rc::Rc;

pub use damage::{Damage, DamageRule};
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
