//! 64-bit words that threads share, in mapped memory. Pages can be returned to the system while they stay mapped.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::pool::{map_pages, unmap_pages};

/// Bytes of a word.
const WORD: usize = size_of::<AtomicU64>();

/// Mapped memory of 64-bit words, which are initially zero. Only pages that have been written use memory of the host.
pub struct WordMemory {
    base: NonNull<AtomicU64>,
    words: usize,
    /// Bytes mapped: whole pages.
    mapped: usize,
}

// SAFETY: the memory is accessed only through atomics, stays mapped until the value is dropped, and belongs only to
// this value.
unsafe impl Send for WordMemory {}
// SAFETY: as above.
unsafe impl Sync for WordMemory {}

impl WordMemory {
    /// Maps `words` words. Aborts the process if the system has no memory.
    pub fn new(words: usize) -> Arc<Self> {
        let page = Self::page_words().saturating_mul(WORD);
        let mapped = words.max(1).saturating_mul(WORD).checked_next_multiple_of(page);
        let mapped = mapped.unwrap_or(usize::MAX);
        let Ok(base) = map_pages(mapped) else {
            handle_alloc_error(Layout::new::<[AtomicU64; 512]>());
        };
        Arc::new(Self { base: base.cast(), words, mapped })
    }

    /// Number of words in a page, the smallest unit that can be returned to the system.
    pub fn page_words() -> usize {
        rustix::param::page_size() / WORD
    }

    /// The words in `range`; `None` if the range extends past the end or is reversed.
    pub fn view(self: &Arc<Self>, range: Range<usize>) -> Option<Words> {
        let count = range.end.checked_sub(range.start)?;
        if range.end > self.words {
            return None;
        }
        // SAFETY: the start lies within the mapping or at its end.
        let start = unsafe { self.base.add(range.start) };
        Some(Words { start, count, _memory: Arc::clone(self) })
    }

    /// Returns the pages that lie entirely in `range` to the system. Their words become zero, also for concurrent
    /// readers. Returns the number of bytes released. The result is 0 if no page lies in `range`, or if the system
    /// keeps the pages (locked memory).
    pub fn release(&self, range: Range<usize>) -> usize {
        let page = Self::page_words();
        let Some(start) = range.start.checked_next_multiple_of(page) else { return 0 };
        // A range that ends at the last word extends to the end of the last page, because no word follows it.
        let end = if range.end == self.words { self.mapped / WORD } else { range.end };
        let end = end.min(self.mapped / WORD) / page * page;
        let Some(bytes) = end.checked_sub(start).and_then(|words| words.checked_mul(WORD)) else {
            return 0;
        };
        if bytes == 0 {
            return 0;
        }
        // SAFETY: the pages lie within the mapping, which is private and anonymous. Their content is only accessed
        // through atomics, and zero is a valid value of them.
        let done = unsafe {
            let at = self.base.add(start).as_ptr().cast::<libc::c_void>();
            libc::madvise(at, bytes, libc::MADV_DONTNEED)
        };
        if done == 0 { bytes } else { 0 }
    }
}

impl Drop for WordMemory {
    fn drop(&mut self) {
        // Views keep this value alive, so no view is left.
        unmap_pages(self.base.cast(), self.mapped);
    }
}

/// A run of words of a [`WordMemory`]. It keeps the memory mapped.
pub struct Words {
    start: NonNull<AtomicU64>,
    count: usize,
    _memory: Arc<WordMemory>,
}

// SAFETY: the value gives access only to shared atomics, in memory that it keeps mapped.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `view` has checked that the words lie in the mapping, which lives as long as `_memory`; zeroed and
        // page-aligned memory holds valid atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    /// The number of pages that use memory of the host.
    fn resident(memory: &WordMemory) -> usize {
        let mut pages = vec![0_u8; memory.mapped / (WordMemory::page_words() * WORD)];
        // SAFETY: the range is mapped, and there is a byte for each page.
        let done = unsafe {
            libc::mincore(memory.base.as_ptr().cast(), memory.mapped, pages.as_mut_ptr())
        };
        assert_eq!(done, 0);
        pages.iter().filter(|page| **page & 1 != 0).count()
    }

    #[test]
    fn released_pages_leave_memory_and_read_as_zero() {
        let page = WordMemory::page_words();
        let memory = WordMemory::new(4 * page);
        let words = memory.view(0..4 * page).unwrap();
        words.iter().for_each(|word| word.store(7, Relaxed));
        assert_eq!(resident(&memory), 4);
        // The page that lies only partly in the range is kept.
        assert_eq!(memory.release(page..3 * page - 1), page * WORD);
        assert_eq!(resident(&memory), 3);
        let zero = |range: Range<usize>| words[range].iter().all(|word| word.load(Relaxed) == 0);
        assert!(zero(page..2 * page));
        assert!(words[2 * page..].iter().all(|word| word.load(Relaxed) == 7));
        words[page].store(1, Relaxed);
        assert_eq!(words[page].load(Relaxed), 1);
    }

    #[test]
    fn ranges_past_the_end_are_refused() {
        let memory = WordMemory::new(10);
        assert_eq!(memory.view(2..10).unwrap().len(), 8);
        assert!(memory.view(2..11).is_none());
        assert_eq!(memory.release(1..10), 0);
        assert_eq!(memory.release(0..10), WordMemory::page_words() * WORD);
        assert_eq!(memory.release(5..usize::MAX), 0);
    }

    #[test]
    fn views_keep_the_memory() {
        let view = WordMemory::new(8).view(4..8).unwrap();
        view[3].store(9, Relaxed);
        assert_eq!(view[3].load(Relaxed), 9);
    }
}
