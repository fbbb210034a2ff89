//! The results of a lookup in the L2 tables.

/// The kind of the first `len` bytes of a range of the guest disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) enum Extent {
    /// Uncompressed data at the host offset `host` (in the data file, if the image has one). `owned`: the copied flag is set,
    /// so no snapshot refers to the cluster.
    Data { host: u64, len: u64, owned: bool },
    /// Reads as zeroes. `host`: the host offset in the preallocated cluster, if there is one. `owned`: the copied flag is set;
    /// always false with extended L2 entries.
    Zero { len: u64, host: Option<u64>, owned: bool },
    /// Reads return the data of the backing file, or zeroes without a backing file. `host`: the host offset of the space that
    /// is preallocated for the data, if there is any.
    Unallocated { len: u64, host: Option<u64> },
    /// Part of one compressed cluster. The compressed data of the whole cluster lies in `stored` bytes from `host` on.
    Compressed { host: u64, stored: u64, len: u64 },
}

impl Extent {
    pub(in crate::qcow2) fn len(&self) -> u64 {
        match self {
            Self::Data { len, .. }
            | Self::Zero { len, .. }
            | Self::Unallocated { len, .. }
            | Self::Compressed { len, .. } => *len,
        }
    }
}

/// Why a lookup in the cache has no result.
pub(in crate::qcow2) enum Miss {
    /// The slice is not cached, or is being changed.
    Absent,
    /// This entry is invalid.
    Bad(u64),
}
