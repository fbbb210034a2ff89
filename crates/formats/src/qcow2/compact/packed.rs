//! Moving compressed data.
//!
//! A "piece" is the compressed data of one guest cluster.
//!
//! Several pieces can share a host cluster, and a piece may span several host clusters. So a batch of clusters at the end
//! of the file becomes free only if all pieces that touch the batch move. This includes pieces that begin in a cluster in
//! front of the batch. The cluster in front of the batch then loses a reference.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use oxblk_core::{Result, WriteFlags, run_all};
use oxblk_ring::IoBufMut;

use super::super::clusters::ReleaseReason;
use super::super::clusters::Reserved;
use super::super::layout::{Geometry, L2Entry};
use super::Compaction;
use super::changes::Changes;
use super::packing::{Fit, Packing, SECTOR, Span};
use super::referrers::{EntryAt, references};

/// Maximum number of bytes of the clusters that are freed in one batch.
const AT_ONCE: u64 = 4 << 20;
/// Maximum number of sectors that are copied with one read and one write.
const MAX_COPY_SECTORS: u64 = (256 << 10) / SECTOR;
/// Maximum number of concurrent copies.
const MAX_COPIES: usize = 16;

/// The compressed data of one guest cluster, as the L2 entry describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Piece {
    /// Byte offset in the file.
    pub(super) host: u64,
    /// Length in bytes, up to the end of the last sector.
    pub(super) len: u64,
}

/// Pieces, with the entries that refer to each of them.
pub(super) type Pieces = BTreeMap<Piece, Vec<EntryAt>>;

/// Clusters that cannot move, and the reason.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unmovable {
    /// The highest of these clusters.
    pub(super) cluster: u64,
    pub(super) reason: &'static str,
}

impl Piece {
    /// The host clusters that the piece touches.
    pub(super) fn clusters(&self, geometry: Geometry) -> Range<u64> {
        let end = self.host.saturating_add(self.len);
        geometry.cluster_index(self.host)..geometry.clusters_for(end)
    }

    fn sectors(&self) -> Range<u64> {
        self.host / SECTOR..self.host.saturating_add(self.len).div_ceil(SECTOR)
    }

    /// The L2 entry for the piece after the piece has moved to the sectors from `sector` on. `None` if an L2 entry cannot
    /// contain this offset.
    fn moved_to(&self, geometry: Geometry, sector: u64) -> Option<L2Entry> {
        let host = sector.checked_mul(SECTOR)?.checked_add(self.host % SECTOR)?;
        L2Entry::compressed(geometry, host, self.len)
    }
}

/// Removes and returns the pieces that lie completely or partly in clusters from `lowest` on.
fn take_pieces_from(
    pieces: &mut Pieces,
    lowest: u64,
    geometry: Geometry,
) -> Vec<(Piece, Vec<EntryAt>)> {
    // No piece is longer than two clusters, so earlier pieces cannot reach `lowest`.
    let start = lowest.saturating_sub(2) << geometry.cluster_bits;
    let from = Piece { host: start, len: 0 };
    let reach = |piece: &&Piece| piece.clusters(geometry).end > lowest;
    let taken: Vec<Piece> =
        pieces.range(from..).map(|(piece, _)| piece).filter(reach).copied().collect();
    taken.into_iter().filter_map(|piece| pieces.remove_entry(&piece)).collect()
}

