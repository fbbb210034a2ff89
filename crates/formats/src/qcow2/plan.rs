//! The layout of a new image, and the contents of its tables.
//!
//! A new image is `header | refcount table | refcount blocks | L1 table`. If the image is preallocated, the L2 tables
//! follow, each with the data clusters that it maps directly behind it. With a data file, the data clusters are in the data
//! file. The LUKS header comes last. The refcounts cover the finished image, including the refcount blocks themselves, so
//! each refcount block is written only once.

use oxblk_core::{Errno, Error, Preallocation, Result};
use oxblk_ring::IoBufMut;

use super::layout::{
    CryptoHeader, Geometry, L2Entry, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, refcount_set,
};

/// The layout of a new image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// Sizes of clusters and entries.
    pub(super) geometry: Geometry,
    /// Number of clusters of the refcount table.
    pub(super) table_clusters: u32,
    /// Number of refcount blocks.
    pub(super) blocks: u64,
    /// Offset of the L1 table.
    pub(super) l1_offset: u64,
    /// Number of entries in the L1 table.
    pub(super) l1_entries: u32,
    /// Offset behind the L1 table. If the image is preallocated, the first L2 table is there.
    pub(super) l2_offset: u64,
    /// The LUKS header: the last part of the image.
    pub(super) crypto: Option<CryptoHeader>,
    /// Number of preallocated guest clusters.
    pub(super) data_clusters: u64,
    /// Number of clusters in the image file.
    pub(super) clusters: u64,
}

impl Plan {
    /// The layout of a new image of `size` bytes with a LUKS header of `luks` bytes (0: without one).
    ///
    /// # Errors
    /// `EFBIG` if the L1 table or the refcount table would be too large.
    pub(super) fn new(
        geometry: Geometry,
        size: u64,
        preallocation: Preallocation,
        luks: u64,
    ) -> Result<Self> {
        let l1_entries = geometry
            .l1_entries_for(size)
            .filter(|entries| *entries <= MAX_L1_BYTES / 8)
            .ok_or_else(too_large)?;
        let l1_clusters = geometry.clusters_for(l1_entries * 8);
        let (l2_tables, data_clusters) = match preallocation {
            Preallocation::Off => (0, 0),
            _ => (l1_entries, geometry.clusters_for(size)),
        };
        let luks_clusters = geometry.clusters_for(luks);
        let within = if geometry.data_file { 0 } else { data_clusters };
        let content = l1_clusters + luks_clusters + l2_tables + within;
        let Counted { table_clusters, blocks, clusters } = Counted::new(geometry, content);
        if table_clusters * geometry.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
            return Err(too_large());
        }
        let cluster_size = geometry.cluster_size();
        let l1_offset = (1 + table_clusters + blocks) * cluster_size;
        let content_end = (clusters - luks_clusters) * cluster_size;
        Ok(Self {
            geometry,
            table_clusters: u32::try_from(table_clusters).map_err(|_| too_large())?,
            blocks,
            l1_offset,
            l1_entries: u32::try_from(l1_entries).map_err(|_| too_large())?,
            crypto: (luks > 0).then_some(CryptoHeader { offset: content_end, length: luks }),
            l2_offset: l1_offset + l1_clusters * cluster_size,
            data_clusters,
            clusters,
        })
    }

    /// Offset of the refcount block at `index`.
    pub(super) fn block_offset(&self, index: u64) -> u64 {
        (1 + u64::from(self.table_clusters) + index) * self.geometry.cluster_size()
    }

    /// Offset of the L2 table at `index`. The clusters that this table maps follow the table, unless they are in a data
    /// file.
    pub(super) fn table_offset(&self, index: u64) -> u64 {
        let mapped = if self.geometry.data_file { 0 } else { self.geometry.l2_entries() };
        self.l2_offset + index * (mapped + 1) * self.geometry.cluster_size()
    }

    /// Number of preallocated L2 tables.
    pub(super) fn l2_tables(&self) -> u64 {
        self.data_clusters.div_ceil(self.geometry.l2_entries())
    }

    /// A cluster of zeroes.
    pub(super) fn cluster(&self) -> Result<IoBufMut> {
        let len = usize::try_from(self.geometry.cluster_size()).map_err(|_| too_large())?;
        Ok(IoBufMut::zeroed(len))
    }

    /// The refcount table, in whole clusters.
    pub(super) fn refcount_table(&self) -> Result<IoBufMut> {
        let len = u64::from(self.table_clusters) * self.geometry.cluster_size();
        let mut table = IoBufMut::zeroed(usize::try_from(len).map_err(|_| too_large())?);
        put_entries(&mut table, (0..self.blocks).map(|index| self.block_offset(index)));
        Ok(table)
    }

    /// The refcount block at `index`. Each cluster of the image has a refcount of 1.
    pub(super) fn refcount_block(&self, index: u64) -> Result<IoBufMut> {
        let per_block = self.geometry.refcounts_per_block();
        let used = self.clusters.saturating_sub(index * per_block).min(per_block);
        let mut block = self.cluster()?;
        for refcount in 0..used {
            refcount_set(&mut block, refcount, self.geometry.refcount_order, 1)
                .map_err(|error| Error::corrupt(error.to_string()))?;
        }
        Ok(block)
    }

    /// The preallocated L2 table at `index`. With `zero`, its entries are zero entries with a preallocated cluster. So
    /// these clusters read as zeroes, regardless of their contents. With extended L2 entries, `zero` has no effect.
    pub(super) fn l2_table(&self, index: u64, zero: bool) -> Result<IoBufMut> {
        let (cluster_size, entries) = (self.geometry.cluster_size(), self.geometry.l2_entries());
        let used = self.data_clusters.saturating_sub(index * entries).min(entries);
        let first = match self.geometry.data_file {
            true => index * entries * cluster_size,
            false => self.table_offset(index) + cluster_size,
        };
        let mut table = self.cluster()?;
        // With extended L2 entries, all subclusters stay unallocated and are read from the backing file.
        let stride = usize::try_from(self.geometry.l2_entry_words()).unwrap_or(1);
        let kind = match zero && !self.geometry.extended_l2 {
            true => L2Entry::zero_allocated,
            false => L2Entry::data,
        };
        let places = (0..used).map(|entry| kind(first + entry * cluster_size).0);
        for (to, entry) in table.chunks_exact_mut(8).step_by(stride).zip(places) {
            to.copy_from_slice(&entry.to_be_bytes());
        }
        Ok(table)
    }
}

