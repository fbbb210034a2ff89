//! Refcounts: reading and changing them, in cached refcount blocks and on disk.
//!
//! Refcounts are changed in the cache only ([`Refcounts::add`], [`Refcounts::drop_one`]) and reach the disk with
//! [`Refcounts::write_back`]. They may be written at any time: an increment is made before its reference is written, and a
//! decrement only after the reference is gone from the disk. So refcounts on disk are never too low (except with lazy
//! refcounts, which mark the image dirty).
//!
//! This module makes new refcount blocks, and `table` makes a larger refcount table. Each step is durable before the next step
//! refers to it.
//!
//! Spec: docs/interop/qcow2, "Host cluster management".

mod census;
mod table;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{AcqRel, Acquire, Release},
};

use oxblk_core::{ChildIdx, ChildrenRef, Edge, Epochs, Errno, Error, Result, WriteFlags, run_all};
use oxblk_ring::perturb::point;
use oxblk_ring::{IoBuf, IoBufMut, Mutex as AsyncMutex, MutexGuard};

use super::allocator::{Allocator, Reserved};
use super::cache::{DirtyCopy, Pinned, Radix, SliceCache};
use super::dropped::{DroppedList, ReleaseReason};
use super::header::exchange;
use super::layout::{Geometry, Header, RefcountTableEntry, refcount_set};
use super::run_options::Modes;
use crate::write_barrier::WriteBarrier;

/// A file that cannot grow is nearly full if it has fewer free clusters than this, or fewer than a sixteenth of its clusters.
const FEW_FREE: u64 = 4096;

/// The refcounts of an image.
pub(super) struct Refcounts {
    pub(super) geometry: Geometry,
    children: ChildrenRef,
    pub(super) table: Radix<AtomicU64>,
    table_offset: AtomicU64,
    table_entries: AtomicU64,
    cache: Arc<SliceCache>,
    slice_bytes: u64,
    growing: AsyncMutex<()>,
    writing: AsyncMutex<()>,
    barrier: WriteBarrier,
    /// Set when a pointer on disk is in an unknown state (see `header`).
    stop: Arc<AtomicBool>,
    pub(super) allocator: Allocator,
    /// References that are gone, and whose refcounts are lowered later.
    pub(super) dropped: DroppedList,
}

/// Where the refcount table lies.
pub(super) struct TablePlace {
    /// Byte offset in the file.
    pub(super) offset: u64,
    /// Length in clusters.
    pub(super) clusters: u64,
}

/// The position of a refcount: block, slice, word in the slice, shift in the word.
struct Place {
    block: u64,
    slice: u64,
    word: usize,
    shift: u32,
}

impl Refcounts {
    /// Reads the refcount table.
    pub(super) async fn open(
        geometry: Geometry,
        children: ChildrenRef,
        place: TablePlace,
        cache: Arc<SliceCache>,
        slice_bytes: u64,
        (epochs, stop): (Arc<Epochs>, Arc<AtomicBool>),
    ) -> Result<Self> {
        let bytes = place.clusters.saturating_mul(geometry.cluster_size());
        let file = children.require(ChildIdx::FILE)?;
        let refcounts = Self {
            geometry,
            table: Radix::default(),
            table_offset: AtomicU64::new(place.offset),
            table_entries: AtomicU64::new(bytes / 8),
            cache,
            slice_bytes,
            growing: AsyncMutex::new(()),
            writing: AsyncMutex::new(()),
            barrier: WriteBarrier::default(),
            stop,
            allocator: Allocator::new(geometry, &file, epochs),
            dropped: DroppedList::default(),
            children,
        };
        refcounts.read_table(&file, place.offset, bytes).await?;
        Ok(refcounts)
    }

    /// Replaces the refcount table in memory by the one that the header names. No refcount slice is dirty.
    pub(super) async fn reload(&self, header: &Header) -> Result<()> {
        for index in 0..self.table_entries.load(Acquire) {
            if let Some(entry) = self.table.get(index) {
                entry.store(0, Release);
            }
        }
        self.cache.clear();
        let clusters = u64::from(header.refcount_table_clusters);
        let bytes = clusters.saturating_mul(self.geometry.cluster_size());
        self.table_offset.store(header.refcount_table_offset, Release);
        self.table_entries.store(bytes / 8, Release);
        let file = self.file()?;
        self.read_table(&file, header.refcount_table_offset, bytes).await
    }

