//! Options of new qcow2 images.

use oxblk_core::{Options, Preallocation};

/// Version of the format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Qcow2Version {
    /// `compat=0.10`, which QEMU before version 1.1 can read.
    V2,
    /// `compat=1.1`.
    #[default]
    V3,
}

/// The compression method of compressed clusters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compression {
    /// Deflate, which every version of QEMU can read.
    #[default]
    Zlib,
    /// Zstandard, which is faster and compresses better. QEMU can read it since version 5.1.
    Zstd,
}

/// Options of a new qcow2 image. The defaults are the same as in QEMU.
#[derive(Debug, Clone)]
pub struct Qcow2Options {
    /// Version of the format.
    pub version: Qcow2Version,
    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// Extended L2 entries: each cluster has 32 subclusters, which are allocated separately.
    pub extended_l2: bool,
    /// Width of a refcount in bits: a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// If true, writes of refcounts are delayed. If the image was not closed, it is repaired when it is opened for writing.
    pub lazy_refcounts: bool,
    /// The compression method.
    pub compression: Compression,
    /// The parts of the image that are allocated when it is created.
    pub preallocation: Preallocation,
    /// The name of an external data file for guest data. The file is created together with the image.
    pub data_file: Option<String>,
    /// If true, the data file is a valid raw image of the disk at all times.
    pub data_file_raw: bool,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self {
            version: Qcow2Version::default(),
            cluster_size: 65536,
            extended_l2: false,
            refcount_bits: 16,
            lazy_refcounts: false,
            compression: Compression::default(),
            preallocation: Preallocation::Off,
            data_file: None,
            data_file_raw: false,
        }
    }
}

impl Qcow2Options {
    pub(super) fn to_options(&self) -> Options {
        let mut options = Options::new();
        let compat = if self.version == Qcow2Version::V2 { "0.10" } else { "1.1" };
        options.insert("compat", compat);
        options.insert("cluster_size", u64::from(self.cluster_size));
        options.insert("extended_l2", self.extended_l2);
        options.insert("refcount_bits", u64::from(self.refcount_bits));
        options.insert("lazy_refcounts", self.lazy_refcounts);
        if self.compression == Compression::Zstd {
            options.insert("compression_type", "zstd");
        }
        if self.preallocation != Preallocation::Off {
            options.insert("preallocation", self.preallocation.name());
        }
        if let Some(data_file) = &self.data_file {
            options.insert("data_file", data_file.as_str());
        }
        if self.data_file_raw {
            options.insert("data_file_raw", true);
        }
        options
    }
}
