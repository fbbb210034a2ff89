//! Checks of an image, and the size of a copy in another format.

use std::sync::Arc;

use super::Disk;
use crate::check::{self, CheckObserver, CheckReport, Fix};
use crate::{Measure, NewFormat, Request, measure};

impl Disk {
    /// Checks whether the image is consistent, and repairs the faults that `fix` allows. Other requests wait meanwhile.
    /// Faults are results and not errors: the report counts the faults that remain and those that were repaired.
    ///
    /// After a repair, a qcow2 disk refuses writes, because the repair has changed metadata that the disk had in memory.
    /// Close the disk and open it again. A check without repairs has no such effect.
    ///
    /// # Errors
    /// `ENOTSUP` if the format has no check, such as raw; `EPERM` for a repair of a disk that is read-only; as the system
    /// reports.
    pub fn check(&self, fix: Fix) -> Request<CheckReport> {
        self.check_with(fix, Arc::new(()))
    }

    /// As [`check`](Self::check), and reports each finding to `observer`, on an I/O thread.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn check_with(&self, fix: Fix, observer: Arc<dyn CheckObserver>) -> Request<CheckReport> {
        self.run(move |disk| async move { check::run(&disk, fix, observer).await })
    }

    /// The size of the file that a copy of this disk in the format `format` would need.
    ///
    /// # Errors
    /// `ENOTSUP` if the format cannot compute it; as the images of the chain and the system report.
    pub fn measure(&self, format: impl Into<NewFormat>) -> Request<Measure> {
        let format = format.into();
        self.run(move |disk| async move {
            let (name, options) = (format.format().name(), format.to_options());
            measure::measure(disk.graph(), name, options, Some(&disk)).await
        })
    }
}
