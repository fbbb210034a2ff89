//! Check and repair of an image.
//!
//! If a repair has fixed a fault, the image is checked again, so the result contains the faults that remain. `qemu-img
//! check` does the same.

use std::sync::Arc;

use oxblk_core::Backend;
pub use oxblk_core::check::{CheckReport, Finding, FindingKind, Fix};

use crate::Result;

/// Receives the events of a running check.
pub trait CheckObserver: Send + Sync {
    /// The check has found a fault, or reports a step of the repair. The findings of the second check come after
    /// [`repaired`](Self::repaired).
    fn finding(&self, finding: &Finding) {
        let _ = finding;
    }

    /// The repair has ended, and the image is checked again. `report` contains the numbers of repaired faults.
    fn repaired(&self, report: &CheckReport) {
        let _ = report;
    }
}

/// An observer that ignores all events.
impl CheckObserver for () {}

/// Checks the image of a backend, on the calling I/O thread, and repairs the faults that `fix` allows. Other requests
/// to the image wait while a check runs. The report contains the numbers of faults that remain, and of repaired faults.
///
/// # Errors
/// The errors of [`Backend::check`].
pub async fn run(
    disk: &Backend,
    fix: Fix,
    observer: Arc<dyn CheckObserver>,
) -> Result<CheckReport> {
    let once = async |fix: Fix| {
        let observer = Arc::clone(&observer);
        disk.check(fix, move |finding| observer.finding(&finding)).await
    };
    let first = once(fix).await?;
    if (first.leaks_fixed, first.corruptions_fixed) == (0, 0) {
        return Ok(first);
    }
    observer.repaired(&first);
    let remaining = once(Fix::Nothing).await?;
    let CheckReport { leaks_fixed, corruptions_fixed, .. } = first;
    Ok(CheckReport { leaks_fixed, corruptions_fixed, ..remaining })
}
