//! Which child contains the guest data: the image file, or a separate data file.

use oxblk_core::{ChildIdx, Result};

use super::ImageState;
use super::run_options::Modes;

impl ImageState {
    /// The child that contains uncompressed guest data.
    #[inline]
    pub(in crate::qcow2) fn data_child(&self) -> ChildIdx {
        if self.geometry.data_file { ChildIdx::DATA } else { ChildIdx::FILE }
    }

    /// Whether the data file must stay valid as a raw image: a program that opens the data file as a raw image must see the
    /// contents of the disk.
    #[inline]
    pub(in crate::qcow2) fn has_raw_data(&self) -> bool {
        self.geometry.data_file && self.modes().contains(Modes::RAW_DATA)
    }

    /// Whether a new image reads as zeroes. A new image with a raw data file has the contents of that file.
    pub(in crate::qcow2) fn new_data_is_zero(&self) -> bool {
        let data = self.children.get(ChildIdx::DATA);
        !self.has_raw_data() || data.is_some_and(|data| data.node().limits().has_zero_init)
    }

    /// Flushes the data file, if there is one.
    pub(in crate::qcow2) async fn flush_data(&self) -> Result<()> {
        match self.children.get(ChildIdx::DATA) {
            Some(data) => data.flush().await,
            None => Ok(()),
        }
    }

    /// Limits the end of a write, zeroing or discard of data. With a data file, nothing is changed behind the end of the disk.
    pub(in crate::qcow2) fn end_of_data(&self, end: u64) -> u64 {
        if self.geometry.data_file { end.min(self.size()) } else { end }
    }
}
