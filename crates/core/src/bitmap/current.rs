//! Marks ranges in a bitmap's state without a lock. Another thread may replace the state at the same time.
//!
//! A marker marks in the state that it loads, and then checks whether this state is still current. If not, the marker
//! marks again in the new state. A thread that replaces the state first stores the new state and then reads the marks
//! of the old state, to copy them. Both sides have a full fence between their two steps. So either the marker sees the
//! new state, or the other thread sees the marker's marks in the old state.

use oxblk_ring::perturb::point;

use super::atomics::{Ordering::SeqCst, fence};

/// Calls `mark` with the state that `current` returns, until the state has not been replaced during a call.
pub(super) fn mark_current<S>(
    current: impl Fn() -> S,
    is_same: impl Fn(&S, &S) -> bool,
    mark: impl Fn(&S),
) {
    loop {
        let state = current();
        point();
        mark(&state);
        fence(SeqCst);
        point();
        if is_same(&state, &current()) {
            return;
        }
    }
}

/// Replaces the state by calling `store`. A caller that keeps the marks of the old state copies them after this call.
pub(super) fn replace(store: impl FnOnce()) {
    store();
    fence(SeqCst);
    point();
}
