//! What an L1 table refers to: L2 tables, and what their entries refer to.
//!
//! A cluster's refcount counts every L1 table by way of which it is reached, also where they share an L2 table. So taking
//! a snapshot raises, and removing one lowers, the refcounts of all clusters that its L1 table reaches.

use futures_util::stream::{self, Stream, StreamExt as _};
use oxblk_core::{ChildIdx, Error, Result};
use oxblk_ring::IoBufMut;

use super::super::Qcow2;
use super::super::layout::{L1Entry, L2Entry, L2Kind, l2_table};
use super::super::write_back::Was;

/// Bytes of L2 tables that are read ahead.
const READ_AHEAD: u64 = 4 << 20;

/// Host clusters that lie together: the first, and how many.
type Run = (u64, u64);

impl Qcow2 {
    /// The L1 table of the active state.
    pub(super) fn active_l1(&self) -> Vec<L1Entry> {
        (0..self.l1_entries()).map(|index| self.l1_entry(index)).collect()
    }

    /// Reads an L1 table.
    pub(super) async fn read_inactive_l1(&self, offset: u64, entries: u32) -> Result<Vec<L1Entry>> {
        let len = usize::try_from(u64::from(entries).saturating_mul(8)).unwrap_or(usize::MAX);
        let file = self.children.require(ChildIdx::FILE)?;
        let table = file.read(offset, IoBufMut::new(len)).await?;
        let words = table.chunks_exact(8);
        Ok(words.map(|word| L1Entry(word.try_into().map_or(0, u64::from_be_bytes))).collect())
    }

    /// The L2 tables of an L1 table, in its order: index in the L1 table, offset in the file, entries.
    pub(super) fn l2_tables(
        &self,
        l1: &[L1Entry],
    ) -> impl Stream<Item = Result<(u64, u64, Vec<L2Entry>)>> {
        let places: Vec<Result<(u64, u64)>> = (0_u64..)
            .zip(l1)
            .filter_map(|(index, entry)| match entry.l2_offset(self.geometry) {
                Ok(offset) => offset.map(|offset| Ok((index, offset))),
                Err(_) => Some(Err(Error::corrupt("L2 table offset unaligned").at(entry.0))),
            })
            .collect();
        let size = self.geometry.cluster_size();
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        let at_once = usize::try_from(READ_AHEAD / size).unwrap_or(1).clamp(2, 64);
        stream::iter(places)
            .map(move |place| async move {
                let (index, offset) = place?;
                let file = self.children.require(ChildIdx::FILE)?;
                let table = file.read(offset, IoBufMut::new(len)).await?;
                let entries = l2_table(&table, self.geometry).map(|both| both.entry).collect();
                Ok((index, offset, entries))
            })
            .buffered(at_once)
    }

    /// Raises the refcounts of everything that an L1 table reaches. If that fails, it is undone.
    pub(super) async fn raise(&self, l1: &[L1Entry]) -> Result<()> {
        let mut raised = Vec::new();
        let outcome = self.raise_noting(l1, &mut raised).await;
        if outcome.is_err() {
            for (cluster, count) in raised {
                self.drop_clusters(cluster, count, Was::Data);
            }
        }
        outcome
    }

    async fn raise_noting(&self, l1: &[L1Entry], raised: &mut Vec<Run>) -> Result<()> {
        let mut tables = Box::pin(self.l2_tables(l1));
        while let Some(table) = tables.next().await {
            let (_, offset, entries) = table?;
            let own = (offset >> self.geometry.cluster_bits, 1);
            for (cluster, count) in self.runs(&entries)?.into_iter().chain([own]) {
                // One by one where they may not fit: what has been raised must be known.
                let step = if self.geometry.refcount_bits() < 16 { 1 } else { count };
                let mut at = 0;
                while at < count {
                    self.refcounts.add(cluster.saturating_add(at), step).await.map_err(too_many)?;
                    raised.push((cluster.saturating_add(at), step));
                    at = at.saturating_add(step);
                }
            }
        }
        Ok(())
    }

    /// Drops the references of everything that an L1 table reaches, and those to its own clusters at `offset`.
    pub(super) async fn drop_l1(&self, l1: &[L1Entry], offset: u64) -> Result<()> {
        self.drop_reach(l1).await?;
        let bytes = u64::try_from(l1.len()).unwrap_or(0).saturating_mul(8);
        if bytes > 0 {
            let clusters = self.geometry.clusters_for(bytes);
            self.drop_clusters(offset >> self.geometry.cluster_bits, clusters, Was::Table);
        }
        Ok(())
    }

    /// Drops the references of everything that an L1 table reaches, but not those to the table.
    pub(super) async fn drop_reach(&self, l1: &[L1Entry]) -> Result<()> {
        let mut tables = Box::pin(self.l2_tables(l1));
        while let Some(table) = tables.next().await {
            let (_, offset, entries) = table?;
            self.drop_entries(&entries, Was::Discarded);
            self.drop_clusters(self.geometry.cluster_index(offset), 1, Was::Table);
            self.relieve().await?;
        }
        Ok(())
    }

    /// The clusters that the entries of an L2 table refer to, joined where they lie together.
    fn runs(&self, entries: &[L2Entry]) -> Result<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        for entry in entries {
            let (host, bytes) = match entry.kind(self.geometry, self.version) {
                Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) => {
                    (host, self.geometry.cluster_size())
                }
                Ok(L2Kind::Compressed { host, len }) => (host, len),
                Ok(_) => continue,
                Err(_) => return Err(Error::corrupt("L2 entry is invalid").at(entry.0)),
            };
            let first = self.geometry.cluster_index(host);
            let count =
                self.geometry.clusters_for(host.saturating_add(bytes)).saturating_sub(first);
            match runs.last_mut() {
                Some((start, joined)) if start.saturating_add(*joined) == first => {
                    *joined = joined.saturating_add(count);
                }
                _ => runs.push((first, count)),
            }
        }
        Ok(runs)
    }
}

fn too_many(error: Error) -> Error {
    match error.kind() {
        oxblk_core::ErrorKind::Corrupt => Error::from_errno(22),
        _ => error,
    }
}
