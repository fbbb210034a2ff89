//! Consistency checks of images.

use crate::Result;
use crate::driver::BoxFuture;

/// What a check may repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fix {
    /// Nothing: only report.
    #[default]
    Nothing,
    /// Clusters that nothing refers to.
    Leaks,
    /// Everything that can be.
    All,
}

/// What a check found. The names are those of `qemu-img check --output=json`.
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
    /// Checks the image, repairing what `fix` allows. Each finding is told to `say` as it comes, one
    /// line each, worded as `qemu-img check` words it.
    fn check<'a>(&'a self, fix: Fix, say: &'a dyn Fn(&str)) -> BoxFuture<'a, Result<CheckReport>>;
}