impl Compaction<'_> {
    /// Moves the pieces in `clusters` (last first) if all references to the pieces are known. Returns the clusters that
    /// stay, if any. `pieces` contains every piece that touches `clusters`.
    pub(super) async fn move_packed<'a>(
        &'a self,
        clusters: &[u64],
        pieces: &mut Pieces,
        changes: &mut Changes<'a>,
    ) -> Result<Option<Unmovable>> {
        let mut at_once =
            usize::try_from(AT_ONCE / self.geometry.cluster_size()).unwrap_or(1).max(1);
        let per_cluster = self.geometry.cluster_size() / SECTOR;
        let mut packing = Packing::new(per_cluster, self.clusters.max_refcount());
        let mut rest = clusters;
        while let Some((batch, behind)) = rest.split_at_checked(at_once.min(rest.len())) {
            let (Some(highest), Some(lowest)) = (batch.first(), batch.last()) else { break };
            let taken = take_pieces_from(pieces, *lowest, self.geometry);
            let unmovable = |reason| Ok(Some(Unmovable { cluster: *highest, reason }));
            if !self.are_counted(&taken, clusters).await? {
                return unmovable("compressed data that is not counted: the image needs a check");
            }
            let before = packing.clone();
            if self.move_pieces(&mut packing, &taken, *lowest, changes).await? {
                changes.note_free(u64::try_from(batch.len()).unwrap_or(0));
                rest = behind;
            } else if batch.len() == 1 {
                return unmovable("compressed data for which there is no room in front of it");
            } else {
                // Try a smaller batch: there may be space for a part of the pieces.
                packing = before;
                pieces.extend(taken);
                at_once = batch.len() / 2;
            }
        }
        Ok(None)
    }

    /// Whether the refcounts of clusters outside `known` (last first) are high enough for the references that these
    /// pieces drop.
    async fn are_counted(&self, pieces: &[(Piece, Vec<EntryAt>)], known: &[u64]) -> Result<bool> {
        let mut others: HashMap<u64, u64> = HashMap::new();
        for (piece, entries) in pieces {
            for cluster in piece.clusters(self.geometry) {
                if known.binary_search_by(|one| cluster.cmp(one)).is_err() {
                    let count = others.entry(cluster).or_default();
                    *count = count.saturating_add(references(entries));
                }
            }
        }
        for (cluster, lost) in others {
            if self.clusters.get(cluster).await? < lost {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Copies all pieces to new clusters in front of `limit`, and returns `true`. If there is not enough space for all pieces,
    /// copies none and returns `false`. The caller then restores `packing`.
    async fn move_pieces<'a>(
        &'a self,
        packing: &mut Packing,
        pieces: &[(Piece, Vec<EntryAt>)],
        limit: u64,
        changes: &mut Changes<'a>,
    ) -> Result<bool> {
        if packing.end() > limit {
            packing.close();
        }
        let (mut runs, mut entries) = (Vec::new(), Vec::with_capacity(pieces.len()));
        for (piece, at) in pieces {
            if !self.make_room(packing, &mut runs, piece, references(at), limit).await? {
                return Ok(false);
            }
            let sector = packing.put(&piece.sectors(), references(at));
            let Some(entry) = piece.moved_to(self.geometry, sector) else { return Ok(false) };
            entries.push(entry);
        }
        runs.iter_mut().for_each(Reserved::begin_write);
        let (spans, counts) = packing.take();
        self.copy_sectors(&spans).await?;
        self.count_packed(runs, counts, changes).await?;
        for ((piece, at), entry) in pieces.iter().zip(entries) {
            let clusters = piece.clusters(self.geometry);
            changes.add(at, entry, clusters.start, clusters.end.saturating_sub(clusters.start));
        }
        Ok(true)
    }

    /// Adds the references to the clusters to which pieces were copied. Clusters that are not in `runs` already have a
    /// refcount, because these clusters contain earlier pieces.
    async fn count_packed<'a>(
        &'a self,
        runs: Vec<Reserved<'a>>,
        counts: BTreeMap<u64, u64>,
        changes: &mut Changes<'a>,
    ) -> Result<()> {
        let mut new: BTreeMap<u64, Reserved<'a>> = BTreeMap::new();
        for mut run in runs {
            while run.count() > 0 {
                new.insert(run.start(), run.split_first(1));
            }
        }
        for (cluster, mut times) in counts {
            if let Some(run) = new.remove(&cluster) {
                changes.own_references(self.clusters.count(run, ReleaseReason::Data).await?);
                times = times.saturating_sub(1);
            }
            changes.own_references(
                self.clusters.count_again(cluster, times, ReleaseReason::Data).await?,
            );
        }
        Ok(())
    }

    /// Reserves clusters in front of `limit` for a piece, if the current clusters have no space for it. Returns whether
    /// the piece has space now.
    async fn make_room<'a>(
        &'a self,
        packing: &mut Packing,
        runs: &mut Vec<Reserved<'a>>,
        piece: &Piece,
        references: u64,
        limit: u64,
    ) -> Result<bool> {
        let sectors = piece.sectors();
        let fit = packing.fit(&sectors, references);
        if fit == Fit::Here {
            return Ok(true);
        }
        if let Fit::Behind(count) = fit {
            self.clusters.rewind();
            let run = self.clusters.reserve(count).await?;
            let follows = run.start() == packing.end() && run.count() == count;
            if follows && run.start().saturating_add(count) <= limit {
                packing.extend(count);
                runs.push(run);
                return Ok(true);
            }
            run.give_back();
        }
        let count = packing.clusters_for(&sectors);
        self.clusters.rewind();
        let run = self.clusters.reserve_contiguous(count).await?;
        if run.start().saturating_add(count) > limit {
            run.give_back();
            return Ok(false);
        }
        packing.begin(run.start(), count);
        runs.push(run);
        Ok(true)
    }

    async fn copy_sectors(&self, spans: &[Span]) -> Result<()> {
        let file = self.image_state.file()?;
        let parts = spans.iter().flat_map(|span| {
            (0..span.len.div_ceil(MAX_COPY_SECTORS)).map(move |part| {
                let skipped = part.saturating_mul(MAX_COPY_SECTORS);
                let len = span.len.saturating_sub(skipped).min(MAX_COPY_SECTORS);
                (span.from.saturating_add(skipped), span.to.saturating_add(skipped), len)
            })
        });
        let mut copies = parts.map(|(from, to, len)| {
            let file = &file;
            async move {
                let bytes = usize::try_from(len.saturating_mul(SECTOR)).unwrap_or(0);
                let data =
                    file.read(from.saturating_mul(SECTOR), IoBufMut::new(bytes)).await?.freeze();
                file.write(to.saturating_mul(SECTOR), data, WriteFlags::empty()).await
            }
        });
        loop {
            let some: Vec<_> = copies.by_ref().take(MAX_COPIES).collect();
            if some.is_empty() {
                return Ok(());
            }
            run_all(some).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry =
        Geometry { cluster_bits: 12, refcount_order: 4, extended_l2: false, data_file: false };

    #[test]
    fn a_moved_piece_keeps_its_offset_in_the_sector_and_its_length() {
        let old = L2Entry::compressed(GEOMETRY, 0x7f0a, 700).unwrap();
        let (host, len) = old.compressed_extent(GEOMETRY);
        let piece = Piece { host, len };
        assert_eq!((piece.clusters(GEOMETRY), piece.sectors()), (7..9, 0x3f..0x41));
        let new = piece.moved_to(GEOMETRY, 0x10).unwrap().compressed_extent(GEOMETRY);
        assert_eq!(new, (0x210a, len));
    }

    #[test]
    fn all_pieces_that_reach_into_the_clusters_are_taken() {
        let piece = |host, len| Piece { host, len };
        let all = [piece(0x1000, 0x400), piece(0x1e00, 0x200), piece(0x1f00, 0x300)];
        let all = all.into_iter().chain([piece(0x0e00, 0x1400), piece(0x3000, 0x200)]);
        let mut pieces: Pieces = all.map(|piece| (piece, Vec::new())).collect();
        let taken = take_pieces_from(&mut pieces, 2, GEOMETRY);
        let taken: Vec<u64> = taken.iter().map(|(piece, _)| piece.host).collect();
        assert_eq!(taken, [0x0e00, 0x1f00, 0x3000]);
        assert_eq!(pieces.len(), 2);
    }
}
