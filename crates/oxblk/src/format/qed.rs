//! Options of new QED images.

use oxblk_core::Options;

use super::Format;

/// Options of a new QED image.
#[derive(Debug, Clone, Default)]
pub struct QedOptions {
    /// Cluster size in bytes, a power of two from 4 KiB to 64 MiB; `None`: 64 KiB.
    pub cluster_size: Option<u64>,
    /// Size of an L1 or L2 table in clusters, a power of two up to 16; `None`: 4.
    pub table_size: Option<u64>,
    /// Name and format of the backing file.
    pub backing_file: Option<(String, Format)>,
}

impl QedOptions {
    pub(super) fn to_options(&self) -> Options {
        let mut options = Options::new();
        if let Some(size) = self.cluster_size {
            options.insert("cluster_size", size);
        }
        if let Some(size) = self.table_size {
            options.insert("table_size", size);
        }
        if let Some((name, format)) = &self.backing_file {
            options.insert("backing_file", name.as_str());
            options.insert("backing_fmt", format.name());
        }
        options
    }
}
