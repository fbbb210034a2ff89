//! Code that the engine runs for others: wakers, destructors.
//!
//! A panic in it has been reported by the panic hook. It must not unwind through the engine, whose other operations and
//! messages would be lost with it, nor out of a thread that is closing, whose operations are still in flight.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `f` and keeps a panic of it to itself. Whatever `f` may leave half done is its own: the engine passes it nothing
/// but values to drop or wakers to wake.
pub(crate) fn contained(f: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(f)) {
        // What a panic carries may panic when it is dropped; then what that one carries is leaked.
        if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
            std::mem::forget(again);
        }
    }
}
