//! The L1 table in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Release},
};
use std::sync::{Mutex, MutexGuard, PoisonError};

use oxblk_core::{Edge, Errno, Error, Result};
use oxblk_ring::IoBufMut;
use oxblk_ring::perturb::point;

use super::Mapping;
use crate::qcow2::layout::L1Entry;
use crate::slice_cache::Radix;

impl Mapping {
    /// Index of the L1 entry of a guest offset.
    #[inline]
    pub(in crate::qcow2) fn l1_index(&self, offset: u64) -> u64 {
        offset >> (self.geometry.cluster_bits + self.geometry.l2_bits())
    }

    #[inline]
    pub(in crate::qcow2) fn l1_entry(&self, index: u64) -> L1Entry {
        L1Entry(self.l1.get(index).map_or(0, |entry| entry.load(Acquire)))
    }

    pub(in crate::qcow2) fn l1_entries(&self) -> u64 {
        self.l1_entries.load(Acquire)
    }

    /// Sets an L1 entry and marks it dirty under one lock. So a flush that begins after a thread has seen the new entry also
    /// writes this entry.
    pub(in crate::qcow2) fn set_l1_entry(&self, index: u64, entry: L1Entry) {
        set_dirty(&self.l1, &self.l1_dirty, index, entry);
    }

    /// A copy of the active L1 table.
    pub(in crate::qcow2) fn active_l1(&self) -> Vec<L1Entry> {
        (0..self.l1_entries()).map(|index| self.l1_entry(index)).collect()
    }

    /// The L2 tables of an L1 table: index in the L1 table, and byte offset in the file.
    pub(in crate::qcow2) fn table_places(&self, l1: &[L1Entry]) -> Result<Vec<(u64, u64)>> {
        let mut places = Vec::new();
        for (index, entry) in (0_u64..).zip(l1) {
            match entry.l2_offset(self.geometry) {
                Ok(Some(offset)) => places.push((index, offset)),
                Ok(None) => {}
                Err(_) => return Err(Error::corrupt("L2 table offset unaligned").at(entry.0)),
            }
        }
        Ok(places)
    }

    /// Byte offset of the L1 table.
    pub(in crate::qcow2) fn l1_offset(&self) -> u64 {
        self.l1_offset.load(Acquire)
    }

    /// Sets the offset and the number of entries of the L1 table, in memory only. The entries do not change.
    pub(in crate::qcow2) fn set_l1_place(&self, offset: u64, entries: u64) {
        self.l1_offset.store(offset, Release);
        self.l1_entries.store(entries, Release);
    }

    /// Replaces all L1 entries and drops all cached slices. No entry and no slice may be dirty. The caller has drained the
    /// node.
    pub(in crate::qcow2) fn replace_l1(
        &self,
        l1: impl IntoIterator<Item = L1Entry>,
        offset: u64,
        entries: u64,
    ) {
        self.l2.clear();
        let mut next = 0;
        for (index, entry) in (0_u64..).zip(l1) {
            self.l1.get_or_make(index).store(entry.0, Release);
            next = index.saturating_add(1);
        }
        for index in next..self.l1_entries() {
            self.l1.get_or_make(index).store(0, Release);
        }
        self.set_l1_place(offset, entries);
    }

    /// Sets all L1 entries to 0. The caller reads the L1 table again afterwards.
    pub(in crate::qcow2) fn forget_l1(&self) {
        for index in 0..self.l1_entries() {
            self.l1.get_or_make(index).store(0, Release);
        }
    }

    /// Reads the L1 table from the file. Calls `visit` with the offset of each L2 table. Entries with an unaligned offset are
    /// stored in memory, but `visit` is not called for them.
    pub(in crate::qcow2) async fn read_l1(
        &self,
        file: &Edge,
        mut visit: impl FnMut(u64),
    ) -> Result<()> {
        let bytes = self.l1_entries().saturating_mul(8);
        let len = usize::try_from(bytes).map_err(|_| Error::from_errno(Errno::FBIG))?;
        if len == 0 {
            return Ok(());
        }
        let table = file.read(self.l1_offset(), IoBufMut::new(len)).await;
        let table = table.map_err(|error| error.prefix("Could not read L1 table"))?;
        for (index, word) in (0_u64..).zip(table.chunks_exact(8)) {
            let entry = L1Entry(word.try_into().map_or(0, u64::from_be_bytes));
            let table = entry.l2_offset(self.geometry);
            // An entry without an offset refers to no table, even if some of its flags are set. In memory, this entry is 0.
            if table == Ok(None) {
                continue;
            }
            self.l1.get_or_make(index).store(entry.0, Release);
            if let Ok(Some(offset)) = table {
                visit(offset);
            }
        }
        Ok(())
    }

    /// Returns the dirty L1 entries with their current values, and marks them clean.
    pub(in crate::qcow2) fn take_dirty_l1(&self) -> BTreeMap<u64, L1Entry> {
        let mut dirty = lock(&self.l1_dirty);
        std::mem::take(&mut *dirty).into_iter().map(|at| (at, self.l1_entry(at))).collect()
    }

    /// Marks L1 entries dirty again, because they were not written.
    pub(in crate::qcow2) fn restore_dirty_l1(&self, indices: impl IntoIterator<Item = u64>) {
        lock(&self.l1_dirty).extend(indices);
    }
}

/// Sets the entry and adds its index to `dirty`, the indices of the dirty entries, under one lock. So no write-back cycle takes
/// the indices between these steps.
fn set_dirty(entries: &Radix<AtomicU64>, dirty: &Mutex<BTreeSet<u64>>, index: u64, entry: L1Entry) {
    let mut dirty = lock(dirty);
    entries.get_or_make(index).store(entry.0, Release);
    point();
    dirty.insert(index);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Acquire;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_visible_l1_entry_is_already_marked_dirty() {
        let (entries, dirty) = (Radix::default(), Mutex::default());
        let seen = || entries.get(7).is_some_and(|entry: &AtomicU64| entry.load(Acquire) != 0);
        std::thread::scope(|scope| {
            // While this thread holds the lock of `dirty`, the entry cannot be marked dirty. So no thread may see the entry
            // yet.
            let taking = lock(&dirty);
            scope.spawn(|| set_dirty(&entries, &dirty, 7, L1Entry::new(65536)));
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(100) {
                assert!(!seen(), "the entry was visible before it was marked dirty");
                std::thread::yield_now();
            }
            drop(taking);
        });
        assert!(seen() && lock(&dirty).contains(&7));
    }
}
