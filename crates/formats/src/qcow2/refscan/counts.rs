//! A map from host clusters to their number of references, and to what the copied flags of the referring entries claim
//! about the refcount.
//!
//! The map is sparse and consists of pages. In the most common case, all clusters of a page have the same count and claims,
//! and the page stores them once. Otherwise the page stores one byte for each cluster, or four bytes for each cluster if a
//! count is too large (see `NARROW_COUNT`).

use std::collections::BTreeMap;
use std::ops::Range;

use oxblk_ring::is_zero;

use super::super::layout::refcount_get;

/// Clusters per page. Pages are small, so that a few scattered references cost little memory.
const PAGE: u64 = 256;
const LEN: usize = 256;
/// The copied flag of an entry claims that the refcount of the cluster is exactly one.
const COPIED: u32 = 1 << 31;
/// The cleared copied flag of an entry claims that the refcount is not one.
const NOT_COPIED: u32 = 1 << 30;
const COUNT: u32 = NOT_COPIED - 1;
/// Mask of the count in a narrow entry. The claims are the two bits above it, in the same order as in a wide entry.
const NARROW_COUNT: u8 = 0x3f;

/// What an entry claims about the refcount of the cluster that it refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum CopiedFlag {
    /// No claim.
    None,
    /// The refcount is exactly one (true), or it is not (false).
    Copied(bool),
}

impl CopiedFlag {
    fn bits(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Copied(true) => COPIED,
            Self::Copied(false) => NOT_COPIED,
        }
    }
}

/// The references of a cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in super::super) struct ClusterReferences(u32);

impl ClusterReferences {
    /// Number of references.
    pub(in super::super) fn count(self) -> u64 {
        u64::from(self.0 & COUNT)
    }

    /// Whether the refcount `refcount` contradicts the claim of an entry that refers to the cluster.
    pub(in super::super) fn is_contradicted_by(self, refcount: u64) -> bool {
        let wrong = if refcount == 1 { NOT_COPIED } else { COPIED };
        self.0 & wrong != 0
    }
}

#[derive(Debug, Clone)]
enum Page {
    /// All clusters have the same entry.
    Uniform(u32),
    Narrow(Box<[u8; LEN]>),
    Wide(Box<[u32; LEN]>),
}

impl Default for Page {
    fn default() -> Self {
        Self::Uniform(0)
    }
}

fn widen(entry: u8) -> u32 {
    (u32::from(entry & !NARROW_COUNT) << 24) | u32::from(entry & NARROW_COUNT)
}

fn narrow(entry: u32) -> Option<u8> {
    let [claims, ..] = (entry & !COUNT).to_be_bytes();
    let count = u8::try_from(entry & COUNT).ok().filter(|count| *count <= NARROW_COUNT)?;
    Some(claims | count)
}

impl Page {
    fn get(&self, index: usize) -> u32 {
        match self {
            Self::Uniform(entry) => *entry,
            Self::Narrow(entries) => entries.get(index).copied().map_or(0, widen),
            Self::Wide(entries) => entries.get(index).copied().unwrap_or(0),
        }
    }

    /// Gives each cluster its own entry.
    fn expand(&mut self) {
        if let Self::Uniform(entry) = *self {
            *self = match narrow(entry) {
                Some(entry) => Self::Narrow(Box::new([entry; LEN])),
                None => Self::Wide(Box::new([entry; LEN])),
            };
        }
    }

    /// If all entries of a narrow page are equal, stores one entry for all clusters.
    fn collapse_if_uniform(&mut self) {
        let Self::Narrow(entries) = self else { return };
        let [first, .., last] = **entries;
        if first == last && entries.iter().all(|entry| *entry == first) {
            *self = Self::Uniform(widen(first));
        }
    }

    fn set(&mut self, index: usize, entry: u32) {
        self.expand();
        if let Self::Narrow(entries) = self {
            if let (Some(byte), Some(place)) = (narrow(entry), entries.get_mut(index)) {
                *place = byte;
                return;
            }
            *self = Self::Wide(Box::new(entries.map(widen)));
        }
        if let Self::Wide(entries) = self
            && let Some(place) = entries.get_mut(index)
        {
            *place = entry;
        }
    }