/// Writes entries as big-endian words into a table.
pub(super) fn put_entries(table: &mut [u8], entries: impl Iterator<Item = u64>) {
    for (to, entry) in table.chunks_exact_mut(8).zip(entries) {
        to.copy_from_slice(&entry.to_be_bytes());
    }
}

/// Number of refcount clusters for all clusters of an image, including the refcount clusters themselves.
struct Counted {
    table_clusters: u64,
    blocks: u64,
    /// Clusters of the image, including the header and the refcount clusters.
    clusters: u64,
}

impl Counted {
    fn new(geometry: Geometry, content: u64) -> Self {
        let (mut table_clusters, mut blocks) = (1, 1);
        // Each round counts the refcount clusters that the previous round added. The loop ends when nothing is added.
        loop {
            let clusters = 1 + table_clusters + blocks + content;
            let needed = clusters.div_ceil(geometry.refcounts_per_block());
            let table = geometry.clusters_for(needed * 8);
            if (table, needed) == (table_clusters, blocks) {
                return Self { table_clusters, blocks, clusters };
            }
            (table_clusters, blocks) = (table, needed);
        }
    }
}

/// File size of an image of `size` bytes whose clusters are all allocated. Does not check the limit of the refcount table.
/// `None` if the L1 table would be too large, or if the file size overflows.
pub(super) fn fully_allocated(geometry: Geometry, size: u64) -> Option<u64> {
    let l1_entries =
        geometry.l1_entries_for(size).filter(|entries| *entries <= MAX_L1_BYTES / 8)?;
    let l1_clusters = geometry.clusters_for(l1_entries * 8);
    let content = l1_clusters + l1_entries + geometry.clusters_for(size);
    Counted::new(geometry, content).clusters.checked_mul(geometry.cluster_size())
}

pub(super) fn too_large() -> Error {
    Error::invalid(
        "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
    )
    .errno(Errno::FBIG)
}
