//! Options of new VPC (VHD) images.

use oxblk_core::Options;

/// Options of a new VPC image.
#[derive(Debug, Clone, Default)]
pub struct VpcOptions {
    /// If true, create a fixed image: the file contains the complete disk, followed by the footer. Otherwise blocks are
    /// allocated when they are written.
    pub is_fixed: bool,
    /// If true, the disk has exactly the requested size. Otherwise the size is rounded up to cylinders × heads ×
    /// sectors of a disk geometry, as Virtual PC requires, unless the disk is larger than the largest geometry.
    pub force_size: bool,
}

impl VpcOptions {
    pub(super) fn to_options(&self) -> Options {
        let mut options = Options::new();
        if self.is_fixed {
            options.insert("subformat", "fixed");
        }
        if self.force_size {
            options.insert("force_size", true);
        }
        options
    }
}
