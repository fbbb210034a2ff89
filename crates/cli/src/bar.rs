//! The progress bar on the terminal.
//!
//! Messages hide the bar while they are printed. Otherwise they would be printed into its line.

use std::sync::{Mutex, PoisonError};

use indicatif::ProgressBar;

/// The bar that is on the terminal now.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Messages hide this bar from now on.
pub(crate) fn show(bar: ProgressBar) {
    *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar);
}

/// The bar will not be drawn again.
pub(crate) fn forget() {
    *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

/// Hides the bar while `print` prints.
pub(crate) fn hide_while<T>(print: impl FnOnce() -> T) -> T {
    let shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match shown {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}
