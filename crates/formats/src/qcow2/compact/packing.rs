//! Placing compressed data in new clusters, one piece behind the other. This module only computes sectors; it does no
//! I/O.
//!
//! The L2 entry of compressed data contains the first byte and the number of sectors, but not the last byte. So data moves
//! by whole sectors: its offset within the first sector and its number of sectors do not change.
//!
//! Adjacent pieces usually share a sector. Such pieces stay adjacent, and the shared sector is copied once. If the new clusters
//! of the pieces are not adjacent, the shared sector is copied for each piece.

use std::collections::BTreeMap;
use std::ops::Range;

/// Size of a sector in bytes.
pub(super) const SECTOR: u64 = 512;

/// Contiguous sectors that are copied together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// The first sector at the old location.
    pub(super) from: u64,
    /// The first sector at the new location.
    pub(super) to: u64,
    /// Number of sectors.
    pub(super) len: u64,
}

/// The place where a piece fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fit {
    /// In the current clusters.
    Here,
    /// In the current clusters, if they are extended by this number of clusters.
    Behind(u64),
    /// Only in other clusters.
    Elsewhere,
}

/// The new clusters, and the pieces that were placed in these clusters.
#[derive(Debug, Clone)]
pub(super) struct Packing {
    /// Sectors per cluster.
    per_cluster: u64,
    /// Maximum number of references of a cluster.
    max_references: u64,
    /// The sectors of the current clusters. These contiguous clusters are being filled.
    run: Range<u64>,
    /// The first free sector of the current clusters.
    next: u64,
    /// Whether the last span lies in the current clusters.
    open: bool,
    spans: Vec<Span>,
    /// Number of references to each new cluster. The map contains at least the current clusters that have references.
    counts: BTreeMap<u64, u64>,
    /// The part of `counts` that [`Self::take`] has not returned yet.
    untaken_counts: BTreeMap<u64, u64>,
}

impl Packing {
    /// Begins without clusters. A cluster has `per_cluster` sectors and at most `max_references` references.
    pub(super) fn new(per_cluster: u64, max_references: u64) -> Self {
        Self {
            per_cluster: per_cluster.max(1),
            max_references,
            run: 0..0,
            next: 0,
            open: false,
            spans: Vec::new(),
            counts: BTreeMap::new(),
            untaken_counts: BTreeMap::new(),
        }
    }

    /// The first new sector of a piece, if the current clusters are long enough.
    fn place(&self, piece: &Range<u64>) -> u64 {
        let last = self.spans.last().filter(|_| self.open);
        let beside = last
            .filter(|span| (span.from..=span.from.saturating_add(span.len)).contains(&piece.start));
        beside
            .map_or(self.next, |span| span.to.saturating_add(piece.start.saturating_sub(span.from)))
    }

    fn touched(&self, place: u64, piece: &Range<u64>) -> std::ops::RangeInclusive<u64> {
        let last = place.saturating_add(length(piece)).saturating_sub(1);
        place / self.per_cluster..=last / self.per_cluster
    }

    /// The place where a piece with `references` references fits. `piece` contains the sectors at the old location. The caller
    /// passes pieces in the order of their first sectors.
    pub(super) fn fit(&self, piece: &Range<u64>, references: u64) -> Fit {
        let place = self.place(piece);
        let counted = |cluster: u64| self.counts.get(&cluster).copied().unwrap_or(0);
        let full = |cluster: u64| counted(cluster).saturating_add(references) > self.max_references;
        if self.run.is_empty() || self.touched(place, piece).any(full) {
            return Fit::Elsewhere;
        }
        let beyond = place.saturating_add(length(piece)).saturating_sub(self.run.end);
        match beyond.div_ceil(self.per_cluster) {
            0 => Fit::Here,
            more => Fit::Behind(more),
        }
    }

    /// Number of clusters that a piece needs if it shares no cluster with other pieces.
    pub(super) fn clusters_for(&self, piece: &Range<u64>) -> u64 {
        length(piece).div_ceil(self.per_cluster)
    }

    /// The first cluster behind the current clusters.
    pub(super) fn end(&self) -> u64 {
        self.run.end / self.per_cluster
    }

