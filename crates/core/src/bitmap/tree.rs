//! A set of bits that many threads change concurrently, with fast search for the next set or clear bit.
//!
//! The set has three levels: leaf *pages* of 512 words (32,768 bits), *branches* of 512 pages, and a root table. The
//! root table, a branch and a page are allocated when the first of their bits is set, so memory use grows with the
//! number of dirty bits. The root table has one pointer per 2^24 bits.
//!
//! Each level has a **summary**: one bit per word, page or branch below. A summary bit is set if the part below may
//! contain set bits. Invariant for every thread: *when `set` of a bit has returned, all summary bits above the bit are
//! set*, except while a `clear` is in progress. `set` works upwards (the word, then each summary). `clear` clears a
//! summary bit only after `clear` has found that the part below is empty. Then `clear` checks the part again. If
//! another thread has set a bit in this part, `clear` sets the summary bits again (upwards, like `set`). A search
//! relies on summaries only if no `clear` ran during the search (`clears_begun`, `clears_done`); otherwise the search
//! reads the words themselves.
//!
//! All operations on words and summaries are `SeqCst`, because the argument above needs a single total order. On x86, a
//! `SeqCst` read-modify-write costs the same as a weaker one. `set` starts with a fence and then loads the word; if the
//! bits are set already, `set` writes nothing. This fence orders the caller's earlier writes of data before the load.
//! `clear` ends with a fence. This fence orders the cleared bits before the reader's later reads of the data. Both
//! fences together guarantee: if a reader clears a bit and then reads the data, the reader sees the data of every `set`
//! that found the bit still set. Without the second fence, the reader could read the data before it sees the bit as
//! clear, on machines where an atomic operation is a separate load and store (ARMv8.0, RISC-V).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering, Ordering::SeqCst, fence};

use oxblk_ring::perturb::point;

const WORD_BITS: u64 = 64;
const FANOUT: u64 = 512;
const PAGE_BITS: u64 = WORD_BITS * FANOUT;
const BRANCH_BITS: u64 = PAGE_BITS * FANOUT;
const SLOTS: usize = 512;

/// 512 bits; each bit records whether one of the 512 parts below may contain set bits.
struct Summary([AtomicU64; SLOTS / 64]);

impl Summary {
    fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    fn set(&self, slot: usize) {
        set_bit(&self.0, slot);
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| word.load(SeqCst) == 0)
    }
}

struct Page {
    words: [AtomicU64; SLOTS],
    summary: Summary,
}

impl Page {
    fn new() -> Box<Self> {
        Box::new(Self {
            words: std::array::from_fn(|_| AtomicU64::new(0)),
            summary: Summary::new(),
        })
    }
}

struct Branch {
    pages: [OnceLock<Box<Page>>; SLOTS],
    summary: Summary,
}

impl Branch {
    fn new() -> Box<Self> {
        Box::new(Self { pages: std::array::from_fn(|_| OnceLock::new()), summary: Summary::new() })
    }
}

/// The root table: the branches, and one bit per branch.
struct Root {
    branches: Box<[OnceLock<Box<Branch>>]>,
    summary: Box<[AtomicU64]>,
}

