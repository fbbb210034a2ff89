//! Records that a range of a node may have changed.
//!
//! A change is recorded when it has ended, regardless of the outcome: the change has succeeded, or has failed after a
//! part was written, or its future was dropped because its I/O thread ended while the host carried out the operation.
//! Without the record, the change would be missing from the next incremental backup, or the next flush would not cover
//! the change.

use std::sync::Arc;

use oxblk_ring::UntilSettled;

use crate::Node;

/// A change of a range that is in progress.
pub(super) struct Changing(UntilSettled<Record>);

struct Record {
    node: Arc<Node>,
    offset: u64,
    len: u64,
    is_durable: bool,
}

impl Drop for Record {
    fn drop(&mut self) {
        self.node.mark_dirty(self.offset, self.len);
        if !self.is_durable {
            self.node.mark_unflushed();
        }
    }
}

impl Changing {
    /// Call this before the driver changes the range.
    pub(super) fn begin(node: &Arc<Node>, offset: u64, len: u64) -> Self {
        Self(UntilSettled::new(Record { node: Arc::clone(node), offset, len, is_durable: false }))
    }

    /// Records the change in the dirty bitmaps and for the next flush. Call this when no operation of the change is in
    /// flight. If the value is dropped instead, the change is recorded when the operations in flight on this thread
    /// have ended.
    pub(super) fn end(self) {
        drop(self.0.release());
    }

    /// Like [`Self::end`], for a change that has succeeded and is on stable storage: the next flush need not cover it.
    pub(super) fn end_durable(self) {
        if let Some(mut record) = self.0.release() {
            record.is_durable = true;
        }
    }
}
