//! The location of the snapshot table, and reading the table entry by entry (section "Snapshots" of the qcow2
//! specification).

use std::sync::{MutexGuard, PoisonError};

use oxblk_core::{Edge, Errno, Error, Result};
use oxblk_ring::IoBufMut;
use roaring::RoaringTreemap;

use super::Metadata;
use crate::qcow2::layout::{Header, L1Entry, MAX_SNAPSHOT_TABLE_BYTES, Snapshot, parse_snapshot};
use crate::qcow2::read_ahead::{ReadAhead, read_ahead};
use crate::qcow2::refscan::disjoint_ranges;

/// Length of one read of the snapshot table, in bytes. The longest entry is shorter.
const CHUNK: usize = 256 << 10;

/// Minimum length in bytes of the extra data of an entry in a version 3 image.
pub(in crate::qcow2) const V3_EXTRA: usize = 16;

/// What a user can do about a snapshot table that cannot be read.
const COPY_HINT: &str = "You can copy the disk without its snapshots with qemu-img convert. qemu-img check -r all \
     repairs the table unless snapshots may be lost";

/// Location and size of the snapshot table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::qcow2) struct SnapshotTable {
    /// Byte offset in the file.
    pub(in crate::qcow2) offset: u64,
    /// Number of snapshots.
    pub(in crate::qcow2) count: u32,
    /// Length of the table in bytes. 0 until the table is read.
    pub(in crate::qcow2) bytes: u64,
    /// The table could not be read, so the image is open without its snapshots. The image can become writable only if the
    /// table can be read then.
    pub(in crate::qcow2) is_broken: bool,
}

impl SnapshotTable {
    /// The location that the header contains.
    pub(in crate::qcow2) fn of(header: &Header) -> Self {
        Self {
            offset: header.snapshots_offset,
            count: header.snapshot_count,
            bytes: 0,
            is_broken: false,
        }
    }
}

/// Calls `visit` for each entry of the snapshot table. Returns the length of the table in bytes. The part of the table
/// behind the end of the file reads as zeroes.
///
/// # Errors
/// Fails if the table cannot be read, if it is too large, or if an entry has too much extra data. The messages are those of
/// QEMU's tools.
pub(in crate::qcow2) async fn visit_snapshots(
    file: &Edge,
    place: SnapshotTable,
    mut visit: impl FnMut(Snapshot),
) -> Result<u64> {
    let mut table_bytes = 0_u64;
    let mut chunk = ReadAhead { bytes: Vec::new(), fault: None };
    let mut taken = 0_usize;
    for index in 0..place.count {
        let mut parsed = parse_snapshot(chunk.bytes.get(taken..).unwrap_or_default());
        if matches!(parsed, Ok(None)) {
            chunk = read_chunk(file, place.offset.saturating_add(table_bytes)).await;
            taken = 0;
            parsed = parse_snapshot(&chunk.bytes);
        }
        let too_large = || {
            let error = Error::from_errno(Errno::FBIG).reword("Snapshot table is too large");
            error.with_hint(COPY_HINT)
        };
        let (snapshot, len) = match parsed {
            Ok(Some(entry)) => entry,
            Ok(None) => {
                let unread = |error: Error| error.prefix("Failed to read snapshot table");
                return Err(chunk.fault.take().map_or_else(too_large, unread));
            }
            Err(error) => {
                return Err(Error::from_errno(Errno::FBIG)
                    .reword(format!("{error} {index}"))
                    .with_hint(COPY_HINT));
            }
        };
        taken = taken.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
        table_bytes = table_bytes.saturating_add(len);
        if table_bytes > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(too_large());
        }
        visit(snapshot);
    }
    Ok(table_bytes)
}

async fn read_chunk(file: &Edge, offset: u64) -> ReadAhead {
    if offset >= file.size() {
        return ReadAhead { bytes: vec![0; CHUNK], fault: None };
    }
    read_ahead(file, offset, CHUNK).await
}

impl Metadata {
    /// Records the clusters of the snapshot table and of the L1 tables of snapshots as metadata. So these clusters are not
    /// allocated, even if their refcounts are wrong. Returns the clusters of these L1 tables. Skips invalid L1 tables.
    ///
    /// # Errors
    /// When the header contains an invalid offset or size of the table, and the errors of [`visit_snapshots`].
    pub(in crate::qcow2) async fn note_snapshots(&self, file: &Edge) -> Result<RoaringTreemap> {
        self.image_state.header().require_snapshots()?;
        let mut tables = RoaringTreemap::new();
        let note = |snapshot: Snapshot| {
            // A snapshot with an invalid L1 table is skipped here. A check reports it.
            if snapshot.check_l1(self.geometry).is_ok() {
                let bytes = u64::from(snapshot.l1_entries).saturating_mul(8);
                self.clusters.note_metadata(snapshot.l1_offset, bytes);
                let end = self.geometry.clusters_for(snapshot.l1_offset.saturating_add(bytes));
                tables.insert_range(self.geometry.cluster_index(snapshot.l1_offset)..end);
            }
        };
        let place = self.snapshot_table();
        let bytes = visit_snapshots(file, place, note).await?;
        self.clusters.note_metadata(place.offset, bytes);
        let mut snapshots = self.snapshots();
        (snapshots.bytes, snapshots.is_broken) = (bytes, false);
        Ok(tables)
    }

