//! What a node records about its writes: the highest offset, and the write threshold.

use crate::{BlockEvent, Node};

impl Node {
    /// The offset after the highest byte that was written since the node was opened, in bytes. Zero writes and copies count as
    /// writes, discards do not. A write counts when it begins.
    pub fn highest_written_offset(&self) -> u64 {
        self.write_watch.highest()
    }

    /// The write threshold in bytes; 0 if there is none.
    pub fn write_threshold(&self) -> u64 {
        self.write_watch.threshold()
    }

    /// Sets the write threshold to `offset` bytes. The first write or zero write that ends beyond it reports
    /// [`BlockEvent::WriteThreshold`] and removes the threshold. 0 removes the threshold.
    pub fn set_write_threshold(&self, offset: u64) {
        self.write_watch.set_threshold(offset);
    }

    /// Records a write.
    #[inline]
    pub(crate) fn note_write(&self, offset: u64, len: u64) {
        if let Some(exceeded) = self.write_watch.note(offset.saturating_add(len)) {
            self.events.raise(&BlockEvent::WriteThreshold {
                node_name: self.name().to_owned(),
                amount_exceeded: exceeded.amount,
                write_threshold: exceeded.threshold,
            });
        }
    }
}
