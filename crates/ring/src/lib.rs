//! The I/O engine: executor, operations, buffers, timers. This crate contains nothing about disk images.
//!
//! One **I/O thread** is one executor with one io_uring, or with `poll` and blocking threads if the kernel refuses
//! io_uring. The futures of the executor are `!Send` and stay on the thread; wakers may be used from other threads.
//! [`block_on`] turns the calling thread into an I/O thread until it returns, [`IoThread::start`] starts another I/O
//! thread.
//!
//! * [`buf`](IoBuf): owned memory. Memory that the kernel may access belongs to the slot of an operation until the
//!   operation has completed, so a future can be dropped at any moment.
//! * `reactor`: the slots, and the backends that execute operations: io_uring, Linux AIO, a pool of blocking threads,
//!   or poll.
//! * `runtime`: the loop (take messages → run ready tasks → fire timers → one submit-and-wait call), tasks, timers,
//!   wakers.
//! * [`File`], [`Stream`], [`Listener`]: the files, streams and listening sockets that operations use.
//! * [`perturb`]: random delays between the steps of lock-free code, in test builds.
//! * [`sim`]: a simulated disk and a deterministic executor for tests.
//! * locks that work across I/O threads: [`Mutex`], [`RwLock`], [`Semaphore`], [`RangeLock`]; and [`Sharded`] data.

mod aio;
mod buf;
mod file;
pub mod host;
mod net;
pub mod perturb;
mod reactor;
mod runtime;
pub mod sim;
mod sync;

pub use aio::Aio;
pub use buf::{
    ForeignOwner, ForeignVec, ForeignVecMut, IoBuf, IoBufMut, IoVec, IoVecMut, WordMemory, Words,
    is_zero,
};
pub use file::{
    Extent, Falloc, File, ReadAt, ReadForeignAt, ReadvAt, WriteAt, WriteForeignAt, WritevAt,
};
pub use net::{Address, Listener, Stream};
pub use reactor::{InPlace, transfer_in_place};
pub use runtime::{
    Config, Elapsed, Engine, IoThread, MAX_IO_THREADS, Remote, TaskGone, UntilSettled, block_on,
    block_on_with, keep_until_settled, now, offload, offload_threads, set_offload_threads, settled,
    sleep, spawn, thread_index, timeout, try_thread_index, yield_now,
};
pub use sync::{
    Event, EventListener, Mutex, MutexGuard, MutexGuardArc, RangeGuard, RangeLock, RwLock,
    RwLockReadGuardArc, RwLockWriteGuardArc, Semaphore, Shard, Sharded,
};

/// A handle to a local task. Dropping it cancels the task; [`detach`](async_task::Task::detach) lets the task
/// continue.
pub use async_task::Task;
