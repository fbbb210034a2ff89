//! Options of new VDI images.

use oxblk_core::Options;

/// Options of a new VDI image.
#[derive(Debug, Clone, Default)]
pub struct VdiOptions {
    /// If true, all blocks are allocated when the image is created.
    pub is_static: bool,
}

impl VdiOptions {
    pub(super) fn to_options(&self) -> Options {
        let mut options = Options::new();
        if self.is_static {
            options.insert("static", true);
        }
        options
    }
}
