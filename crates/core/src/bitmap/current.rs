//! Marks ranges in a bitmap's state without a lock, while another thread may replace the state.
//!
//! A marker marks in the state that it loads, and then checks whether that state is still current. If not, it marks
//! again. A thread that replaces the state first stores the new state and then copies the marks of the old state. Both
//! sides have a full fence between their two steps. So either the marker sees the new state, or the copied marks
//! contain the marker's marks.

use oxblk_ring::perturb::point;

use super::atomics::{Ordering::SeqCst, fence};

/// Marks in the state that `current` returns. Repeats this if the state was replaced during the marking.
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

/// Replaces the state by calling `store`. After this call, the caller copies the marks of the old state.
pub(super) fn replace(store: impl FnOnce()) {
    store();
    fence(SeqCst);
    point();
}
