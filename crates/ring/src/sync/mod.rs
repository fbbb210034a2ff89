//! Locks, events, and data with one copy for each I/O thread and one copy for all other threads. All of them may be used
//! from any executor.

mod range_lock;
mod sharded;

use crate::runtime::atomics;

pub use async_lock::{
    Mutex, MutexGuard, MutexGuardArc, RwLock, RwLockReadGuardArc, RwLockWriteGuardArc, Semaphore,
};
pub use event_listener::{Event, EventListener};
pub use range_lock::{RangeGuard, RangeLock};
pub use sharded::{Shard, Sharded};