    async fn read_table(&self, file: &Edge, offset: u64, bytes: u64) -> Result<()> {
        self.allocator.note_metadata(offset, bytes);
        let len = usize::try_from(bytes).map_err(|_| Error::invalid("refcount table too large"))?;
        let table = file.read(offset, IoBufMut::new(len)).await?;
        for (index, word) in (0_u64..).zip(table.chunks_exact(8)) {
            let entry = word.try_into().map_or(0, u64::from_be_bytes);
            if entry != 0 {
                self.table.get_or_make(index).store(entry, Release);
                self.allocator.note_metadata(
                    RefcountTableEntry(entry).raw_offset(),
                    self.geometry.cluster_size(),
                );
            }
        }
        Ok(())
    }

    /// The cache of refcount blocks.
    pub(super) fn cache(&self) -> &Arc<SliceCache> {
        &self.cache
    }

    /// Whether the table has this offset and this size, and is the same on disk and in memory.
    pub(super) async fn is_as_on_disk(&self, offset: u64, clusters: u64) -> Result<bool> {
        let bytes = clusters.saturating_mul(self.geometry.cluster_size());
        if self.table_offset.load(Acquire) != offset
            || self.table_entries.load(Acquire) != bytes / 8
        {
            return Ok(false);
        }
        let len = usize::try_from(bytes).map_err(|_| Error::invalid("refcount table too large"))?;
        let table = self.file()?.read(offset, IoBufMut::new(len)).await?;
        let entries =
            table.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_be_bytes));
        Ok((0..).zip(entries).all(|(index, entry)| {
            self.table.get(index).map_or(0, |own| own.load(Acquire)) == entry
        }))
    }

    /// The current place of the table.
    pub(super) fn table_place(&self) -> TablePlace {
        let bytes = self.table_entries.load(Acquire).saturating_mul(8);
        TablePlace {
            offset: self.table_offset.load(Acquire),
            clusters: self.geometry.clusters_for(bytes),
        }
    }

    /// Takes the lock that prevents moving the table.
    pub(super) async fn hold_table(&self) -> MutexGuard<'_, ()> {
        self.growing.lock().await
    }

    pub(super) fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    fn place(&self, cluster: u64) -> Result<Place> {
        let bits = u64::from(self.geometry.refcount_bits());
        let per_slice = self.slice_bytes.saturating_mul(8) / bits;
        let slice = cluster / per_slice;
        if slice > u64::from(u32::MAX) {
            return Err(Error::corrupt("cluster offset out of range"));
        }
        let bit = (cluster % per_slice).saturating_mul(bits);
        let byte = bit / 8 % 8;
        let shift = if bits >= 8 { 64 - bits - byte * 8 } else { 56 - byte * 8 + bit % 8 };
        Ok(Place {
            block: cluster / self.geometry.refcounts_per_block(),
            slice,
            word: usize::try_from(bit / 64).unwrap_or(usize::MAX),
            shift: u32::try_from(shift).unwrap_or(0),
        })
    }

    /// The largest number of references that a cluster can have.
    pub(super) fn most(&self) -> u64 {
        self.mask()
    }

    fn mask(&self) -> u64 {
        u64::MAX >> (64 - self.geometry.refcount_bits())
    }

    /// Host offset of a refcount block, 0 if there is none.
    pub(super) fn block_offset(&self, block: u64) -> u64 {
        self.table
            .get(block)
            .map_or(0, |entry| RefcountTableEntry(entry.load(Acquire)).raw_offset())
    }

    /// The refcount blocks with these numbers, each as (number, offset).
    ///
    /// # Errors
    /// When a block is missing, is not aligned, or is listed under two numbers.
    pub(super) fn places_of(&self, blocks: Vec<u64>) -> Result<Vec<(u64, u64)>> {
        let place = |block| match self.block_offset(block) {
            0 => Err(Error::corrupt(format!("refcount block {block} is missing"))),
            offset if self.geometry.is_aligned(offset) => Ok((block, offset)),
            offset => Err(Error::corrupt(format!("refcount block {block} unaligned")).at(offset)),
        };
        let places = blocks.into_iter().map(place).collect::<Result<Vec<_>>>()?;
        let mut known = HashSet::with_capacity(places.len());
        match places.iter().find(|(_, offset)| !known.insert(*offset)) {
            Some((_, offset)) => {
                Err(Error::corrupt("refcount block is used twice: the image needs a check")
                    .at(*offset))
            }
            None => Ok(places),
        }
    }

    /// Pins the slice of a place. Returns `None` if its block does not exist.
    async fn slice(&self, place: &Place) -> Result<Option<Pinned<'_>>> {
        let base = self.block_offset(place.block);
        if base == 0 {
            return Ok(None);
        }
        if !base.is_multiple_of(self.geometry.cluster_size()) {
            return Err(Error::corrupt(format!(
                "Refblock offset {base:#x} unaligned (reftable index: {:#x})",
                place.block
            )));
        }
        let slices_per_block = self.geometry.cluster_size() / self.slice_bytes;
        let offset =
            base.saturating_add((place.slice % slices_per_block).saturating_mul(self.slice_bytes));
        let len = usize::try_from(self.slice_bytes).unwrap_or(0);
        let file = self.file()?;
        loop {
            let load = || {
                let file = Arc::clone(&file);
                async move { file.read(offset, IoBufMut::new(len)).await }
            };
            if let Some(pinned) = self.cache.get(place.slice, load).await? {
                return Ok(Some(pinned));
            }
            self.write_back().await?;
        }
    }

    /// Adds one reference to a host cluster if the cluster is in use and its refcount is below the maximum. Returns whether it
    /// added one.
    pub(super) async fn share(&self, cluster: u64) -> Result<bool> {
        let place = self.place(cluster)?;
        let Some(slice) = self.slice(&place).await? else { return Ok(false) };
        let word =
            slice.words().get(place.word).ok_or_else(|| Error::corrupt("refcount out of range"))?;
        let mask = self.mask();
        let shared = word.fetch_update(AcqRel, Acquire, |word| {
            let count = (word >> place.shift) & mask;
            (count > 0 && count < mask).then(|| word + (1 << place.shift))
        });
        point();
        if shared.is_ok() {
            slice.mark_dirty();
        }
        Ok(shared.is_ok())
    }

    /// Adds one reference to each host cluster from `*at` up to `end`, and advances `*at`. If this fails or is cancelled,
    /// exactly the clusters before `*at` have been counted.
    pub(super) async fn add_up_to(&self, at: &mut u64, end: u64) -> Result<()> {
        while *at < end {
            let place = self.place(*at)?;
            let Some(slice) = self.slice(&place).await? else {
                self.make_block(place.block).await?;
                continue;
            };
            let first = place.slice;
            while *at < end {
                let place = self.place(*at)?;
                if place.slice != first {
                    break;
                }
                if let Err(error) = self.change(&slice, &place, 1) {
                    slice.mark_dirty();
                    return Err(error);
                }
                *at = at.saturating_add(1);
            }
            point();
            slice.mark_dirty();
        }
        Ok(())
    }

    /// The refcount of a host cluster.
    pub(super) async fn get(&self, cluster: u64) -> Result<u64> {
        let place = self.place(cluster)?;
        let Some(slice) = self.slice(&place).await? else { return Ok(0) };
        let word = slice.words().get(place.word).map_or(0, |word| word.load(Acquire));
        Ok((word >> place.shift) & self.mask())
    }

    /// Removes one reference from a host cluster and returns the number that is left.
    pub(super) async fn drop_one(&self, cluster: u64) -> Result<u64> {
        let place = self.place(cluster)?;
        let Some(slice) = self.slice(&place).await? else {
            return Err(Error::corrupt(format!("cluster {cluster} has no refcount to drop")));
        };
        let left = self.change(&slice, &place, -1)?;
        point();
        slice.mark_dirty();
        Ok(left)
    }

    fn change(&self, slice: &Pinned<'_>, place: &Place, by: i64) -> Result<u64> {
        let mask = self.mask();
        let word =
            slice.words().get(place.word).ok_or_else(|| Error::corrupt("refcount out of range"))?;
        let mut now = 0;
        let changed = word.fetch_update(AcqRel, Acquire, |word| {
            let count = (word >> place.shift) & mask;
            now = count.checked_add_signed(by).filter(|count| *count <= mask)?;
            Some((word & !(mask << place.shift)) | (now << place.shift))
        });
        match changed {
            Ok(_) => Ok(now),
            Err(_) => Err(Error::corrupt("refcount out of bounds")),
        }
    }

    /// Writes all dirty refcounts to the file. They are durable after the file's next flush.
    pub(super) async fn write_back(&self) -> Result<()> {
        // Two writes of one slice must not be reordered.
        let _turn = self.writing.lock().await;
        let copies = self.cache.take_dirty();
        if copies.is_empty() {
            return Ok(());
        }
        if self.stop.load(Acquire) {
            // The blocks on disk may not be those that the table in memory names.
            return Err(Error::from_errno(Errno::IO));
        }
        let file = self.file()?;
        let slices_per_block = self.geometry.cluster_size() / self.slice_bytes;
        let base_of = |copy: &DirtyCopy<'_>| self.block_offset(copy.slice / slices_per_block);
        for copy in &copies {
            let cluster = self.geometry.cluster_index(base_of(copy));
            let clusters = cluster..cluster.saturating_add(1);
            self.allocator.overlaps.check(Modes::REFCOUNT_BLOCK, clusters)?;
        }
        let writes = copies.iter().map(|copy| {
            let base = base_of(copy);
            let within = (copy.slice % slices_per_block).saturating_mul(self.slice_bytes);
            file.write(
                base.saturating_add(within),
                IoBuf::from(copy.bytes.clone()),
                WriteFlags::empty(),
            )
        });
        let writing = self.barrier.pass().await;
        let outcome = run_all(writes).await;
        writing.done();
        outcome?;
        copies.into_iter().for_each(DirtyCopy::written);
        Ok(())
    }

    /// The first cluster behind the end of a file that cannot grow.
    fn limit(&self) -> Result<u64> {
        let file = self.file()?;
        Ok(match file.node().limits().grows {
            true => u64::MAX,
            false => self.geometry.cluster_index(file.size()),
        })
    }

    /// Whether the file cannot grow and has few free clusters. Scans refcount blocks until it has found enough of them.
    pub(super) async fn is_nearly_full(&self) -> Result<bool> {
        let limit = self.limit()?;
        if limit == u64::MAX {
            return Ok(false);
        }
        let few = FEW_FREE.min(limit.div_ceil(16));
        while !self.allocator.has_free(few, limit) {
            if self.allocator.scanned() >= limit {
                return Ok(true);
            }
            self.scan_next(0).await?;
        }
        Ok(false)
    }

    /// Reserves host clusters with `take`. The argument of `take` is the cluster before which the reserved run must end. If the
    /// file cannot grow, this uses the gaps that the search has skipped before it uses clusters behind the end of the file.
    async fn reserve_with<'a>(
        &'a self,
        take: impl Fn(u64) -> Result<Option<Reserved<'a>>>,
    ) -> Result<Reserved<'a>> {
        let mut limit = self.limit()?;
        loop {
            if let Some(reserved) = take(limit)? {
                point();
                return Ok(reserved);
            }
            if self.allocator.scanned() < limit {
                self.scan_next(0).await?;
                continue;
            }
            self.allocator.rewind();
            if let Some(reserved) = take(limit)? {
                point();
                return Ok(reserved);
            }
            limit = u64::MAX;
        }
    }

    /// Reserves up to `count` contiguous host clusters, and at least one. Uses the first run that the search finds, even if it
    /// is shorter.
    pub(super) async fn reserve(&self, count: u64) -> Result<Reserved<'_>> {
        self.reserve_with(|limit| self.allocator.take(count, limit)).await
    }

    /// Reserves exactly `count` contiguous host clusters.
    pub(super) async fn reserve_contiguous(&self, count: u64) -> Result<Reserved<'_>> {
        self.reserve_with(|limit| self.allocator.take_contiguous(count, limit)).await
    }

    /// Reserves up to `count` contiguous host clusters, preferably from `behind` on, so that data is contiguous. If cluster
    /// `behind` is free, takes the free clusters from there, even if they are fewer. Otherwise takes a run of `count` clusters.
    /// Takes a shorter run only if the file cannot grow and has no such run.
    pub(super) async fn reserve_run_behind(
        &self,
        behind: Option<u64>,
        count: u64,
    ) -> Result<Reserved<'_>> {
        let limit = self.limit()?;
        // The number comes from an L2 entry. A cluster far behind the end of the file is no place for data.
        let end = self.geometry.cluster_index(self.file()?.size()).saturating_add(1);
        if let Some(start) = behind.filter(|start| *start <= end) {
            let count = count.min(limit.saturating_sub(start));
            self.scan_up_to(start.saturating_add(count)).await?;
            if let Some(reserved) = self.allocator.take_from(start, count)? {
                point();
                return Ok(reserved);
            }
        }
        loop {
            if let Some(reserved) = self.allocator.take_contiguous(count, limit)? {
                point();
                return Ok(reserved);
            }
            if self.allocator.scanned() >= limit {
                self.allocator.rewind();
                return self.reserve(count).await;
            }
            self.scan_next(0).await?;
        }
    }

    /// Scans the next refcount block and reports its free clusters to the allocator. Blocks that do not exist are scanned
    /// together, up to the one of cluster `reach`.
    async fn scan_next(&self, reach: u64) -> Result<()> {
        let _turn = self.allocator.scanning.lock().await;
        let per_block = self.geometry.refcounts_per_block();
        let start = self.allocator.scanned();
        let block = start / per_block;
        let base = self.block_offset(block);
        let last = if base == 0 { self.last_missing(block, reach / per_block) } else { block };
        let end = last.saturating_add(1).saturating_mul(per_block);
        if end > 1 << (56 - self.geometry.cluster_bits) {
            return Err(Error::from_errno(Errno::FBIG));
        }
        if base == 0 {
            self.allocator.found(start, end, vec![(start, end)]);
            return Ok(());
        }
        let mut free: Vec<(u64, u64)> = Vec::new();
        let mut at = start;
        while at < end {
            let place = self.place(at)?;
            let Some(slice) = self.slice(&place).await? else { break };
            let (first, mask) = (place.slice, self.mask());
            while at < end {
                let place = self.place(at)?;
                if place.slice != first {
                    break;
                }
                let word = slice.words().get(place.word).map_or(0, |word| word.load(Acquire));
                if (word >> place.shift) & mask == 0 {
                    match free.last_mut() {
                        Some((_, last)) if *last == at => *last = at.saturating_add(1),
                        _ => free.push((at, at.saturating_add(1))),
                    }
                }
                at = at.saturating_add(1);
            }
        }
        self.allocator.found(start, end, free);
        Ok(())
    }

    /// The last of the contiguous blocks from `block` to `reach` that do not exist. `block` does not exist.
    fn last_missing(&self, block: u64, reach: u64) -> u64 {
        let next = block.saturating_add(1);
        let end = self.table_entries.load(Acquire).min(reach.saturating_add(1));
        match (next..end).find(|block| self.block_offset(*block) != 0) {
            Some(existing) => existing.saturating_sub(1),
            None => reach.max(block),
        }
    }

    /// Scans refcount blocks until all clusters before `cluster` have been scanned.
    pub(super) async fn scan_up_to(&self, cluster: u64) -> Result<()> {
        while self.allocator.scanned() < cluster {
            self.scan_next(cluster).await?;
        }
        Ok(())
    }

    /// The numbers of all existing refcount blocks.
    pub(super) fn blocks(&self) -> Vec<u64> {
        let entries = self.table_entries.load(Acquire);
        (0..entries).filter(|block| self.block_offset(*block) != 0).collect()
    }

    /// Creates the missing refcount blocks for `count` host clusters from `cluster` on. Returns whether the refcount table has
    /// moved, which freed the clusters of the old table.
    pub(super) async fn ensure_blocks(&self, cluster: u64, count: u64) -> Result<bool> {
        let per_block = self.geometry.refcounts_per_block();
        let last = cluster.saturating_add(count).saturating_sub(1);
        let mut moved = false;
        for block in cluster / per_block..=last / per_block {
            if self.block_offset(block) == 0 {
                moved |= self.make_block(block).await?;
            }
        }
        Ok(moved)
    }

    /// Creates refcount block `block` if it does not exist. Returns whether the refcount table has moved.
    async fn make_block(&self, block: u64) -> Result<bool> {
        let _turn = self.growing.lock().await;
        let mut moved = false;
        let mut wanted = block;
        // Blocks whose own cluster lies in the range of another missing block. That other block is created first, in a later
        // cluster.
        let mut waiting: Vec<(u64, Reserved<'_>)> = Vec::new();
        while self.block_offset(block) == 0 {
            let reserved = self.reserve(1).await?;
            let own = reserved.start() / self.geometry.refcounts_per_block();
            if own != wanted && self.block_offset(own) == 0 {
                waiting.push((wanted, reserved));
                wanted = own;
                continue;
            }
            moved |= self.place_block(wanted, reserved).await?;
            while let Some((wanted, reserved)) = waiting.pop() {
                if self.block_offset(wanted) == 0 {
                    moved |= self.place_block(wanted, reserved).await?;
                }
            }
            wanted = block;
        }
        Ok(moved)
    }

    /// Creates a block in a reserved cluster. The refcount of that cluster lies in this block, or in another existing block.
    /// Returns whether the refcount table has moved.
    async fn place_block(&self, block: u64, mut reserved: Reserved<'_>) -> Result<bool> {
        let cluster = reserved.start();
        let own = cluster / self.geometry.refcounts_per_block();
        let moves = block >= self.table_entries.load(Acquire);
        if moves {
            self.grow_table(block, cluster).await?;
        }
        reserved.begin_write();
        self.write_new_block(cluster, own == block).await?;
        if own == block {
            self.name_new_block(block, cluster).await?;
            reserved.keep();
        } else {
            // The refcount of the cluster lies in another, existing block.
            let counted = self.count_in_place(reserved, ReleaseReason::Table).await?;
            self.write_back().await?;
            self.file()?.flush().await?;
            self.name_new_block(block, cluster).await?;
            counted.keep();
        }
        Ok(moves)
    }

    /// Adds one reference to a cluster whose block exists.
    pub(super) async fn add_one(&self, cluster: u64) -> Result<()> {
        let place = self.place(cluster)?;
        let slice = self.slice(&place).await?;
        let slice = slice.ok_or_else(|| Error::corrupt("refcount block vanished"))?;
        self.change(&slice, &place, 1)?;
        slice.mark_dirty();
        Ok(())
    }

    /// Writes the table entry of a new block, which is on disk already. The entry was 0 before.
    async fn name_new_block(&self, block: u64, cluster: u64) -> Result<()> {
        let offset = self.host(cluster);
        let place = self.table_entry_place(block)?;
        let (before, after) = (0_u64.to_be_bytes(), offset.to_be_bytes());
        exchange(&*self.file()?, place, &before, &after, &self.stop).await?;
        self.adopt_block(block, offset);
        Ok(())
    }

    fn adopt_block(&self, block: u64, offset: u64) {
        self.allocator.note_metadata(offset, self.geometry.cluster_size());
        self.table.get_or_make(block).store(offset, Release);
    }

    async fn write_new_block(&self, cluster: u64, counts_itself: bool) -> Result<()> {
        let size = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let mut bytes = IoBufMut::zeroed(size);
        if counts_itself {
            let index = cluster % self.geometry.refcounts_per_block();
            self.set_in(&mut bytes, index, 1)?;
        }
        let file = self.file()?;
        file.write(self.host(cluster), bytes.freeze(), WriteFlags::empty()).await?;
        file.flush().await
    }

    fn set_in(&self, block: &mut [u8], index: u64, value: u64) -> Result<()> {
        refcount_set(block, index, self.geometry.refcount_order, value)
            .map_err(|_| Error::corrupt("refcount out of bounds"))
    }

    fn host(&self, cluster: u64) -> u64 {
        cluster << self.geometry.cluster_bits
    }

    pub(super) async fn publish_block(&self, block: u64, cluster: u64) -> Result<()> {
        let offset = self.host(cluster);
        self.write_table_entry(block, offset).await?;
        self.adopt_block(block, offset);
        Ok(())
    }

    /// Writes an entry of the refcount table, without a flush.
    pub(super) async fn write_table_entry(&self, block: u64, offset: u64) -> Result<()> {
        let place = self.table_entry_place(block)?;
        let entry = IoBuf::from(offset.to_be_bytes().to_vec());
        self.file()?.write(place, entry, WriteFlags::empty()).await
    }

    /// The file offset of an entry of the refcount table.
    ///
    /// # Errors
    /// `Corrupt` if the table overlaps protected metadata, so that it must not be written.
    fn table_entry_place(&self, block: u64) -> Result<u64> {
        let table = self.table_place();
        let start = self.geometry.cluster_index(table.offset);
        let clusters = start..start.saturating_add(table.clusters);
        self.allocator.overlaps.check(Modes::REFCOUNT_TABLE, clusters)?;
        Ok(self.table_offset.load(Acquire).saturating_add(block.saturating_mul(8)))
    }
}
