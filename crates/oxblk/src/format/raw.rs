//! Options of new raw images.

use oxblk_core::{Options, Preallocation};

/// Options of a new raw image.
#[derive(Debug, Clone, Default)]
pub struct RawOptions {
    /// What is allocated when the image is created.
    pub preallocation: Preallocation,
}

impl RawOptions {
    pub(super) fn to_options(&self) -> Options {
        let mut options = Options::new();
        if self.preallocation != Preallocation::Off {
            options.insert("preallocation", self.preallocation.name());
        }
        options
    }
}
