//! Runs foreign code inside the engine: wakers and destructors.
//!
//! The panic hook has already reported a panic of such code. The panic must not unwind through the engine, which
//! would lose other operations and messages, nor out of a closing thread, whose operations are still in flight.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `f` and catches its panic. A panic leaves only `f`'s own state half-changed: the engine passes it nothing but
/// values to drop or wakers to wake.
pub(crate) fn contained(f: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(f)) {
        // The payload of a panic may panic when it is dropped; the payload of that second panic is leaked.
        if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
            std::mem::forget(again);
        }
    }
}
