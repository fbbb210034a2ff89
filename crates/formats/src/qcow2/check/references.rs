//! How often each host cluster is referred to, and what is claimed of its refcount.

use std::collections::BTreeMap;
use std::ops::Range;

/// Clusters per page. Small, so that a few scattered references cost little memory.
const PAGE: u64 = 64;
/// An entry claims that the cluster's refcount is exactly one.
const COPIED: u32 = 1 << 31;
/// An entry claims that it is not.
const NOT_COPIED: u32 = 1 << 30;
const COUNT: u32 = NOT_COPIED - 1;

type Page = Box<[u32]>;

/// What an entry that refers to a cluster claims of its refcount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// Nothing.
    None,
    /// That it is exactly one (true), or not (false).
    Copied(bool),
}

/// A cluster's references.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Referred(u32);

impl Referred {
    /// How many there are.
    pub(super) fn count(self) -> u64 {
        u64::from(self.0 & COUNT)
    }

    /// Whether an entry claims what a refcount of `refcount` belies.
    pub(super) fn is_belied_by(self, refcount: u64) -> bool {
        let wrong = if refcount == 1 { NOT_COPIED } else { COPIED };
        self.0 & wrong != 0
    }
}

/// A sparse map from clusters to their references.
#[derive(Debug)]
pub(super) struct References {
    pages: BTreeMap<u64, Page>,
    /// The most that is told: what the image's refcounts can express. More are counted, since some may be taken away
    /// again.
    limit: u32,
}

/// What came of counting references.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Added {
    /// How many there are now.
    pub(super) count: u64,
    /// There are more than the image's refcounts can express.
    pub(super) overflow: bool,
}

impl References {
    /// No references yet; of each cluster, `limit` are told at most.
    pub(super) fn new(limit: u64) -> Self {
        Self { pages: BTreeMap::new(), limit: u32::try_from(limit).unwrap_or(COUNT).min(COUNT) }
    }

    /// Adds `times` references to a cluster.
    pub(super) fn add(&mut self, cluster: u64, times: u32, claim: Claim) -> Added {
        let page = self.pages.entry(cluster / PAGE).or_insert_with(|| {
            std::iter::repeat_n(0, usize::try_from(PAGE).unwrap_or(0)).collect()
        });
        let Some(entry) = page.get_mut(usize::try_from(cluster % PAGE).unwrap_or(0)) else {
            return Added { count: 0, overflow: false };
        };
        let wanted = (*entry & COUNT).saturating_add(times);
        let count = wanted.min(COUNT);
        let claims = (*entry & !COUNT)
            | match claim {
                Claim::None => 0,
                Claim::Copied(true) => COPIED,
                Claim::Copied(false) => NOT_COPIED,
            };
        *entry = claims | count;
        Added { count: count.min(self.limit).into(), overflow: wanted > self.limit }
    }

    /// Takes one reference to a cluster away.
    pub(super) fn remove(&mut self, cluster: u64) {
        let page = self.pages.get_mut(&(cluster / PAGE));
        let index = usize::try_from(cluster % PAGE).unwrap_or(0);
        if let Some(entry) = page.and_then(|page| page.get_mut(index))
            && *entry & COUNT > 0
        {
            *entry -= 1;
        }
    }

    /// The references of a cluster.
    pub(super) fn get(&self, cluster: u64) -> Referred {
        let page = self.pages.get(&(cluster / PAGE));
        let index = usize::try_from(cluster % PAGE).unwrap_or(0);
        self.told(page.and_then(|page| page.get(index)).copied().unwrap_or(0))
    }

    fn told(&self, entry: u32) -> Referred {
        Referred((entry & !COUNT) | (entry & COUNT).min(self.limit))
    }

    /// The clusters of `range` that have any, in order.
    pub(super) fn in_range(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Referred)> {
        let pages = self.pages.range(range.start / PAGE..range.end.div_ceil(PAGE));
        let entries = pages.flat_map(|(page, entries)| {
            let first = page.saturating_mul(PAGE);
            (first..).zip(entries.iter().map(|entry| self.told(*entry)))
        });
        entries.filter(move |(cluster, entry)| range.contains(cluster) && entry.0 != 0)
    }

    /// Whether no cluster of `range` has any.
    pub(super) fn is_empty_in(&self, range: Range<u64>) -> bool {
        self.in_range(range).next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_counted_and_found_in_order() {
        let mut references = References::new(u64::MAX);
        assert_eq!(references.add(1 << 40, 3, Claim::None).count, 3);
        assert_eq!(references.add(5, 1, Claim::Copied(true)).count, 1);
        assert_eq!(references.add(5, 1, Claim::None).count, 2);
        let all: Vec<_> = references.in_range(0..u64::MAX).map(|(c, r)| (c, r.count())).collect();
        assert_eq!(all, [(5, 2), (1 << 40, 3)]);
        assert!(references.is_empty_in(6..1 << 40));
        assert!(references.get(5).is_belied_by(2));
        assert!(!references.get(5).is_belied_by(1));
        assert!(!references.get(1 << 40).is_belied_by(1));
    }

    #[test]
    fn counts_stop_at_their_most_without_touching_the_claims() {
        let mut references = References::new(u64::MAX);
        references.add(0, u32::MAX, Claim::Copied(false));
        assert_eq!(references.add(0, u32::MAX, Claim::None).count, u64::from(COUNT));
        assert!(references.get(0).is_belied_by(1));
        assert!(!references.get(0).is_belied_by(7));
    }

    #[test]
    fn more_references_than_the_limit_are_an_overflow() {
        let mut references = References::new(1);
        assert_eq!(references.add(3, 1, Claim::None), Added { count: 1, overflow: false });
        assert_eq!(references.add(3, 1, Claim::None), Added { count: 1, overflow: true });
    }
}
