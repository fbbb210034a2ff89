//! Reading the snapshot table ("Snapshots"), entry by entry.

use oxblk_core::{Edge, Error, Result};
use oxblk_ring::IoBufMut;

use super::Qcow2;
use super::layout::{Header, MAX_SNAPSHOT_TABLE_BYTES, Snapshot, parse_snapshot};

/// Bytes of the snapshot table that are read at once: more than the longest entry has.
const CHUNK: usize = 256 << 10;

/// Shows each entry of the snapshot table to `visit`; gives the bytes in the table. Behind the end of the file it
/// reads as zeroes.
///
/// # Errors
/// When the table is too large or an entry has too much extra data, in the words of QEMU's tools.
pub(super) async fn visit_snapshots(
    file: &Edge,
    header: &Header,
    mut visit: impl FnMut(Snapshot),
) -> Result<u64> {
    let mut table_bytes = 0_u64;
    let mut chunk = Vec::new();
    let mut taken = 0_usize;
    for index in 0..header.snapshot_count {
        let mut parsed = parse_snapshot(chunk.get(taken..).unwrap_or_default());
        if matches!(parsed, Ok(None)) {
            chunk = read_chunk(file, header.snapshots_offset.saturating_add(table_bytes)).await?;
            taken = 0;
            parsed = parse_snapshot(&chunk);
        }
        let too_large = || Error::from_errno(27).reword("Snapshot table is too large");
        let (snapshot, len) = match parsed {
            Ok(Some(entry)) => entry,
            Ok(None) => return Err(too_large()),
            Err(error) => return Err(Error::from_errno(27).reword(format!("{error} {index}"))),
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

async fn read_chunk(file: &Edge, offset: u64) -> Result<Vec<u8>> {
    if offset >= file.size() {
        return Ok(vec![0; CHUNK]);
    }
    Ok(file.read(offset, IoBufMut::new(CHUNK)).await?.to_vec())
}

impl Qcow2 {
    /// Finds out where the snapshot table and the L1 tables of snapshots lie: nothing else is put there, whatever the
    /// refcounts say.
    pub(super) async fn note_snapshots(&self, file: &Edge) -> Result<()> {
        let allocator = &self.refcounts.allocator;
        let note = |snapshot: Snapshot| {
            // One whose L1 table cannot be is for a check to find.
            if snapshot.check_l1(self.geometry).is_ok() {
                let bytes = u64::from(snapshot.l1_entries).saturating_mul(8);
                allocator.note_metadata(snapshot.l1_offset, bytes);
            }
        };
        let bytes = visit_snapshots(file, &self.header, note).await?;
        allocator.note_metadata(self.header.snapshots_offset, bytes);
        Ok(())
    }
}
