//! Runs code of other modules inside the engine: wakers, destructors, and calls from other threads.
//!
//! If such code panics, the panic hook reports the panic. The panic must not unwind through the engine, which would
//! lose other operations and messages. It must not unwind out of a closing thread either, because operations of the
//! thread are still in flight.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `f` and catches its panic. A panic cannot damage the state of the engine, because `f` only drops values, wakes
/// a waker, or starts a task.
pub(crate) fn contained(f: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(f)) {
        // The payload of a panic may panic when it is dropped; the payload of that second panic is leaked.
        if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
            std::mem::forget(again);
        }
    }
}