    /// Adds references and claims to all entries of `range`. Returns `false` and adds nothing if a count would exceed
    /// `limit` or the largest count that the page can store.
    fn add_to_all(&mut self, range: Range<usize>, times: u32, claims: u32, limit: u32) -> bool {
        let whole = range == (0..LEN);
        if !whole {
            self.expand();
        }
        let fits = match self {
            Self::Uniform(entry) => add(std::slice::from_mut(entry), times, claims, limit),
            Self::Narrow(entries) => {
                let Some(entries) = entries.get_mut(range) else { return false };
                let largest = entries.iter().map(|entry| *entry & NARROW_COUNT).max().unwrap_or(0);
                let total = u32::from(largest).saturating_add(times);
                let (Some(times), Some(claims)) = (narrow(times), narrow(claims)) else {
                    return false;
                };
                let fits = total <= limit.min(NARROW_COUNT.into());
                if fits {
                    entries.iter_mut().for_each(|entry| *entry = (*entry + times) | claims);
                }
                fits
            }
            Self::Wide(entries) => {
                let Some(entries) = entries.get_mut(range) else { return false };
                add(entries, times, claims, limit)
            }
        };
        if fits && !whole {
            self.collapse_if_uniform();
        }
        fits
    }
}

/// Adds references and claims to all entries. Returns `false` and adds nothing if a count would exceed `limit` or the
/// largest count that a wide entry can store.
fn add(entries: &mut [u32], times: u32, claims: u32, limit: u32) -> bool {
    let largest = entries.iter().map(|entry| *entry & COUNT).max().unwrap_or(0);
    let fits = largest.saturating_add(times) <= limit.min(COUNT);
    if fits {
        entries.iter_mut().for_each(|entry| *entry = (*entry + times) | claims);
    }
    fits
}

/// A sparse map from clusters to their references.
#[derive(Debug, Clone, Default)]
pub(in super::super) struct References {
    pages: BTreeMap<u64, Page>,
    /// Maximum of the reported counts, normally the maximum refcount of the image. The map itself counts beyond this limit,
    /// because references may be removed again.
    limit: u32,
}

/// Result of adding references.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Added {
    /// The new number of references, at most the limit of the map.
    pub(in super::super) count: u64,
    /// Whether the number of references exceeds the limit of the map.
    pub(in super::super) overflow: bool,
}

/// Result of [`References::compare_block`] for a range of clusters whose refcounts equal the counted references.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in super::super) struct MatchingBlock {
    /// The last cluster with a refcount other than 0.
    pub(in super::super) last: Option<u64>,
    /// Whether a refcount contradicts the claim of some entry.
    pub(in super::super) contradicted: bool,
}

fn index(cluster: u64) -> usize {
    usize::try_from(cluster % PAGE).unwrap_or(0)
}

impl References {
    /// Creates an empty map. For each cluster, at most `limit` references are reported.
    pub(in super::super) fn new(limit: u64) -> Self {
        Self { pages: BTreeMap::new(), limit: u32::try_from(limit).unwrap_or(COUNT).min(COUNT) }
    }

    /// Adds `times` references to a cluster.
    pub(in super::super) fn add(&mut self, cluster: u64, times: u32, claim: CopiedFlag) -> Added {
        let page = self.pages.entry(cluster / PAGE).or_default();
        let entry = page.get(index(cluster));
        let wanted = (entry & COUNT).saturating_add(times);
        let count = wanted.min(COUNT);
        page.set(index(cluster), (entry & !COUNT) | claim.bits() | count);
        Added { count: count.min(self.limit).into(), overflow: wanted > self.limit }
    }

    /// Adds `times` references to each of `count` clusters from `first` on. Stops at the first page in which a count would
    /// exceed the limit or the largest count that the page can store. Returns the number of clusters that were processed.
    /// If this number is less than `count`, the caller adds the next cluster with [`Self::add`].
    pub(in super::super) fn add_run(
        &mut self,
        first: u64,
        count: u64,
        times: u32,
        claim: CopiedFlag,
    ) -> u64 {
        let mut done = 0;
        while done < count {
            let at = first.saturating_add(done);
            let len = (PAGE - at % PAGE).min(count - done);
            let range = index(at)..index(at) + usize::try_from(len).unwrap_or(0);
            let page = self.pages.entry(at / PAGE).or_default();
            if !page.add_to_all(range, times, claim.bits(), self.limit) {
                break;
            }
            done += len;
        }
        done
    }

    /// Removes one reference to a cluster, if the cluster has any.
    pub(in super::super) fn remove(&mut self, cluster: u64) {
        if let Some(page) = self.pages.get_mut(&(cluster / PAGE)) {
            let entry = page.get(index(cluster));
            if entry & COUNT > 0 {
                page.set(index(cluster), entry - 1);
            }
        }
    }

    /// The references of a cluster.
    pub(in super::super) fn get(&self, cluster: u64) -> ClusterReferences {
        let page = self.pages.get(&(cluster / PAGE));
        self.cluster_references(page.map_or(0, |page| page.get(index(cluster))))
    }

    fn cluster_references(&self, entry: u32) -> ClusterReferences {
        ClusterReferences((entry & !COUNT) | (entry & COUNT).min(self.limit))
    }

