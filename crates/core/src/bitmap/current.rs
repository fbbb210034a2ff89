//! Marking through a state that may be replaced at any moment, without a lock.
//!
//! A marker marks through the state that it finds and then looks whether that is still the current one; if not it marks
//! again. Whoever replaces the state stores the new one first and carries the old one's marks over second. With a full
//! fence between the two halves on both sides, either the marker sees the new state, or the marks that are carried over
//! contain its own.

use oxblk_ring::perturb::point;

use super::atomics::{Ordering::SeqCst, fence};

/// Marks through what `current` gives, until that was not replaced meanwhile.
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

/// Replaces the state by means of `store`. After this the caller carries over what the old state has.
pub(super) fn replace(store: impl FnOnce()) {
    store();
    fence(SeqCst);
    point();
}
