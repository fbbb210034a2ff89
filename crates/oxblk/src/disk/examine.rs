//! Methods of a disk for its check and repair, and for the file size of a copy in another format.

use std::sync::Arc;

use super::Disk;
use crate::check::{self, CheckObserver, CheckReport, Fix};
use crate::{Measure, NewFormat, Request, measure};

impl Disk {
    /// Checks whether the image is consistent, and repairs the faults that `fix` allows. Other requests wait until the check
    /// has ended. Faults are not errors of this method: the report contains the numbers of faults that remain, and of repaired
    /// faults.
    ///
    /// After a check with a repair, a qcow2 disk accepts no further reads and writes, because the repair may have
    /// changed metadata that the disk has in memory. Close the disk and open it again. A check without a repair does
    /// not have this effect.
    ///
    /// # Errors
    /// `ENOTSUP` if the format has no check, such as raw; an error for the repair of a read-only disk; otherwise the errors of
    /// the image and the system.
    pub fn check(&self, fix: Fix) -> Request<CheckReport> {
        self.check_with(fix, Arc::new(()))
    }

    /// Like [`check`](Self::check). In addition, each finding is reported to `observer`, on an I/O thread.
    ///
    /// # Errors
    /// The errors of [`check`](Self::check).
    pub fn check_with(&self, fix: Fix, observer: Arc<dyn CheckObserver>) -> Request<CheckReport> {
        self.run(move |disk| async move { check::run(&disk, fix, observer).await })
    }

    /// Computes the size that the file of a copy of this disk in the format `format` would have.
    ///
    /// # Errors
    /// `ENOTSUP` if the format has no measurement; otherwise the errors of the images of the chain and the system.
    pub fn measure(&self, format: impl Into<NewFormat>) -> Request<Measure> {
        let format = format.into();
        self.run(move |disk| async move {
            let (name, options) = (format.format().name(), format.to_options());
            measure::measure(disk.graph(), name, options, Some(&disk)).await
        })
    }
}
