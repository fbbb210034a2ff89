//! Consistency checks of images.

use std::fmt;
use std::sync::Arc;

use crate::driver::BoxFuture;
use crate::perm::Perm;
use crate::{Backend, Errno, Error, Node, Result};

/// The faults that a check may repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fix {
    /// No faults: the check only reports.
    #[default]
    Nothing,
    /// Leaked clusters. A leaked cluster wastes space but is harmless.
    Leaks,
    /// All faults that can be repaired.
    All,
}

/// The result of a check. The fields correspond to those of `qemu-img check --output=json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Errors of the check itself (I/O, memory).
    pub check_errors: u64,
    /// Corruptions that remain.
    pub corruptions: u64,
    /// Leaked clusters that remain.
    pub leaks: u64,
    /// Corruptions repaired.
    pub corruptions_fixed: u64,
    /// Leaks repaired.
    pub leaks_fixed: u64,
    /// Byte offset of the end of the last cluster in use.
    pub image_end_offset: u64,
    /// Number of guest clusters of the disk, or 0 if the format has no clusters.
    pub total_clusters: u64,
    /// Allocated guest clusters.
    pub allocated_clusters: u64,
    /// Allocated guest clusters whose data does not directly follow the data of the previous allocated guest cluster.
    pub fragmented_clusters: u64,
    /// Allocated clusters that are compressed.
    pub compressed_clusters: u64,
}

/// The kind of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FindingKind {
    /// Metadata is wrong: data may be lost or may become corrupt.
    Corruption,
    /// Space is marked as allocated but is not used.
    Leak,
    /// A part of the image could not be checked or repaired.
    Failure,
    /// The snapshot table is invalid. The check ends with an error after this finding.
    SnapshotTable,
    /// A message that a fault is being repaired.
    Repair,
    /// An explanation of an earlier finding.
    Note,
}

/// One finding of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The kind of the finding.
    pub kind: FindingKind,
    /// The byte offset in the image file that the finding concerns, if the finding concerns a single offset.
    pub offset: Option<u64>,
    /// One line of text. If `qemu-img check` reports the same finding, the text has its wording.
    pub text: String,
}

impl Finding {
    /// A finding without an offset.
    pub fn new(kind: FindingKind, text: impl Into<String>) -> Self {
        Self { kind, offset: None, text: text.into() }
    }

    /// Sets the byte offset in the image file.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The interface of formats that can check their images. [`Backend::check`] drains the node before each call.
pub trait Check: Send + Sync {
    /// Checks the image and repairs the faults that `fix` allows. Each finding is reported to `report` as soon as the
    /// finding is made. After a repair, the driver may refuse writes until the image is opened again.
    fn check<'a>(
        &'a self,
        fix: Fix,
        report: &'a dyn Fn(Finding),
    ) -> BoxFuture<'a, Result<CheckReport>>;
}

fn of(node: &Node) -> Result<&dyn Check> {
    node.driver().check().ok_or_else(|| Error::from_errno(Errno::OPNOTSUPP))
}

impl Backend {
    /// Checks the image and repairs the faults that `fix` allows. Requests to the image wait until the check has ended.
    /// Each finding is reported to `report` as soon as the finding is made. Once begun, the check runs to its end even
    /// if its future is dropped.
    ///
    /// # Errors
    /// `ENOTSUP` if the format has no check; `EPERM` for a repair without write permission; the errors of the image's driver.
    pub async fn check(&self, fix: Fix, report: impl Fn(Finding) + 'static) -> Result<CheckReport> {
        let edge = self.root()?;
        let node = edge.node();
        of(node)?;
        if fix != Fix::Nothing && !edge.permissions().taken.contains(Perm::WRITE) {
            return Err(Error::from_errno(Errno::PERM));
        }
        let backend = self.clone();
        let check = move |node: Arc<Node>| async move {
            if fix != Fix::Nothing {
                backend.root()?.may_write()?;
                node.mark_unflushed();
            }
            of(&node)?.check(fix, &report).await
        };
        self.graph().run_exclusive(node, self.while_open(check)).await
    }
}