    /// Continues in `count` other clusters from `start` on.
    pub(super) fn begin(&mut self, start: u64, count: u64) {
        let first = start.saturating_mul(self.per_cluster);
        self.run = first..first.saturating_add(count.saturating_mul(self.per_cluster));
        self.next = first;
        self.open = false;
    }

    /// Extends the current clusters by `count` clusters.
    pub(super) fn extend(&mut self, count: u64) {
        self.run.end = self.run.end.saturating_add(count.saturating_mul(self.per_cluster));
    }

    /// Places a piece for which there is space, and returns its first new sector.
    pub(super) fn put(&mut self, piece: &Range<u64>, references: u64) -> u64 {
        let place = self.place(piece);
        let end = place.saturating_add(length(piece));
        match self.spans.last_mut().filter(|span| {
            self.open && place.saturating_sub(span.to) == piece.start.saturating_sub(span.from)
        }) {
            Some(span) => span.len = span.len.max(end.saturating_sub(span.to)),
            None => {
                self.spans.push(Span { from: piece.start, to: place, len: length(piece) });
                self.open = true;
            }
        }
        self.next = self.next.max(end);
        for cluster in self.touched(place, piece) {
            for counts in [&mut self.counts, &mut self.untaken_counts] {
                let count = counts.entry(cluster).or_default();
                *count = count.saturating_add(references);
            }
        }
        place
    }

    /// Returns the spans to copy, and the references of the new clusters, for all pieces since the last call.
    /// The next piece after this call may have any first sector.
    pub(super) fn take(&mut self) -> (Vec<Span>, BTreeMap<u64, u64>) {
        self.open = false;
        let current = self.run.start / self.per_cluster;
        self.counts.retain(|cluster, _| *cluster >= current);
        (std::mem::take(&mut self.spans), std::mem::take(&mut self.untaken_counts))
    }

    /// Places no further piece in the current clusters.
    pub(super) fn close(&mut self) {
        self.run = 0..0;
        self.open = false;
    }
}

fn length(piece: &Range<u64>) -> u64 {
    piece.end.saturating_sub(piece.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(from: u64, to: u64, len: u64) -> Span {
        Span { from, to, len }
    }

    #[test]
    fn pieces_that_share_sectors_stay_adjacent_and_gaps_disappear() {
        let mut packing = Packing::new(8, 100);
        assert_eq!(packing.fit(&(805..808), 1), Fit::Elsewhere);
        packing.begin(2, 1);
        assert_eq!(packing.put(&(805..808), 1), 16);
        assert_eq!(packing.fit(&(807..812), 2), Fit::Here);
        assert_eq!(packing.put(&(807..812), 2), 18);
        assert_eq!(packing.fit(&(820..822), 1), Fit::Behind(1));
        packing.extend(1);
        assert_eq!(packing.put(&(820..822), 1), 23);
        let taken = (vec![span(805, 16, 7), span(820, 23, 2)], BTreeMap::from([(2, 4), (3, 1)]));
        assert_eq!(packing.take(), taken);
        assert_eq!(packing.put(&(100..103), 1), 25);
        assert_eq!(packing.take(), (vec![span(100, 25, 3)], BTreeMap::from([(3, 1)])));
        packing.close();
        assert_eq!(packing.fit(&(90..91), 1), Fit::Elsewhere);
    }

    #[test]
    fn a_shared_sector_is_copied_twice_if_the_clusters_are_not_adjacent() {
        let mut packing = Packing::new(8, 100);
        packing.begin(2, 1);
        packing.put(&(800..806), 1);
        assert_eq!((packing.fit(&(805..809), 1), packing.end()), (Fit::Behind(1), 3));
        packing.begin(7, 1);
        assert_eq!(packing.put(&(805..809), 1), 56);
        assert_eq!(packing.put(&(808..810), 1), 59);
        assert_eq!(packing.take().0, [span(800, 16, 6), span(805, 56, 5)]);
    }

    #[test]
    fn a_cluster_gets_no_more_references_than_its_refcount_can_express() {
        let mut packing = Packing::new(8, 3);
        packing.begin(2, 1);
        packing.put(&(800..801), 2);
        packing.take();
        assert_eq!(packing.fit(&(800..801), 2), Fit::Elsewhere);
        assert_eq!(packing.fit(&(800..801), 1), Fit::Here);
        assert_eq!(packing.clusters_for(&(800..809)), 2);
    }
}
