//! Options of new parallels images.

use oxblk_core::Options;

/// Options of a new parallels image.
#[derive(Debug, Clone, Default)]
pub struct ParallelsOptions {
    /// Cluster size in bytes, rounded up to a multiple of 512; `None`: 1 MiB.
    pub cluster_size: Option<u64>,
}

impl ParallelsOptions {
    pub(super) fn to_options(&self) -> Options {
        let mut options = Options::new();
        if let Some(size) = self.cluster_size {
            options.insert("cluster_size", size);
        }
        options
    }
}
