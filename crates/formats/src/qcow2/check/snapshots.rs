//! The snapshot table ("Snapshots").

use oxblk_core::{Error, Result};
use oxblk_ring::IoBufMut;

use super::Checker;
use crate::qcow2::layout::{MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES, Snapshot, parse_snapshot};

/// Bytes of the snapshot table that are read at once: more than the longest entry has.
const CHUNK: usize = 256 << 10;
/// Extra data that version 3 images must have in each entry, in bytes.
const V3_EXTRA: usize = 16;

/// The snapshots of an image.
#[derive(Default)]
pub(super) struct Snapshots {
    pub(super) list: Vec<Snapshot>,
    /// Bytes in the snapshot table.
    pub(super) table_bytes: u64,
}

impl Checker<'_> {
    /// Reads the snapshot table; behind the end of the file it reads as zeroes.
    pub(super) async fn read_snapshots(&mut self) -> Result<Snapshots> {
        let start = self.header.snapshots_offset;
        let mut snapshots = Snapshots::default();
        let mut chunk = Vec::new();
        let mut taken = 0;
        for index in 0..self.header.snapshot_count {
            let mut parsed = parse_snapshot(chunk.get(taken..).unwrap_or_default());
            if matches!(parsed, Ok(None)) {
                chunk = self.read_chunk(start.saturating_add(snapshots.table_bytes)).await?;
                taken = 0;
                parsed = parse_snapshot(&chunk);
            }
            let (snapshot, len) = match parsed {
                Ok(Some(entry)) => entry,
                Ok(None) => return Err(self.broken_table("Snapshot table is too large")),
                Err(error) => {
                    return Err(self.broken_table(&format!(
                        "{error} {index}\nYou can force-remove this extra metadata with qemu-img check \
                         -r all"
                    )));
                }
            };
            taken = taken.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
            snapshots.table_bytes = snapshots.table_bytes.saturating_add(len);
            if snapshots.table_bytes > MAX_SNAPSHOT_TABLE_BYTES {
                return Err(self.broken_table("Snapshot table is too large"));
            }
            snapshots.list.push(snapshot);
        }
        for (index, snapshot) in snapshots.list.iter().enumerate() {
            if self.header.version >= 3 && snapshot.extra.len() < V3_EXTRA {
                self.corrupt(&format!("ERROR snapshot table entry {index} is incomplete"));
            }
        }
        Ok(snapshots)
    }

    async fn read_chunk(&self, offset: u64) -> Result<Vec<u8>> {
        if offset >= self.file.size() {
            return Ok(vec![0; CHUNK]);
        }
        Ok(self.file.read(offset, IoBufMut::new(CHUNK)).await?.to_vec())
    }

    /// Without a snapshot table nothing can be told of the refcounts.
    fn broken_table(&self, reason: &str) -> Error {
        (self.say)(&format!("ERROR failed to read the snapshot table: {reason}"));
        Error::from_errno(27)
    }

    /// Whether a snapshot's L1 table is where and as large as one can be; if not, that is told.
    pub(super) fn has_l1_in_place(&mut self, snapshot: &Snapshot) -> bool {
        let Snapshot { id, name, l1_offset, l1_entries, .. } = snapshot;
        if !self.geometry.is_aligned(*l1_offset) {
            self.corrupt(&format!(
                "ERROR snapshot {id} ({name}) l1_offset={l1_offset:#x}: L1 table is not cluster aligned; \
                 snapshot table entry corrupted"
            ));
            return false;
        }
        if u64::from(*l1_entries) * 8 > MAX_L1_BYTES {
            self.corrupt(&format!(
                "ERROR snapshot {id} ({name}) l1_size={l1_entries:#x}: L1 table is too large; snapshot \
                 table entry corrupted"
            ));
            return false;
        }
        true
    }
}
