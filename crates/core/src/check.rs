//! Consistency checks of images.

use crate::Result;
use crate::driver::BoxFuture;

/// The faults that a check may repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fix {
    /// None: the check only reports.
    #[default]
    Nothing,
    /// Leaked clusters (nothing refers to them).
    Leaks,
    /// All faults that can be repaired.
    All,
}

/// The result of a check. The names are those of `qemu-img check --output=json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Errors of the check itself (I/O, memory).
    pub check_errors: u64,
    /// Corruptions left.
    pub corruptions: u64,
    /// Leaked clusters left.
    pub leaks: u64,
    /// Corruptions repaired.
    pub corruptions_fixed: u64,
    /// Leaks repaired.
    pub leaks_fixed: u64,
    /// Byte offset of the end of the last cluster in use.
    pub image_end_offset: u64,
    /// Guest clusters in the image, 0 where the format has none.
    pub total_clusters: u64,
    /// Guest clusters that are allocated.
    pub allocated_clusters: u64,
    /// Allocated clusters that do not follow their predecessor on the host.
    pub fragmented_clusters: u64,
    /// Allocated clusters that are compressed.
    pub compressed_clusters: u64,
}

/// Offered by formats that can check their images.
pub trait Check: Send + Sync {
    /// Checks the image and repairs the faults that `fix` allows. Each finding is reported to `say` when it is found,
    /// as one line in the wording of `qemu-img check`.
    fn check<'a>(&'a self, fix: Fix, say: &'a dyn Fn(&str)) -> BoxFuture<'a, Result<CheckReport>>;
}