    /// Records that the snapshot table cannot be read. The read-only image is then used without its snapshots.
    pub(in crate::qcow2) fn leave_out_snapshots(&self, error: &Error) {
        tracing::error!("qcow2: the snapshots of the image are left out: {error}");
        self.snapshots().is_broken = true;
    }

    /// Replaces the location of the table by the location in the header. The caller then reads the table.
    pub(in crate::qcow2) fn reload_snapshot_table(&self, header: &Header) {
        *self.snapshots() = SnapshotTable::of(header);
    }

    /// Checks that the snapshot table can be read, because only then the image may become writable. Reads the table only if
    /// it was broken when it was last read.
    ///
    /// # Errors
    /// The errors of [`visit_snapshots`].
    pub(in crate::qcow2) async fn check_snapshot_table(&self, file: &Edge) -> Result<()> {
        match self.snapshot_table() {
            SnapshotTable { is_broken: false, .. } => Ok(()),
            table => visit_snapshots(file, table, drop).await.map(drop),
        }
    }

    /// Records the clusters of the L2 tables of snapshots as metadata. Skips invalid L1 tables and L1 entries.
    pub(in crate::qcow2) async fn note_inactive_tables(&self) -> Result<()> {
        let size = self.geometry.cluster_size();
        let file_end = self.image_state.file()?.size().next_multiple_of(8);
        let list = self.snapshot_list().await?;
        let valid = list.iter().filter(|snapshot| snapshot.check_l1(self.geometry).is_ok());
        let ranges = valid.map(|snapshot| {
            let end = snapshot.l1_offset.saturating_add(u64::from(snapshot.l1_entries) * 8);
            snapshot.l1_offset..end.min(file_end)
        });
        for (range, _) in disjoint_ranges(ranges) {
            let entries = u32::try_from((range.end - range.start) / 8).unwrap_or(u32::MAX);
            let l1 = self.read_inactive_l1(range.start, entries).await?;
            for table in l1.iter().filter_map(|entry| entry.l2_offset(self.geometry).ok().flatten())
            {
                self.clusters.note_metadata(table, size);
            }
        }
        Ok(())
    }

    pub(super) fn snapshots(&self) -> MutexGuard<'_, SnapshotTable> {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current location of the table.
    pub(in crate::qcow2) fn snapshot_table(&self) -> SnapshotTable {
        *self.snapshots()
    }

    /// Reads all snapshots from the table.
    ///
    /// # Errors
    /// When the table cannot be read, also if the image was opened without its snapshots.
    pub(in crate::qcow2) async fn snapshot_list(&self) -> Result<Vec<Snapshot>> {
        let file = self.image_state.file()?;
        let (table, mut list) = (self.snapshot_table(), Vec::new());
        if table.is_broken {
            let required = self.image_state.header().require_snapshots();
            required.map_err(|error| error.with_hint(COPY_HINT))?;
        }
        visit_snapshots(&file, table, |snapshot| list.push(snapshot)).await?;
        Ok(list)
    }

    /// Checks that the L1 tables of snapshots are valid, and that the tables together are no longer than the file. This
    /// bounds the work of reading all of these tables.
    ///
    /// # Errors
    /// When a table is invalid, or when the tables together are longer than the file, so that some of them overlap.
    pub(in crate::qcow2) fn check_l1_tables(&self, list: &[Snapshot]) -> Result<()> {
        let mut room = self.image_state.file()?.size() / 8;
        for snapshot in list {
            snapshot.check_l1(self.geometry)?;
            room = room.checked_sub(snapshot.l1_entries.into()).ok_or_else(|| {
                Error::corrupt("L1 tables of snapshots overlap: the image needs a check")
            })?;
        }
        Ok(())
    }

    /// Reads the L1 table of a snapshot.
    pub(in crate::qcow2) async fn read_inactive_l1(
        &self,
        offset: u64,
        entries: u32,
    ) -> Result<Vec<L1Entry>> {
        let len = usize::try_from(u64::from(entries).saturating_mul(8)).unwrap_or(usize::MAX);
        let file = self.image_state.file()?;
        let table = file.read(offset, IoBufMut::new(len)).await?;
        let words = table.chunks_exact(8);
        Ok(words.map(|word| L1Entry(word.try_into().map_or(0, u64::from_be_bytes))).collect())
    }
}