    /// The clusters of `range` with references or claims, in order.
    pub(in super::super) fn in_range(
        &self,
        range: Range<u64>,
    ) -> impl Iterator<Item = (u64, ClusterReferences)> {
        let pages = self.pages.range(range.start / PAGE..range.end.div_ceil(PAGE));
        let entries = pages.flat_map(|(page, entries)| {
            let first = page.saturating_mul(PAGE);
            (first..).zip((0..LEN).map(|index| self.cluster_references(entries.get(index))))
        });
        entries.filter(move |(cluster, entry)| range.contains(cluster) && entry.0 != 0)
    }

    /// The indices of the refcount blocks, of `per_block` clusters each, in which a cluster has references or claims, in
    /// order.
    pub(in super::super) fn blocks(&self, per_block: u64) -> Vec<u64> {
        let mut blocks: Vec<u64> = Vec::new();
        for (page, entries) in &self.pages {
            let first = page.saturating_mul(PAGE);
            if per_block >= PAGE {
                // A page lies within one block, because both lengths are powers of two.
                let any = (0..LEN).any(|index| entries.get(index) != 0);
                blocks.extend(any.then_some(first / per_block));
            } else {
                let used = (first..).zip((0..LEN).map(|index| entries.get(index)));
                blocks.extend(used.filter(|(_, entry)| *entry != 0).map(|(at, _)| at / per_block));
            }
        }
        blocks.dedup();
        blocks
    }

    /// Compares the refcounts in `block`, of 2^`order` bits each, with the counted references of the clusters of `range`.
    /// The first refcount in `block` is that of the first cluster. Returns `None` if a refcount differs or `block` is too
    /// short.
    pub(in super::super) fn compare_block(
        &self,
        range: Range<u64>,
        block: &[u8],
        order: u32,
    ) -> Option<MatchingBlock> {
        let mut found = MatchingBlock::default();
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / PAGE).saturating_add(1).saturating_mul(PAGE));
            let skipped = at - range.start;
            match self.pages.get(&(at / PAGE)) {
                Some(page) => {
                    let entries = self.entries(page, at, end);
                    compare_entries(entries, block, skipped, order, &mut found)?;
                }
                None => all_zero(block, skipped, end - range.start, order).then_some(())?,
            }
            at = end;
        }
        Some(found)
    }

    /// The entries of the clusters from `at` to `end`, all in one page.
    fn entries<'a>(
        &'a self,
        page: &'a Page,
        at: u64,
        end: u64,
    ) -> impl Iterator<Item = (u64, ClusterReferences)> + 'a {
        let from = index(at);
        (at..end)
            .zip(from..)
            .map(|(cluster, index)| (cluster, self.cluster_references(page.get(index))))
    }
}

/// Compares the refcounts of the block, from index `skipped` on, with the counted references. Returns `None` if a refcount
/// differs.
fn compare_entries(
    entries: impl Iterator<Item = (u64, ClusterReferences)>,
    block: &[u8],
    skipped: u64,
    order: u32,
    found: &mut MatchingBlock,
) -> Option<()> {
    let (mut same, mut contradicted, mut last) = (true, false, None);
    let mut compare = |(cluster, referred): (u64, ClusterReferences), refcount: u64| {
        same &= refcount == referred.count();
        contradicted |= referred.is_contradicted_by(refcount);
        last = if refcount > 0 { Some(cluster) } else { last };
    };
    if order == 4 {
        let start = usize::try_from(skipped.saturating_mul(2)).ok()?;
        let refcounts = block.get(start..)?.chunks_exact(2);
        for (entry, bytes) in entries.zip(refcounts) {
            compare(entry, bytes.try_into().map_or(0, u16::from_be_bytes).into());
        }
    } else {
        for (entry, at) in entries.zip(skipped..) {
            compare(entry, refcount_get(block, at, order)?);
        }
    }
    found.contradicted |= contradicted;
    found.last = last.or(found.last);
    same.then_some(())
}

