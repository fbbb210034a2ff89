//! Where compressed data goes: piece behind piece in new clusters. Pure: sectors in, sectors out.
//!
//! An entry tells of compressed data where it begins, to the byte, and how many sectors it reaches into, but not where it
//! ends. So data moves by whole sectors: it begins at the same byte of a sector as before, and reaches into as many. Pieces
//! that share a sector, as neighbours mostly do, stay beside each other, and the sector is copied once. Where that cannot
//! be, as the next free cluster lies elsewhere, each has the sector for itself.

use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;

/// Sectors that are copied together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// The first of them, as they lie now.
    pub(super) from: u64,
    /// Where that one goes.
    pub(super) to: u64,
    /// How many.
    pub(super) len: u64,
}

/// Whether there is room for a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// In the clusters at hand.
    Here,
    /// With so many clusters more right behind them.
    Behind(u64),
    /// In other clusters alone.
    Elsewhere,
}

/// New clusters that are being filled.
#[derive(Debug, Clone)]
pub(super) struct Packing {
    /// Sectors of a cluster.
    per_cluster: u64,
    /// The references that a cluster can have.
    most: u64,
    /// The clusters that lie together and are being filled, in sectors.
    run: Range<u64>,
    /// The first sector of them that is free.
    next: u64,
    /// Whether the last span lies in them.
    open: bool,
    spans: Vec<Span>,
    /// References that the clusters have, and those among them that have not been taken yet.
    counts: BTreeMap<u64, u64>,
    fresh: BTreeMap<u64, u64>,
}

impl Packing {
    /// Nothing yet, for clusters of `per_cluster` sectors that can have `most` references each.
    pub(super) fn new(per_cluster: u64, most: u64) -> Self {
        Self {
            per_cluster: per_cluster.max(1),
            most,
            run: 0..0,
            next: 0,
            open: false,
            spans: Vec::new(),
            counts: BTreeMap::new(),
            fresh: BTreeMap::new(),
        }
    }

    /// Where a piece goes if the clusters at hand reach that far.
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

    /// Whether there is room for a piece (its sectors as they lie now) to which `references` entries refer. Pieces come in
    /// the order of their first sectors.
    pub(super) fn room(&self, piece: &Range<u64>, references: u64) -> Room {
        let place = self.place(piece);
        let counted = |cluster: u64| self.counts.get(&cluster).copied().unwrap_or(0);
        let full = |cluster: u64| counted(cluster).saturating_add(references) > self.most;
        if self.run.is_empty() || self.touched(place, piece).any(full) {
            return Room::Elsewhere;
        }
        let beyond = place.saturating_add(length(piece)).saturating_sub(self.run.end);
        match beyond.div_ceil(self.per_cluster) {
            0 => Room::Here,
            more => Room::Behind(more),
        }
    }

    /// Clusters that a piece needs for itself.
    pub(super) fn clusters_for(&self, piece: &Range<u64>) -> u64 {
        length(piece).div_ceil(self.per_cluster)
    }

    /// The first cluster behind those at hand.
    pub(super) fn end(&self) -> u64 {
        self.run.end / self.per_cluster
    }

    /// Goes on in `count` other clusters from `start` on.
    pub(super) fn begin(&mut self, start: u64, count: u64) {
        let first = start.saturating_mul(self.per_cluster);
        self.run = first..first.saturating_add(count.saturating_mul(self.per_cluster));
        self.next = first;
        self.open = false;
    }

    /// `count` more clusters lie behind those at hand.
    pub(super) fn extend(&mut self, count: u64) {
        self.run.end = self.run.end.saturating_add(count.saturating_mul(self.per_cluster));
    }

    /// Puts a piece, for which there is room, and gives the sector where it goes.
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
            for counts in [&mut self.counts, &mut self.fresh] {
                let count = counts.entry(cluster).or_default();
                *count = count.saturating_add(references);
            }
        }
        place
    }

    /// What has been put since this was asked last: what is to be copied, and the references that clusters have by that.
    /// What comes next may come in any order.
    pub(super) fn take(&mut self) -> (Vec<Span>, BTreeMap<u64, u64>) {
        self.open = false;
        let at_hand = self.run.start / self.per_cluster;
        self.counts.retain(|cluster, _| *cluster >= at_hand);
        (std::mem::take(&mut self.spans), std::mem::take(&mut self.fresh))
    }

    /// Puts nothing more into the clusters at hand.
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
    fn pieces_that_share_sectors_stay_beside_each_other_and_gaps_go() {
        let mut packing = Packing::new(8, 100);
        assert_eq!(packing.room(&(805..808), 1), Room::Elsewhere);
        packing.begin(2, 1);
        assert_eq!(packing.put(&(805..808), 1), 16);
        assert_eq!(packing.room(&(807..812), 2), Room::Here);
        assert_eq!(packing.put(&(807..812), 2), 18);
        assert_eq!(packing.room(&(820..822), 1), Room::Behind(1));
        packing.extend(1);
        assert_eq!(packing.put(&(820..822), 1), 23);
        let taken = (vec![span(805, 16, 7), span(820, 23, 2)], BTreeMap::from([(2, 4), (3, 1)]));
        assert_eq!(packing.take(), taken);
        assert_eq!(packing.put(&(100..103), 1), 25);
        assert_eq!(packing.take(), (vec![span(100, 25, 3)], BTreeMap::from([(3, 1)])));
        packing.close();
        assert_eq!(packing.room(&(90..91), 1), Room::Elsewhere);
    }

    #[test]
    fn in_clusters_elsewhere_a_shared_sector_is_there_twice() {
        let mut packing = Packing::new(8, 100);
        packing.begin(2, 1);
        packing.put(&(800..806), 1);
        assert_eq!((packing.room(&(805..809), 1), packing.end()), (Room::Behind(1), 3));
        packing.begin(7, 1);
        assert_eq!(packing.put(&(805..809), 1), 56);
        assert_eq!(packing.put(&(808..810), 1), 59);
        assert_eq!(packing.take().0, [span(800, 16, 6), span(805, 56, 5)]);
    }

    #[test]
    fn a_cluster_gets_no_more_references_than_can_be_counted() {
        let mut packing = Packing::new(8, 3);
        packing.begin(2, 1);
        packing.put(&(800..801), 2);
        packing.take();
        assert_eq!(packing.room(&(800..801), 2), Room::Elsewhere);
        assert_eq!(packing.room(&(800..801), 1), Room::Here);
        assert_eq!(packing.clusters_for(&(800..809)), 2);
    }
}
