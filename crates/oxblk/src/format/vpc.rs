//! Options of new VPC (VHD) images.

use oxblk_core::Options;

/// Options of a new VPC image.
#[derive(Debug, Clone, Default)]
pub struct VpcOptions {
    /// Place the data of the disk in the file as a whole, in front of the footer, instead of allocating blocks when they
    /// are written.
    pub is_fixed: bool,
    /// Give the disk exactly the requested size. Otherwise the size is rounded up to that of a geometry of cylinders,
    /// heads and sectors, as Virtual PC needs it.
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
