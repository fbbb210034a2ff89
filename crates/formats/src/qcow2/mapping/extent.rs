//! The answers of a lookup.

/// The kind of the first `len` bytes of a range of the guest disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) enum Extent {
    /// Data at `host` in the file. `owned`: only this image's active state refers to it.
    Data { host: u64, len: u64, owned: bool },
    /// Reads as zeroes. `host`: the place in its preallocated cluster, if any. `owned`: only this image's active state refers
    /// to that cluster.
    Zero { len: u64, host: Option<u64>, owned: bool },
    /// Reads as the backing file does. `host`: the place that is preallocated for its data.
    Unallocated { len: u64, host: Option<u64> },
    /// Part of one compressed cluster, which is stored in `stored` bytes from `host` on.
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

/// Why the cache alone has no answer.
pub(in crate::qcow2) enum Miss {
    /// The slice is not cached, or is being changed.
    Absent,
    /// This entry is invalid.
    Bad(u64),
}