impl Root {
    fn new(bits: u64) -> Self {
        let branches = index(bits.div_ceil(BRANCH_BITS));
        Self {
            branches: (0..branches).map(|_| OnceLock::new()).collect(),
            summary: (0..branches.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

/// A set of bits. Its length in bits is fixed.
pub(super) struct BitTree {
    bits: u64,
    root: OnceLock<Root>,
    count: AtomicU64,
    clears_begun: AtomicU64,
    clears_done: AtomicU64,
}

/// Position of a word: its slots in the root, in the branch and in the page.
#[derive(Clone, Copy)]
struct Place {
    root: usize,
    branch: usize,
    page: usize,
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn place(word: u64) -> Place {
    Place {
        root: index(word / (FANOUT * FANOUT)),
        branch: index(word / FANOUT % FANOUT),
        page: index(word % FANOUT),
    }
}

fn set_bit(words: &[AtomicU64], bit: usize) {
    let Some(word) = words.get(bit / 64) else { return };
    let mask = 1u64 << (bit % 64);
    if word.load(SeqCst) & mask == 0 {
        word.fetch_or(mask, SeqCst);
    }
}

fn clear_bit(words: &[AtomicU64], bit: usize) {
    if let Some(word) = words.get(bit / 64) {
        word.fetch_and(!(1u64 << (bit % 64)), SeqCst);
    }
}

fn mark_up(root: &Root, branch: &Branch, page: &Page, at: Place) {
    page.summary.set(at.page);
    point();
    mark_branch(root, branch, at);
}

fn mark_branch(root: &Root, branch: &Branch, at: Place) {
    branch.summary.set(at.branch);
    point();
    set_bit(&root.summary, at.root);
}

/// The first set bit of a summary at or after `from`.
fn next_slot(words: &[AtomicU64], from: usize) -> Option<usize> {
    let mut mask = u64::MAX << (from % 64);
    for (at, word) in words.iter().enumerate().skip(from / 64) {
        let found = word.load(SeqCst) & mask;
        if found != 0 {
            return Some(at * 64 + index(u64::from(found.trailing_zeros())));
        }
        mask = u64::MAX;
    }
    None
}

/// The bits of `word` that lie in `first..=last`. The range must include a bit of the word.
fn mask_of(word: u64, first: u64, last: u64) -> u64 {
    let low = if word == first / WORD_BITS { first % WORD_BITS } else { 0 };
    let high = if word == last / WORD_BITS { last % WORD_BITS } else { WORD_BITS - 1 };
    (u64::MAX << low) & (u64::MAX >> (WORD_BITS - 1 - high))
}

impl BitTree {
    /// An empty set of `bits` bits. The caller limits `bits`.
    pub(super) fn new(bits: u64) -> Self {
        Self {
            bits,
            root: OnceLock::new(),
            count: AtomicU64::new(0),
            clears_begun: AtomicU64::new(0),
            clears_done: AtomicU64::new(0),
        }
    }

    pub(super) fn bits(&self) -> u64 {
        self.bits
    }

    /// Number of set bits; exact while no change is in progress.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Bytes of memory in use.
    pub(super) fn memory(&self) -> usize {
        let Some(root) = self.root.get() else { return 0 };
        let branches = root.branches.iter().filter_map(|slot| slot.get());
        let inner: usize = branches
            .map(|branch| {
                let pages = branch.pages.iter().filter(|page| page.get().is_some()).count();
                size_of::<Branch>() + pages * size_of::<Page>()
            })
            .sum();
        inner + size_of_val::<[_]>(&root.branches) + size_of_val::<[_]>(&root.summary)
    }

    /// Sets the bits `first..=last`. Bits past the end of the tree are ignored.
    pub(super) fn set(&self, first: u64, last: u64) {
        let Some((first, last)) = self.clip(first, last) else { return };
        fence(SeqCst);
        for word in first / WORD_BITS..=last / WORD_BITS {
            self.set_word(word, mask_of(word, first, last));
        }
    }

    /// Sets the bits of `mask` in the 64 bits from bit `64 * word` on.
    pub(super) fn set_word(&self, word: u64, mask: u64) {
        let mask = mask & self.valid(word);
        if mask == 0 {
            return;
        }
        let at = place(word);
        let root = self.root.get_or_init(|| Root::new(self.bits));
        let Some(branch) = root.branches.get(at.root) else { return };
        let branch = branch.get_or_init(Branch::new);
        let Some(page) = branch.pages.get(at.branch) else { return };
        let page = page.get_or_init(Page::new);
        let Some(leaf) = page.words.get(at.page) else { return };
        if leaf.load(SeqCst) & mask != mask {
            let added = mask & !leaf.fetch_or(mask, SeqCst);
            self.count.fetch_add(u64::from(added.count_ones()), Ordering::Relaxed);
        }
        point();
        mark_up(root, branch, page, at);
    }

    /// Clears the bits `first..=last`.
    pub(super) fn clear(&self, first: u64, last: u64) {
        let Some((first, last)) = self.clip(first, last) else { return };
        self.clears_begun.fetch_add(1, SeqCst);
        let mut word = first / WORD_BITS;
        while word <= last / WORD_BITS {
            // Pages that were never allocated contain no set bits.
            match self.page(word) {
                Some((root, branch, page)) => {
                    self.clear_word((root, branch, page), word, mask_of(word, first, last));
                    word += 1;
                }
                None => word = self.end_of_unallocated(word),
            }
        }
        self.clears_done.fetch_add(1, SeqCst);
        // The caller reads the data next; see the module documentation.
        fence(SeqCst);
    }

    fn clear_word(&self, parts: (&Root, &Branch, &Page), word: u64, mask: u64) {
        let (root, branch, page) = parts;
        let at = place(word);
        let Some(leaf) = page.words.get(at.page) else { return };
        if leaf.load(SeqCst) & mask == 0 {
            return;
        }
        let old = leaf.fetch_and(!mask, SeqCst);
        self.count.fetch_sub(u64::from((old & mask).count_ones()), Ordering::Relaxed);
        if old & !mask != 0 {
            return;
        }
        point();
        clear_bit(&page.summary.0, at.page);
        point();
        if leaf.load(SeqCst) != 0 {
            return mark_up(root, branch, page, at);
        }
        if !page.summary.is_empty() {
            return;
        }
        clear_bit(&branch.summary.0, at.branch);
        point();
        if !page.summary.is_empty() {
            return mark_branch(root, branch, at);
        }
        if !branch.summary.is_empty() {
            return;
        }
        clear_bit(&root.summary, at.root);
        point();
        if !branch.summary.is_empty() {
            set_bit(&root.summary, at.root);
        }
    }

    /// The 64 bits from bit `64 * word` on.
    pub(super) fn word(&self, word: u64) -> u64 {
        let Some((_, _, page)) = self.page(word) else { return 0 };
        page.words.get(place(word).page).map_or(0, |leaf| leaf.load(SeqCst))
    }

    /// The first set bit in `first..=last`.
    pub(super) fn next_set(&self, first: u64, last: u64) -> Option<u64> {
        let (first, last) = self.clip(first, last)?;
        let done = self.clears_done.load(SeqCst);
        let begun = self.clears_begun.load(SeqCst);
        if done == begun {
            let found = self.search(first, last, true);
            point();
            if self.clears_begun.load(SeqCst) == begun {
                return found;
            }
        }
        self.search(first, last, false)
    }

    /// The first clear bit in `first..=last`.
    pub(super) fn next_clear(&self, first: u64, last: u64) -> Option<u64> {
        let (first, last) = self.clip(first, last)?;
        for word in first / WORD_BITS..=last / WORD_BITS {
            let clear = !self.word(word) & mask_of(word, first, last);
            if clear != 0 {
                return Some(word * WORD_BITS + u64::from(clear.trailing_zeros()));
            }
        }
        None
    }

    fn search(&self, first: u64, last: u64, by_summary: bool) -> Option<u64> {
        let end = last / WORD_BITS;
        let mut word = first / WORD_BITS;
        while word <= end {
            let found = self.word(word) & mask_of(word, first, last);
            if found != 0 {
                return Some(word * WORD_BITS + u64::from(found.trailing_zeros()));
            }
            word = match (by_summary, self.page(word)) {
                (true, _) => self.next_word_by_summary(word + 1)?,
                (false, Some(_)) => word + 1,
                (false, None) => self.end_of_unallocated(word),
            };
        }
        None
    }

    /// The first word at or after `word` that may contain set bits according to the summaries.
    fn next_word_by_summary(&self, word: u64) -> Option<u64> {
        let mut at = place(word);
        let table = self.root.get()?;
        loop {
            let root = next_slot(&table.summary, at.root)?;
            if root != at.root {
                at = Place { root, branch: 0, page: 0 };
            }
            let branch = table.branches.get(root)?.get();
            while let Some(slot) = branch.and_then(|b| next_slot(&b.summary.0, at.branch)) {
                if slot != at.branch {
                    at = Place { root, branch: slot, page: 0 };
                }
                let page = branch.and_then(|b| b.pages.get(slot)).and_then(OnceLock::get);
                if let Some(found) = page.and_then(|p| next_slot(&p.summary.0, at.page)) {
                    let pages = root as u64 * FANOUT + slot as u64;
                    return Some(pages * FANOUT + found as u64);
                }
                at = Place { root, branch: slot + 1, page: 0 };
            }
            at = Place { root: root + 1, branch: 0, page: 0 };
        }
    }

    fn page(&self, word: u64) -> Option<(&Root, &Branch, &Page)> {
        let at = place(word);
        let root = self.root.get()?;
        let branch = root.branches.get(at.root)?.get()?;
        let page = branch.pages.get(at.branch)?.get()?;
        Some((root, branch, page))
    }

    /// The first word after the missing page or branch that would contain `word`.
    fn end_of_unallocated(&self, word: u64) -> u64 {
        let root = self.root.get();
        let branch = root.and_then(|root| root.branches.get(place(word).root)?.get());
        let span = if branch.is_some() { FANOUT } else { FANOUT * FANOUT };
        (word / span + 1) * span
    }

    fn clip(&self, first: u64, last: u64) -> Option<(u64, u64)> {
        let last = last.min(self.bits.checked_sub(1)?);
        (first <= last).then_some((first, last))
    }

    /// The mask of the bits of a word that lie inside the set.
    fn valid(&self, word: u64) -> u64 {
        match self.bits.checked_sub(word.saturating_mul(WORD_BITS)) {
            None | Some(0) => 0,
            Some(rest) if rest >= WORD_BITS => u64::MAX,
            Some(rest) => u64::MAX >> (WORD_BITS - rest),
        }
    }
}
