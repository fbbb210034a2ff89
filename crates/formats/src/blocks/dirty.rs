//! The dirty sectors of a map: the entries that must be written back.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Mutex;

use oxblk_ring::perturb::point;

use super::lock;

/// Number of entries in a sector of 512 bytes. A sector is the unit of write-back.
const PER_SECTOR: u32 = 128;
/// Maximum number of sectors in one write.
const MAX_SECTORS: u32 = 512;

/// Sectors of a map whose entries have changed since they were written. Sectors are counted from the first entry, so
/// they are not necessarily aligned to sectors of the file.
#[derive(Debug, Default)]
pub(crate) struct DirtySectors(Mutex<BTreeSet<u32>>);

/// The sectors of a write-back. If the write-back fails or is cancelled, its sectors become dirty again.
#[derive(Debug)]
pub(crate) struct Writing<'a> {
    dirty: &'a DirtySectors,
    sectors: BTreeSet<u32>,
}

impl DirtySectors {
    /// Changes an entry with `set`, and marks the sector of the entry as dirty.
    ///
    /// One lock is held during both steps. So a write-back that begins after a task has seen the new
    /// entry includes this entry.
    pub(crate) fn change(&self, index: u32, set: impl FnOnce()) {
        let mut sectors = lock(&self.0);
        set();
        point();
        sectors.insert(index / PER_SECTOR);
    }

    /// Removes all dirty sectors and returns them for a write-back.
    pub(crate) fn take(&self) -> Writing<'_> {
        Writing { dirty: self, sectors: std::mem::take(&mut *lock(&self.0)) }
    }
}

impl Writing<'_> {
    /// Whether there is no sector to write.
    pub(crate) fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// The runs of entries to write. The map has `entries` entries.
    pub(crate) fn runs(&self, entries: u32) -> Vec<Range<u32>> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for sector in &self.sectors {
            match runs.last_mut() {
                Some((first, count))
                    if first.saturating_add(*count) == *sector && *count < MAX_SECTORS =>
                {
                    *count = count.saturating_add(1);
                }
                _ => runs.push((*sector, 1)),
            }
        }
        let range = |(sector, count): (u32, u32)| {
            let first = sector.saturating_mul(PER_SECTOR);
            first..first.saturating_add(count.saturating_mul(PER_SECTOR)).min(entries)
        };
        runs.into_iter().map(range).collect()
    }

    /// Ends the write-back: all sectors were written and flushed.
    pub(crate) fn written(mut self) {
        self.sectors.clear();
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if !self.sectors.is_empty() {
            lock(&self.dirty.0).append(&mut self.sectors);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::time::{Duration, Instant};

    use super::*;

    impl DirtySectors {
        fn mark(&self, entries: Range<u32>) {
            entries.for_each(|index| self.change(index, || ()));
        }
    }

    #[test]
    fn an_entry_is_visible_only_when_a_write_back_includes_it() {
        let (dirty, set) = (DirtySectors::default(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            // This thread holds the lock, like a write-back that takes the sectors. This write-back does not include the
            // entry, so no thread may see the entry yet.
            let taking = lock(&dirty.0);
            scope.spawn(|| dirty.change(7, || set.store(true, SeqCst)));
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(100) {
                assert!(!set.load(SeqCst), "the entry was visible before it was marked dirty");
                std::thread::yield_now();
            }
            drop(taking);
        });
        assert!(set.load(SeqCst));
        assert_eq!(dirty.take().runs(100).first(), Some(&(0..100)));
    }

    #[test]
    fn neighbouring_sectors_are_written_together() {
        let dirty = DirtySectors::default();
        dirty.mark(128..428);
        dirty.mark(1000..1001);
        assert_eq!(dirty.take().runs(1001), [128..512, 896..1001]);
        // The first write-back was dropped, so its sectors are dirty again.
        dirty.mark(0..1);
        let writing = dirty.take();
        assert_eq!(writing.runs(2000), [0..512, 896..1024]);
        writing.written();
        assert!(dirty.take().is_empty());
        dirty.mark(0..(MAX_SECTORS + 1) * PER_SECTOR);
        assert_eq!(dirty.take().runs(u32::MAX).len(), 2);
    }
}
