//! Reading a snapshot through a read-only node: its L1 table replaces the active one, in memory only.

use std::sync::atomic::Ordering::Release;

use oxblk_core::{Errno, Error, Result};

use super::super::Qcow2;
use super::super::layout::L1Entry;
use super::change::find;

impl Qcow2 {
    /// Makes the node show the contents and the size of a snapshot.
    pub(super) async fn show_snapshot(&self, id: &str) -> Result<()> {
        self.facts.check_usable()?;
        if !self.facts.is_read_only() {
            return Err(Error::from_errno(Errno::ACCES));
        }
        let snapshot = find(self.snapshot_list().await?, id)?.1;
        snapshot.check_l1(self.geometry)?;
        let l1 = self.read_inactive_l1(snapshot.l1_offset, snapshot.l1_entries).await?;
        self.l2.clear();
        let count = u64::try_from(l1.len()).unwrap_or(u64::MAX);
        for (index, entry) in (0_u64..).zip(l1) {
            // As in the active L1 table, an entry with flags but without an offset refers to no table.
            let refers = entry.l2_offset(self.geometry) != Ok(None);
            let word = if refers { entry.0 } else { L1Entry::EMPTY.0 };
            self.l1.get_or_make(index).store(word, Release);
        }
        for index in count..self.l1_entries() {
            self.l1.get_or_make(index).store(0, Release);
        }
        self.l1_offset.store(snapshot.l1_offset, Release);
        self.l1_entries.store(count, Release);
        if let Some(size) = snapshot.size {
            self.facts.set_size(size);
        }
        Ok(())
    }
}
