//! Options of new raw images.

use oxblk_core::{Options, Preallocation};

/// Options of a new raw image.
#[derive(Debug, Clone, Default)]
pub struct RawOptions {
    /// The parts of the file that are allocated when it is created.
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
