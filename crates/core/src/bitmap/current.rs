//! Sets bits in a bitmap's state without a lock. Another thread may replace the state at the same time.
//!
//! A thread that sets bits loads the state, sets the bits in this state, and then checks whether this state is still
//! current. If not, the thread sets the bits in the new state too. A thread that replaces the state first stores the
//! new state and then reads the bits of the old state, to copy them. Both threads have a full fence between their two
//! steps. So either the first thread sees the new state, or the second thread sees the bits of the first thread in the
//! old state.

use oxblk_ring::perturb::point;

use super::atomics::{Ordering::SeqCst, fence};

/// Calls `mark` with the current state. Repeats this if the state was replaced during the call.
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

/// Replaces the state by calling `store`. A caller that keeps the bits of the old state copies these bits after this
/// call.
pub(super) fn replace(store: impl FnOnce()) {
    store();
    fence(SeqCst);
    point();
}