/// Whether the refcounts at the indices from `from` to `to` of a block are all zero.
fn all_zero(block: &[u8], from: u64, to: u64, order: u32) -> bool {
    let bits = |at: u64| at.checked_shl(order).filter(|bit| bit % 8 == 0).map(|bit| bit / 8);
    let bytes = |at| bits(at).and_then(|byte| usize::try_from(byte).ok());
    match (bytes(from), bytes(to)) {
        (Some(from), Some(to)) => block.get(from..to).is_some_and(is_zero),
        _ => (from..to).all(|at| refcount_get(block, at, order) == Some(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_counted_and_found_in_order() {
        let mut references = References::new(u64::MAX);
        assert_eq!(references.add(1 << 40, 3, CopiedFlag::None).count, 3);
        assert_eq!(references.add(5, 1, CopiedFlag::Copied(true)).count, 1);
        assert_eq!(references.add(5, 1, CopiedFlag::None).count, 2);
        let all: Vec<_> = references.in_range(0..u64::MAX).map(|(c, r)| (c, r.count())).collect();
        assert_eq!(all, [(5, 2), (1 << 40, 3)]);
        assert_eq!(references.in_range(6..1 << 40).count(), 0);
        assert!(references.get(5).is_contradicted_by(2));
        assert!(!references.get(5).is_contradicted_by(1));
        assert!(!references.get(1 << 40).is_contradicted_by(1));
    }

    #[test]
    fn a_count_saturates_without_changing_the_claims() {
        let mut references = References::new(u64::MAX);
        references.add(0, u32::MAX, CopiedFlag::Copied(false));
        assert_eq!(references.add(0, u32::MAX, CopiedFlag::None).count, u64::from(COUNT));
        assert!(references.get(0).is_contradicted_by(1));
        assert!(!references.get(0).is_contradicted_by(7));
    }

    #[test]
    fn a_run_is_added_up_to_the_page_where_a_count_would_overflow() {
        let mut references = References::new(u64::MAX);
        references.add(700, 60, CopiedFlag::None);
        assert_eq!(references.add_run(100, 1000, 1, CopiedFlag::Copied(true)), 1000);
        assert_eq!(
            references.add_run(100, 1000, 3, CopiedFlag::None),
            412,
            "the third page is full"
        );
        assert_eq!(references.add(512, 3, CopiedFlag::None).count, 4);
        assert_eq!(references.add_run(513, 300, 3, CopiedFlag::None), 0);
        assert_eq!(references.add(700, 3, CopiedFlag::None).count, 64);
        assert_eq!(
            references.add_run(513, 300, 3, CopiedFlag::None),
            300,
            "the page has become wide"
        );
        assert_eq!(references.get(700).count(), 67);
        assert!(references.get(700).is_contradicted_by(67));
        assert_eq!((references.get(99).count(), references.get(100).count()), (0, 4));
    }

    #[test]
    fn a_block_agrees_if_each_refcount_equals_the_counted_references() {
        for order in 0..=6 {
            let mut references = References::new(u64::MAX);
            let range = 300..1300;
            references.add_run(300, 200, 1, CopiedFlag::Copied(true));
            references.add(1000, 1, CopiedFlag::None);
            let mut block = vec![0; 8000];
            let set = |block: &mut [u8], cluster: u64, value| {
                crate::qcow2::layout::refcount_set(block, cluster - 300, order, value).unwrap();
            };
            (300..500).for_each(|cluster| set(&mut block, cluster, 1));
            assert_eq!(references.compare_block(range.clone(), &block, order), None);
            set(&mut block, 1000, 1);
            let whole = MatchingBlock { last: Some(1000), contradicted: false };
            assert_eq!(references.compare_block(range.clone(), &block, order), Some(whole));
            set(&mut block, 1299, 1);
            assert_eq!(references.compare_block(range, &block, order), None);
            assert_eq!(references.compare_block(300..1299, &block, order), Some(whole));
        }
    }

    #[test]
    fn the_refcount_blocks_of_referenced_clusters_are_listed() {
        let mut references = References::new(u64::MAX);
        references.add(5, 1, CopiedFlag::None);
        references.add_run(1000, 100, 1, CopiedFlag::None);
        assert_eq!(references.blocks(64), [0, 15, 16, 17]);
        assert_eq!(references.blocks(1024), [0, 1]);
    }

    #[test]
    fn pages_take_memory_only_where_clusters_differ() {
        let uniform = |references: &References| {
            references
                .pages
                .values()
                .map(|page| matches!(page, Page::Uniform(_)))
                .collect::<Vec<_>>()
        };
        let mut references = References::new(u64::MAX);
        assert_eq!(references.add_run(100, 600, 1, CopiedFlag::Copied(true)), 600);
        assert_eq!(uniform(&references), [false, true, false]);
        assert_eq!(references.add_run(0, 100, 1, CopiedFlag::Copied(true)), 100);
        assert_eq!(uniform(&references), [true, true, false]);
        references.remove(300);
        assert_eq!(uniform(&references), [true, false, false]);
        assert_eq!((references.get(299).count(), references.get(300).count()), (1, 0));
        assert_eq!(references.add_run(0, 256, 100, CopiedFlag::None), 256);
        assert_eq!(references.get(255).count(), 101);
        references.add(255, 1, CopiedFlag::None);
        assert_eq!((references.get(254).count(), references.get(255).count()), (101, 102));
        assert!(references.get(254).is_contradicted_by(101));
        assert_eq!(references.blocks(64), (0..11).collect::<Vec<_>>());
    }

    #[test]
    fn more_references_than_the_limit_are_an_overflow() {
        let mut references = References::new(1);
        assert_eq!(references.add(3, 1, CopiedFlag::None), Added { count: 1, overflow: false });
        assert_eq!(references.add(3, 1, CopiedFlag::None), Added { count: 1, overflow: true });
    }
}
