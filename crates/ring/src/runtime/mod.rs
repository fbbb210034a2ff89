//! The I/O thread: tasks, timers, wakers and the loop that drives them.
//!
//! [`local`] contains the state and the loop of the thread, [`closing`] the start and the end, [`tasks`] the tasks,
//! [`thread`] the handles, and [`timer`] the clock. [`shared`] is the part that other threads may access; [`wake`] is
//! the mailbox with the sleep flag. [`oneshot`] passes results between threads, [`offload`] runs work on worker
//! threads, and [`idle_trim`] frees cached memory when the process is idle.

pub(crate) mod atomics;
mod closing;
pub(crate) mod foreign;
mod idle_trim;
pub(crate) mod local;
pub(crate) mod offload;
pub(crate) mod oneshot;
#[cfg(test)]
mod oneshot_tests;
mod pool;
mod room;
pub(crate) mod shared;
mod tasks;
mod thread;
mod timer;
#[cfg(test)]
mod under_loom;
pub(crate) mod wake;

pub(crate) use pool::Job;
pub(crate) use timer::real_now;

pub use local::{
    Config, Engine, UntilSettled, block_on, block_on_with, keep_until_settled, settled,
};
pub use offload::{offload, offload_threads, set_offload_threads};
pub use shared::{MAX_IO_THREADS, thread_index, try_thread_index};
pub use tasks::{spawn, yield_now};
pub use thread::{IoThread, Remote, TaskGone};
pub use timer::{Elapsed, now, sleep, timeout};
